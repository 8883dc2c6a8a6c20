"""The worker's frozen prefix over restarts: the real worker, called in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structlog
import torch
from safetensors.numpy import save_file
from transformers import AutoModelForTokenClassification

from edge_client import pipe
from edge_client.layout import PREFIX
from edge_client.model import seal_plan
from edge_client.prefix_store import entries
from edge_client.weights import absent
from edge_client.worker import Worker
from edge_client.worker_client import load_request
from shared.config import SiteConfig
from tests.unit.edge_client import tiny

FEDERATION = tiny.federation()
Start = Callable[..., "Started"]


class Started:
    """A worker that has loaded, what it answered, and the names of its log lines."""

    def __init__(self, config: SiteConfig, *, trains: bool = True) -> None:
        self.worker = Worker(lambda _: None)
        with structlog.testing.capture_logs() as logs:
            answer = self.worker.handle(load_request(config, FEDERATION, trains=trains))
        assert isinstance(answer, pipe.Loaded), answer
        self.loaded = answer
        self.events = [line["event"] for line in logs]

    @property
    def absent(self) -> tuple[str, ...]:
        """What is not in memory of the model."""
        return absent(self.worker._loaded.model)

    def ask(self, request: pipe.Request) -> Any:
        """A request that must succeed."""
        answer = self.worker.handle(request)
        assert not isinstance(answer, pipe.Failed), answer
        return answer

    def delta(self, ground: Path, out: Path) -> bytes:
        """The bytes of the update that version 0 gives."""
        self.ask(pipe.Train(state=ground / "v0.safetensors", base_version=0, out=out))
        return out.read_bytes()


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, and version 0."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("ground")
    tiny.save_model(root / "model", "llama")
    save_file(seal_plan(FEDERATION, root / "model")[1], root / "v0.safetensors")
    return root


@pytest.fixture
def start(ground: Path, tmp_path: Path) -> Start:
    """Starts a worker for one site, whose storage and notes lie in `tmp_path`."""
    tiny.write_conll(tmp_path / "site.conll", tiny.notes(10))

    def started(*, trains: bool = True, **prefix: object) -> Started:
        config = SiteConfig.model_validate(
            {
                "name": "north",
                "federation": "unused.toml",
                "storage": tmp_path / "storage",
                "data": {"notes": tmp_path / "site.conll", "holdout": 0.2},
                "model_dir": ground / "model",
                "threads": 1,
                "min_free_mib": 1,
                "prefix": prefix,
            }
        )
        return Started(config, trains=trains)

    return started


def kept(tmp_path: Path) -> dict[str, Path]:
    """The file of each slot."""
    return {entry.slot: entry.path for entry in entries(tmp_path / "storage" / PREFIX)}


def test_a_restart_finds_what_was_computed(ground: Path, tmp_path: Path, start: Start) -> None:
    """The second worker computes nothing, has no frozen block in memory, and trains the same delta to the last bit."""
    first = start()
    assert (first.events, first.loaded.uncached) == (["prefix-computing"] * 2, "")
    assert set(kept(tmp_path)) == {"training", "held-out"}
    delta = first.delta(ground, tmp_path / "first")
    second = start()
    assert (second.events, second.loaded) == (["prefix-found"] * 2, first.loaded)
    assert second.delta(ground, tmp_path / "second") == delta
    assert second.absent == first.absent
    assert {".".join(name.split(".")[:3]) for name in second.absent} == {
        "model.embed_tokens.weight",
        "model.layers.0",
        "model.layers.1",
    }


def test_the_whole_model_can_be_written_by_a_worker_that_never_loaded_it(
    ground: Path, tmp_path: Path, start: Start
) -> None:
    """An export brings the frozen blocks along, other notes are scored by all of them, and both let them go again."""
    start()
    second = start()
    away = second.absent
    tiny.write_conll(tmp_path / "other.conll", tiny.notes(3, seed=4))
    other = second.ask(pipe.Evaluate(state=ground / "v0.safetensors", notes=tmp_path / "other.conll"))
    assert other.overall
    second.ask(pipe.Export(state=ground / "v0.safetensors", out=tmp_path / "out"))
    assert second.absent == away != ()
    written, base = (
        AutoModelForTokenClassification.from_pretrained(each).state_dict()
        for each in (tmp_path / "out", ground / "model")
    )
    assert all(np.array_equal(written[name].numpy(), base[name].numpy()) for name in base if "score" not in name)


def test_other_notes_take_the_place_of_those_before(ground: Path, tmp_path: Path, start: Start) -> None:
    """When the notes change, the states of the old ones are deleted, and the update is that of the new ones."""
    before = start().delta(ground, tmp_path / "before")
    old = kept(tmp_path)
    tiny.write_conll(tmp_path / "site.conll", tiny.notes(10, seed=5))
    second = start()
    assert second.events == ["prefix-computing"] * 2
    assert not any(path.exists() for path in old.values())
    assert set(kept(tmp_path)) == {"training", "held-out"}
    assert second.delta(ground, tmp_path / "after") != before


def test_a_damaged_file_is_computed_anew(ground: Path, tmp_path: Path, start: Start) -> None:
    """One bit turned over is found at the next start and said; the update is the same."""
    delta = start().delta(ground, tmp_path / "first")
    path = kept(tmp_path)["training"]
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(bytes(data))
    second = start()
    assert second.events == ["prefix-damaged", "prefix-computing", "prefix-computing"]
    assert second.delta(ground, tmp_path / "second") == delta
    assert start().events == ["prefix-found"] * 2


def test_a_site_may_keep_nothing(ground: Path, tmp_path: Path, start: Start) -> None:
    """Under limit_mib = 0 what was kept is deleted, the log says why, and the whole model trains the same update."""
    delta = start().delta(ground, tmp_path / "first")
    second = start(limit_mib=0)
    assert second.events == ["prefix-not-cached"]
    assert "prefix.limit_mib = 0" in second.loaded.uncached
    assert (kept(tmp_path), second.absent) == ({}, ())
    assert second.delta(ground, tmp_path / "second") == delta


def test_a_worker_that_only_measures_leaves_nothing_on_the_disk(tmp_path: Path, start: Start) -> None:
    """The coordinator's notes, too, are its operator's business: their states stay in memory."""
    measuring = start(trains=False)
    assert (measuring.loaded.uncached, measuring.events) == ("", [])
    assert not (tmp_path / "storage").exists()
    assert measuring.absent


def test_the_type_is_the_site_s_choice(ground: Path, tmp_path: Path, start: Start) -> None:
    """bf16 takes half the disk, replaces what was kept in f32, and trains nearly the same."""
    loss = (
        start().ask(pipe.Train(state=ground / "v0.safetensors", base_version=0, out=tmp_path / "f32")).metrics["loss"]
    )
    size = kept(tmp_path)["training"].stat().st_size
    second = start(dtype="bf16")
    assert kept(tmp_path)["training"].stat().st_size < 0.51 * size
    trained = second.ask(pipe.Train(state=ground / "v0.safetensors", base_version=0, out=tmp_path / "bf16"))
    assert trained.metrics["loss"] == pytest.approx(loss, rel=0.02)
