"""Updates weighed by their loss, measured by the real worker process beside the coordinator, over a real Mosquitto."""

from __future__ import annotations

import asyncio
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from coordinator.proof import prove
from coordinator.records import Validated, VersionCommitted
from coordinator.replay import replay
from coordinator.service import run_coordinator
from edge_client.model import apply_state, load_model, read_trainable, seal_plan
from edge_client.trainer import make_dataset, mean_loss
from edge_client.worker_client import WorkerClient
from mailboat.validating import validator_for
from shared.config import CoordinatorConfig, FederationConfig
from shared.configfile import load_config
from shared.errors import ConfigError
from shared.plan import SealedPlan, load_plan
from tests.helpers import run_async
from tests.toys import HASTY, toy_records, toy_site
from tests.unit.edge_client import tiny

STEPS = (0.001, 0.5)
"""What each site adds to every weight."""


def _begin(root: Path, url: str, trained: str = "") -> tuple[CoordinatorConfig, FederationConfig, SealedPlan]:
    """A tiny LLaMA, six annotated notes of the coordinator's, and the files of two sites.

    `trained` goes on from [layers].
    """
    torch.set_num_threads(1)
    tiny.save_model(root / "model", "llama")
    tiny.write_conll(root / "held.conll", tiny.notes(6))
    (root / "federation.toml").write_text(
        '[federation]\nname = "toy"\nversions = 2\n[model]\nbase = "model"\n[task]\nmax_length = 32\n'
        f'[layers]\nplan = "top:2"\n{trained}[codec]\nup = "f32"\ndown = "f32"\n'
        '[aggregation]\nquorum = 2\nquality = "exp-loss"\n'
    )
    (root / "coordinator.toml").write_text(
        'federation = "federation.toml"\nstorage = "coordinator"\nexit_when_done = true\nmin_free_mib = 1\n'
        f'[broker]\nurl = "{url}"\n[link]\n{HASTY}'
        '[validation]\nnotes = "held.conll"\nmodel_dir = "model"\nthreads = 1\n'
    )
    for number in (1, 2):
        (root / f"site-{number}.toml").write_text(
            f'name = "site-{number}"\nfederation = "federation.toml"\nstorage = "site-{number}"\nmin_free_mib = 1\n'
            f'[broker]\nurl = "{url}"\n[link]\n{HASTY}[data]\nnotes = "none"\n'
        )
    config = load_config(root / "coordinator.toml", CoordinatorConfig)
    federation = load_config(config.federation, FederationConfig)
    plan, initial = seal_plan(federation, root / "model")
    config.storage.mkdir()
    (config.storage / "plan.json").write_text(plan.model_dump_json())
    save_file(initial, config.storage / "initial.safetensors")
    return config, federation, plan


def _loss(root: Path, federation: FederationConfig, step: float) -> float:
    """Of version 0 with the step added to every weight that is trained, on the coordinator's notes."""
    loaded = load_model(root / "model", federation)
    apply_state(loaded, {name: values + np.float32(step) for name, values in read_trainable(loaded).items()})
    return mean_loss(loaded, make_dataset(loaded, tiny.notes(6), batch_size=3, seed=1))


@pytest.mark.timeout(300)
@pytest.mark.slow
@pytest.mark.parametrize("trained", ["", '[adapter]\nkind = "lora"\nrank = 2\n'], ids=["blocks", "lora"])
def test_a_run_is_weighed_by_loss_though_the_validator_is_killed(
    trained: str, tmp_path: Path, mosquitto_url: str
) -> None:
    """Killed after the first loss, the worker is started again; the run ends, is proven, and is made again without it.

    Each loss is that of the site's own model, as the library computes it here, and each weight follows from the losses.
    With adapters these are what is trained, sent and measured.
    """
    config, federation, plan = _begin(tmp_path, mosquitto_url, trained)
    assert any("lora_A" in name for name in plan.tensors) == bool(trained)

    async def everybody() -> None:
        async with validator_for(config, federation, plan) as validator, asyncio.TaskGroup() as group:
            assert isinstance(validator, WorkerClient)
            initial = config.storage / "initial.safetensors"
            coordinating = group.create_task(run_coordinator(config, federation, plan, initial, validator))
            for number, step in enumerate(STEPS, start=1):
                group.create_task(toy_site(tmp_path / f"site-{number}.toml", step=step, plan=plan))
            journal = config.storage / "journal.sqlite"
            while not (journal.exists() and any(isinstance(each, Validated) for each in toy_records(tmp_path))):  # noqa: ASYNC110 - a file
                await asyncio.sleep(0.02)
            assert validator.pid is not None
            os.kill(validator.pid, signal.SIGKILL)
            await coordinating

    run_async(everybody(), timeout_s=240)
    records = toy_records(tmp_path)
    losses = {record.update_id: record.loss for record in records if isinstance(record, Validated)}
    assert len(losses) == 4
    versions = [record for record in records if isinstance(record, VersionCommitted)]
    for version in versions:
        shares = [math.exp(1 - losses[part.update_id]) for part in version.contributions]
        weights = [part.weight for part in version.contributions]
        assert weights == pytest.approx([share / sum(shares) for share in shares], rel=1e-12)
    first = [losses[part.update_id] for part in versions[0].contributions]
    assert first == pytest.approx([_loss(tmp_path, federation, step) for step in STEPS], rel=1e-5)
    assert first[0] != first[1]
    assert prove(config.storage, federation, plan).findings == ()
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    assert [made.differences for made in replay(config.storage, federation, plan, scratch)] == [()] * 3
    assert not any((config.storage / "validation").iterdir())


@pytest.mark.timeout(120)
def test_a_validator_with_another_model_does_not_start(tmp_path: Path) -> None:
    """Its losses would be about something else; the hint says which key names the right one."""
    config, federation, _plan = _begin(tmp_path, "mqtt://127.0.0.1:1")
    other = load_plan(config.storage / "plan.json", federation).model_copy(update={"frozen_sha256": "0" * 64})

    async def start() -> None:
        async with validator_for(config, federation, other):
            raise AssertionError("it started")

    with pytest.raises(ConfigError, match="not the one of the sealed plan") as caught:
        run_async(start(), timeout_s=100)
    assert "model_dir" in caught.value.hint
