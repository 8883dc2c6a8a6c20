"""The real worker process of a private federation, driven through its client; one test kills it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import structlog
import torch
from safetensors.numpy import save_file

from edge_client.model import seal_plan
from edge_client.privacy.accounting import epsilon_of
from edge_client.privacy.ledger import Charge, Limit, read_ledger
from edge_client.site import run_site
from edge_client.worker_client import WorkerClient
from shared.config import SiteConfig
from shared.errors import ConfigError, RefusedError
from tests.helpers import run_async
from tests.unit.edge_client import tiny

pytestmark = pytest.mark.slow

DELTA = 1e-4
SECTION = {"delta": DELTA, "noise_multiplier": 1.0}
FEDERATION = tiny.federation(privacy=SECTION)
CHARGE = Charge(sample_rate=0.5, noise_multiplier=1.0, steps=2)
"""Four of eight records, one epoch."""


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a site's notes, and version 0 as a file."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("ground")
    tiny.save_model(root / "model", "llama")
    tiny.write_conll(root / "site.conll", tiny.notes(10, lines=8))
    save_file(seal_plan(FEDERATION, root / "model")[1], root / "v0.safetensors")
    return root


def config(ground: Path, storage: Path, **privacy: float | str) -> SiteConfig:
    """A site's configuration."""
    return SiteConfig.model_validate(
        {
            "name": "north",
            "federation": "unused.toml",
            "storage": storage,
            "data": {"notes": ground / "site.conll", "holdout": 0.2},
            "model_dir": ground / "model",
            "threads": 1,
            "privacy": privacy,
        }
    )


def test_it_counts_records_and_says_what_a_training_costs(ground: Path, tmp_path: Path) -> None:
    """Eight notes are eight examples, whatever lines they have; the second training adds to the first."""

    async def story() -> None:
        async with WorkerClient(config(ground, tmp_path), FEDERATION) as client:
            loaded = await client.load()
            assert (loaded.examples, loaded.notes, loaded.uncached) == (8, 8, "")
            first = await client.train(ground / "v0.safetensors", 0, tmp_path / "first")
            assert first.spent is not None
            assert first.spent.charge == CHARGE
            assert first.spent.epsilon == pytest.approx(epsilon_of([CHARGE], DELTA))
            assert first.examples == 8
            second = await client.train(ground / "v0.safetensors", 0, tmp_path / "second", so_far=(CHARGE,))
            assert second.spent is not None
            assert second.spent.epsilon == pytest.approx(epsilon_of([CHARGE.times(2)], DELTA))

    run_async(story(), timeout_s=100)
    assert (tmp_path / "first").read_bytes() != (tmp_path / "second").read_bytes()


def test_a_site_chooses_how_gradients_are_clipped(ground: Path, tmp_path: Path) -> None:
    """Ghost clipping trains and is told in the log; where the embeddings are trained it is refused with the model."""
    whole = tiny.federation(privacy=SECTION, layers={"plan": "all"})

    async def story() -> None:
        with structlog.testing.capture_logs() as logs:
            async with WorkerClient(config(ground, tmp_path, clipping="ghost"), FEDERATION) as client:
                trained = await client.train(ground / "v0.safetensors", 0, tmp_path / "out")
        assert trained.spent is not None
        assert trained.spent.charge == CHARGE
        assert [entry["clipping"] for entry in logs if entry["event"] == "private"] == ["ghost"]
        async with WorkerClient(config(ground, tmp_path, clipping="ghost"), whole) as client:
            with pytest.raises(ConfigError, match="layer of type Embedding"):
                await client.load()

    run_async(story(), timeout_s=100)


def test_past_a_limit_it_does_not_begin(ground: Path, tmp_path: Path) -> None:
    """Refused under the rule, with nothing written and no progress told; the worker lives."""
    limit = Limit(name="the budget", epsilon=epsilon_of([CHARGE], DELTA) * 1.01, charges=(CHARGE,))

    async def story() -> None:
        async with WorkerClient(config(ground, tmp_path), FEDERATION) as client:
            told: list[float] = []
            with pytest.raises(RefusedError, match="the budget allows") as caught:
                await client.train(
                    ground / "v0.safetensors",
                    0,
                    tmp_path / "out",
                    on_progress=lambda share, _: told.append(share),
                    limits=(limit,),
                )
            assert (caught.value.rule, told) == ("privacy-budget", [])
            pid = client.pid
            free = limit.model_copy(update={"charges": ()})
            await client.train(ground / "v0.safetensors", 0, tmp_path / "out", limits=(free,))
            assert client.pid == pid

    run_async(story(), timeout_s=100)


def test_a_killed_worker_begins_anew_with_other_noise(ground: Path, tmp_path: Path) -> None:
    """Killed (-9) in mid-training it trains again; the update is another one, and costs one training: one came out."""
    federation = tiny.federation(privacy=SECTION, training={"epochs": 30})

    async def story() -> None:
        async with WorkerClient(config(ground, tmp_path), federation) as client:
            await client.train(ground / "v0.safetensors", 3, tmp_path / "undisturbed")
            first = client.pid
            assert first is not None

            def kill_once(_share: float, _loss: float) -> None:
                if client.pid == first:
                    os.kill(first, signal.SIGKILL)

            with structlog.testing.capture_logs() as logs:
                trained = await client.train(
                    ground / "v0.safetensors", 3, tmp_path / "disturbed", on_progress=kill_once
                )
            assert [entry["event"] for entry in logs] == [
                "worker-died",
                "computes",
                "prefix-found",
                "private",
                "prefix-found",
            ]
            assert trained.spent is not None
            assert trained.spent.charge == CHARGE.model_copy(update={"steps": 60})

    run_async(story(), timeout_s=100)
    assert (tmp_path / "undisturbed").read_bytes() != (tmp_path / "disturbed").read_bytes()


def test_a_site_with_a_budget_joins_no_federation_without_privacy(ground: Path, tmp_path: Path) -> None:
    """It ends before it makes a folder or loads a model."""
    storage = tmp_path / "storage"
    with pytest.raises(ConfigError, match="budget_epsilon"):
        run_async(run_site(config(ground, storage, budget_epsilon=8.0), tiny.federation()))
    assert not storage.exists()
    assert read_ledger(storage / "privacy.jsonl") == ((), False)
