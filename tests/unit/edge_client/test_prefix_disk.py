"""The frozen prefix from the disk: what a site's next start finds there, and trains on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structlog
import torch
from torch import nn

from edge_client.data import AnyNote, TextNote
from edge_client.importance import measure
from edge_client.model import LoadedModel, load_model, version_zero
from edge_client.prefix import prepare
from edge_client.prefix_store import NOWHERE, Keep, OnDisk, entries
from edge_client.privacy.records import make_records
from edge_client.trainer import Dataset, evaluate, make_dataset, make_window_batches, mean_loss, train
from edge_client.weights import Weights, absent
from shared.config import FederationConfig, StateDType
from tests.unit.edge_client import tiny

FEDERATION = tiny.federation(training={"epochs": 2})
NOTES = tiny.notes(4)
LABELS = ["a", "b"]
TEXTS = tuple(TextNote(f"n{each}", f"p{each}", f"given {each} for", tuple(LABELS[: each % 3])) for each in range(9))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with a tiny model of each type."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("models")
    return {model_type: tiny.save_model(root / model_type, model_type) for model_type in tiny.MODEL_TYPES}


def on_disk(folder: Path, dtype: StateDType = "f32") -> OnDisk:
    """The slot for training notes in a folder."""
    return OnDisk(folder, "training", dtype=dtype, limit=1 << 20, keep_free=0)


def dataset(loaded: LoadedModel, keep: Keep, notes: Sequence[AnyNote] = NOTES) -> Dataset:
    """Notes, prepared for a model."""
    return make_dataset(loaded, notes, batch_size=4, seed=3, keep=keep)


def trained(loaded: LoadedModel, data: Dataset) -> tuple[list[float], dict[str, bytes]]:
    """Each step's loss, and the delta, of one training from version 0."""
    losses: list[float] = []
    done = train(
        loaded,
        version_zero(loaded),
        data,
        FEDERATION.training,
        seed=5,
        progress=lambda _, loss: losses.append(loss),
    )
    return losses, {name: values.tobytes() for name, values in done.delta.items()}


@pytest.mark.parametrize("model_type", tiny.MODEL_TYPES)
@pytest.mark.parametrize(
    "change",
    [
        {"layers": {"plan": "top:2"}},
        {"layers": {"plan": "1,3"}},
        {"adapter": {"kind": "lora", "rank": 2, "dropout": 0.1}},
        {"task": {"kind": "multilabel", "labels": LABELS}},
    ],
    ids=["top", "gap", "lora", "sequence"],
)
def test_the_next_start_trains_as_if_nothing_were_kept(
    folders: dict[str, Path], tmp_path: Path, model_type: str, change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain, first start and next give equal losses and deltas; the next reads no weights below the trained blocks."""
    federation, told = tiny.federation(**change), list[str]()
    notes = TEXTS if "task" in change else NOTES
    plain = load_model(folders[model_type], federation)
    whole = trained(plain, dataset(plain, NOWHERE, notes))
    for _ in range(2):
        loaded = load_model(folders[model_type], federation, suffix=True)
        below = absent(loaded.model)
        with structlog.testing.capture_logs() as logs, monkeypatch.context() as patch:
            if told:
                patch.setattr(Weights, "values", None)
            data = dataset(loaded, on_disk(tmp_path), notes)
            assert trained(loaded, data) == whole
            assert evaluate(loaded, data).overall
        told += [line["event"] for line in logs]
        assert absent(loaded.model) == below != ()
    assert told == ["prefix-computing", "prefix-found"]


def test_other_evaluations_bring_the_model_back_and_let_it_go(folders: dict[str, Path], tmp_path: Path) -> None:
    """Notes without kept states are scored by the whole model, exactly, and what was absent is absent again."""
    plain, loaded = load_model(folders["llama"], FEDERATION), load_model(folders["llama"], FEDERATION, suffix=True)
    dataset(loaded, on_disk(tmp_path))
    below = absent(loaded.model)
    others = [mean_loss(each, dataset(each, NOWHERE, tiny.notes(3, seed=9))) for each in (plain, loaded)]
    assert others[0] == others[1]
    assert absent(loaded.model) == below != ()


def test_importance_is_measured_without_what_lies_below_the_candidates(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """The scores of three candidates from kept states are those of the whole model; block 0 stays on the disk."""
    federation = tiny.federation(layers={"plan": "importance:1", "among": "top:3"})
    plain, loaded = load_model(folders["llama"], federation), load_model(folders["llama"], federation, suffix=True)
    data = dataset(loaded, on_disk(tmp_path))
    assert data.prepared.cached
    scores = [
        measure(each, prepared, "gradient-norm", seed=1)
        for each, prepared in ((plain, dataset(plain, NOWHERE).prepared), (loaded, data.prepared))
    ]
    assert scores[0] == scores[1]
    assert set(scores[0]) == {1, 2, 3}
    assert any(".layers.0." in name for name in absent(loaded.model))


def test_records_of_a_private_federation_are_kept_too(folders: dict[str, Path], tmp_path: Path) -> None:
    """What a record's batches hold after the next start is what was computed at the first."""
    states = []
    for _ in range(2):
        loaded = load_model(folders["llama"], FEDERATION, suffix=True)
        records = make_records(loaded, NOTES, on_disk(tmp_path))
        hidden = [batch.hidden for batch in records.data.prepared.batches]
        states.append([read().numpy().tobytes() for read in hidden if read is not None])
        assert absent(loaded.model)
    assert states[0] == states[1]
    assert len(states[0]) == len(hidden) > 1


@pytest.mark.parametrize(("dtype", "tolerance"), [("bf16", 2e-2), ("f16", 2e-3)])
@pytest.mark.parametrize("model_type", tiny.MODEL_TYPES)
def test_half_the_bytes_cost_little(
    folders: dict[str, Path], tmp_path: Path, model_type: str, dtype: StateDType, tolerance: float
) -> None:
    """In 16 bits the file is half as large, and the losses are those of f32 within what its mantissa rounds."""
    found = {}
    for kind in ("f32", dtype):
        loaded = load_model(folders[model_type], FEDERATION, suffix=True)
        data = dataset(loaded, on_disk(tmp_path / kind, kind))
        assert data.prepared.cached, data.prepared.reason
        (entry,) = entries(tmp_path / kind)
        found[kind] = trained(loaded, data)[0], entry.path.stat().st_size
    np.testing.assert_allclose(found[dtype][0], found["f32"][0], rtol=tolerance)
    assert found[dtype][0] != found["f32"][0]
    assert found[dtype][1] < 0.51 * found["f32"][1]


class Loud(nn.Module):
    """A block whose output f16 cannot hold."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, hidden: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        """Above 65,504 in many places."""
        out: torch.Tensor = self.block(hidden, *args, **kwargs)
        return out * 1e9


def test_states_that_a_type_cannot_hold_are_not_kept(folders: dict[str, Path], tmp_path: Path) -> None:
    """Activations beyond f16 are said, and training runs the whole model."""
    loaded = load_model(folders["llama"], FEDERATION)
    loaded.model.model.layers[0] = Loud(loaded.model.model.layers[0])
    batches = make_window_batches(loaded, NOTES, size=4, seed=3)
    prepared = prepare(loaded, batches, on_disk(tmp_path, "f16"))
    assert prepared.reason == "the states do not fit f16"
    assert prepare(loaded, batches, on_disk(tmp_path)).cached


@pytest.mark.parametrize("changed", ["notes", "order", "weights", "plan", "dtype", "config", "threads"])
def test_the_key_names_all_that_states_follow_from(folders: dict[str, Path], tmp_path: Path, changed: str) -> None:
    """Other notes, batches, weights, first block, type, settings or threads: the old file goes and a new one comes."""
    loaded = load_model(folders["llama"], FEDERATION)
    batches = make_window_batches(loaded, NOTES, size=4, seed=3)
    prepare(loaded, batches, on_disk(tmp_path))
    (before,) = entries(tmp_path)
    assert prepare(loaded, batches, on_disk(tmp_path)).cached
    assert entries(tmp_path) == [before]
    dtype: StateDType = "f32"
    match changed:
        case "notes":
            batches = make_window_batches(loaded, tiny.notes(4, seed=1), size=4, seed=3)
        case "order":
            batches = batches[::-1]
        case "weights":
            loaded = replace(loaded, frozen_sha256="0" * 64)
        case "plan":
            loaded = load_model(folders["llama"], tiny.federation(layers={"plan": "top:1"}))
        case "dtype":
            dtype = "bf16"
        case "config":
            loaded.model.config.rms_norm_eps *= 2
        case "threads":
            torch.set_num_threads(2)
    try:
        assert prepare(loaded, batches, on_disk(tmp_path, dtype)).cached
    finally:
        torch.set_num_threads(1)
    (after,) = entries(tmp_path)
    assert after.key != before.key


def test_a_plan_without_a_prefix_forgets_what_was_kept(folders: dict[str, Path], tmp_path: Path) -> None:
    """States of a plan that is over do not stay when the next has none."""
    loaded = load_model(folders["llama"], FEDERATION)
    dataset(loaded, on_disk(tmp_path))
    assert entries(tmp_path)
    whole: FederationConfig = tiny.federation(layers={"plan": "all"})
    assert not dataset(load_model(folders["llama"], whole), on_disk(tmp_path)).prepared.cached
    assert entries(tmp_path) == []
