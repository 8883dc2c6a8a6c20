"""How deep a site trains: the decision over known costs, and the costs as measured on a tiny model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edge_client import depth
from edge_client.depth import MIB, Depth, _held_bytes, _kept_bytes, choose_depth, measures
from edge_client.device import CPU, Device
from edge_client.layers import FAMILIES, names_within
from edge_client.model import LoadedModel, load_model, read_trainable, train_only, version_zero
from edge_client.prefix_store import NOWHERE
from edge_client.trainer import Dataset, TrainResult, make_dataset, train
from shared.config import LocalLayersSection
from shared.errors import ConfigError
from shared.plan import Blocks
from tests.unit.edge_client import tiny

PLANNED = (10, 11, 12, 13, 14, 15)
FEDERATION = tiny.federation(layers={"plan": "top:3"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaMA of four blocks."""
    torch.set_num_threads(1)
    return tiny.save_model(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture
def loaded(folder: Path) -> LoadedModel:
    """The same, to train its upper three blocks."""
    return load_model(folder, FEDERATION)


def dataset(loaded: LoadedModel) -> Dataset:
    """A few notes, prepared for a model."""
    return make_dataset(loaded, tiny.notes(6), batch_size=4, seed=0)


def ten_a_block(blocks: Blocks) -> float:
    """A cost that is easily worked out."""
    return 10.0 * len(blocks)


@pytest.mark.parametrize(
    ("limits", "blocks", "limit"),
    [
        ({}, 6, ""),
        ({"at_most": 6}, 6, ""),
        ({"at_most": 9}, 6, ""),
        ({"at_most": 2}, 2, "at_most"),
        ({"upload_mib": 60.0}, 6, ""),
        ({"upload_mib": 59.9}, 5, "upload_mib"),
        ({"upload_mib": 10.0}, 1, "upload_mib"),
        ({"at_most": 4, "upload_mib": 35.0}, 3, "upload_mib"),
        ({"at_most": 2, "upload_mib": 35.0}, 2, "at_most"),
        ({"seconds": 45.0, "upload_mib": 25.0}, 2, "upload_mib"),
        ({"seconds": 15.0, "upload_mib": 25.0}, 1, "seconds"),
    ],
)
def test_the_topmost_blocks_that_fit(limits: dict[str, float], blocks: int, limit: str) -> None:
    """By hand, at ten units a block: the tightest of the limits decides."""
    section = LocalLayersSection.model_validate(limits)
    costs = {"upload_mib": ten_a_block, "seconds": ten_a_block}
    assert choose_depth(PLANNED, section, costs) == Depth(blocks, limit)


def test_a_limit_that_allows_nothing_is_an_error() -> None:
    """It names the key, the block and what that block alone would take."""
    with pytest.raises(ConfigError) as caught:
        choose_depth(PLANNED, LocalLayersSection(seconds=9.0), {"seconds": ten_a_block})
    assert "layers.seconds = 9 does not allow block 15 alone, which takes 10" in caught.value.message


def test_what_no_limit_asks_for_is_not_measured() -> None:
    """A site without limits pays nothing for them."""

    def never(blocks: Blocks) -> float:
        raise AssertionError(blocks)

    assert choose_depth(PLANNED, LocalLayersSection(at_most=3), {"seconds": never}).blocks == 3


def test_what_is_trained_within_some_blocks() -> None:
    """Head and final norm always; what stands below the blocks only when the whole model is trained."""
    names = ["model.embed_tokens.weight", *(f"model.layers.{index}.w" for index in range(12)), "model.norm.weight"]
    names.append("score.weight")
    whole = tuple(range(12))
    llama = FAMILIES["llama"]
    assert names_within(names, llama, whole, whole, full=True) == tuple(names)
    assert names_within(names, llama, whole, (1, 11), full=True) == (
        "model.layers.1.w",
        "model.layers.11.w",
        "model.norm.weight",
        "score.weight",
    )
    assert names_within(names[2:], llama, whole[1:], (11,), full=False) == (
        "model.layers.11.w",
        "model.norm.weight",
        "score.weight",
    )


def test_an_update_holds_what_was_trained_here(loaded: LoadedModel) -> None:
    """Of three planned blocks the topmost is trained: the others neither move nor are in the delta."""
    shallow, before = train_only(loaded, (3,)), read_trainable(loaded)
    result = train(shallow, before, dataset(shallow), FEDERATION.training, seed=1)
    assert {name.split(".")[2] for name in result.delta if name.startswith("model.layers.")} == {"3"}
    assert {"model.norm.weight", "score.weight", "score.bias"} < set(result.delta)
    after = read_trainable(shallow)
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    assert moved == set(result.delta)
    again = train_only(shallow, (1, 2, 3))
    assert set(train(again, before, dataset(again), FEDERATION.training, seed=1).delta) == set(before)


def test_adapters_are_trained_to_a_depth_too(folder: Path) -> None:
    """Of the adapters in three blocks those of the topmost are trained, and the head; the rest is not in the delta."""
    federation = tiny.federation(layers={"plan": "top:3"}, adapter={"kind": "lora", "rank": 2})
    loaded = train_only(load_model(folder, federation), (3,))
    begin = version_zero(loaded)
    delta = train(loaded, begin, dataset(loaded), federation.training, seed=1).delta
    assert {name.split(".")[4] for name in delta if ".layers." in name} == {"3"}
    assert len(delta) == 2 * 7 + 2
    assert len(begin) == 3 * 2 * 7 + 2


def test_kept_states_stay_right_while_blocks_above_them_change(loaded: LoadedModel) -> None:
    """A version that moved a block below what is trained here gives the delta of the whole model, to the bit."""
    shallow = train_only(loaded, (3,))
    data = dataset(shallow)
    assert (data.prepared.cached, data.prepared.first_block) == (True, 1)
    state = read_trainable(shallow)
    state = {name: array + np.float32(0.01) if ".layers.1." in name else array for name, array in state.items()}
    plain = make_dataset(shallow, tiny.notes(6), batch_size=4, seed=0, keep=NOWHERE)
    assert not plain.prepared.cached
    kept, whole = (train(shallow, state, each, FEDERATION.training, seed=1).delta for each in (data, plain))
    assert all(np.array_equal(kept[name], whole[name]) for name in whole)


def test_an_update_s_size_is_known_exactly(loaded: LoadedModel) -> None:
    """By hand: 2 bytes for each parameter of a block of 2,336, a norm of 16 and a head of 7 x 17."""
    block = 16 * 16 + 2 * 8 * 16 + 16 * 16 + 3 * 16 * 32 + 2 * 16
    upload = measures(loaded, dataset(loaded), tiny.federation(codec={"up": "bf16"}))["upload_mib"]
    for count in (1, 2, 3):
        assert upload((1, 2, 3)[-count:]) * 2**20 == 2 * (count * block + 16 + 7 * 17)


def test_what_a_forward_pass_keeps_grows_with_the_blocks(loaded: LoadedModel) -> None:
    """Each further block keeps as much as the one before, nearly; parameters and kept states do not count."""
    data = dataset(loaded)
    one, two, three = (_kept_bytes(train_only(loaded, (1, 2, 3)[-n:]), data.prepared) for n in (1, 2, 3))
    assert one > 0
    assert two - one == pytest.approx(three - two, rel=0.1)
    tokens = max(batch.ids.numel() for batch in data.prepared.batches)
    # At least: inputs of three norms' worth of products, 16 wide, and of the wide layer's, 32 wide; float32.
    assert two - one >= 4 * tokens * (3 * 16 + 2 * 32)


def test_memory_and_time_are_measured(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """More blocks take more memory, beyond what the process has already; time is that of two epochs of steps.

    The process has as much as before, whatever else comes and goes in it, and the clock counts a second for each step.
    """
    data = dataset(loaded)
    how = measures(loaded, data, tiny.federation(training={"epochs": 2}))
    assert how["seconds"]((1, 2, 3)) > 0
    monkeypatch.setattr(depth, "_held_bytes", lambda _device: 50 * MIB)
    assert 50 < how["memory_mib"]((3,)) < how["memory_mib"]((1, 2, 3))
    monkeypatch.setattr(depth, "train", in_steps)
    tokens = [batch.ids.numel() for batch in data.prepared.batches]
    assert len(tokens) > 1
    assert how["seconds"]((1, 2, 3)) == pytest.approx(2 * sum(tokens) / sorted(tokens)[len(tokens) // 2])


def test_what_the_federation_asks_for_takes_memory(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight bytes more for each trained parameter under the proximal term, twelve under `[privacy]`."""
    monkeypatch.setattr(depth, "_held_bytes", lambda _device: 0)
    data, private = dataset(loaded), {"delta": 1e-5, "noise_multiplier": 1.0}

    def mib(**sections: Any) -> float:
        return measures(loaded, data, tiny.federation(**sections))["memory_mib"]((2, 3))

    plain = mib()
    trained = sum(parameter.numel() for parameter in train_only(loaded, (2, 3)).trained.values())
    held = mib(training={"proximal": 0.1})
    assert (held - plain) * MIB == pytest.approx(8 * trained, abs=2)
    assert (mib(privacy=private) - plain) * MIB == pytest.approx(12 * trained, abs=2)


def in_steps(*arguments: Any, **options: Any) -> TrainResult:
    """The training, by a clock that counts a second for each step."""
    result = train(*arguments, **options)
    return replace(result, metrics={**result.metrics, "seconds": result.metrics["steps"]})


def test_on_a_gpu_its_own_memory_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What tensors have taken there, whatever the process holds in the host's memory."""
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1000 + device.index)
    assert _held_bytes(Device(torch.device("cuda", 1))) == 1001
    assert _held_bytes(CPU) > 50 * MIB
