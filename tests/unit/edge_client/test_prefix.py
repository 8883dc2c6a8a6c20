from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edge_client.model import LoadedModel, load_model, read_trainable
from edge_client.prefix import forward_pass, prepare
from edge_client.prefix_store import InMemory
from edge_client.trainer import Dataset, make_dataset, train
from tests.unit.edge_client import tiny

FEDERATION = tiny.federation(training={"epochs": 2})


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with a tiny model of each type."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("models")
    return {model_type: tiny.save_model(root / model_type, model_type) for model_type in tiny.MODEL_TYPES}


def dataset(loaded: LoadedModel, limit_bytes: int = 1 << 20) -> Dataset:
    """A few notes, prepared for a model."""
    return make_dataset(loaded, tiny.notes(4), batch_size=4, seed=3, keep=InMemory(limit_bytes))


def plain(data: Dataset) -> Dataset:
    """The same batches without their kept states."""
    return replace(data, prepared=replace(data.prepared, reason="asked for"))


@pytest.mark.parametrize("model_type", tiny.MODEL_TYPES)
@pytest.mark.parametrize("layers", ["top:2", "1,3"])
def test_the_cached_path_is_the_plain_one_bit_for_bit(folders: dict[str, Path], model_type: str, layers: str) -> None:
    """Training from kept states gives exactly the deltas and losses of training through the whole model."""
    loaded = load_model(folders[model_type], tiny.federation(layers={"plan": layers}))
    state, data = read_trainable(loaded), dataset(loaded)
    assert data.prepared.cached, data.prepared.reason
    losses: list[float] = []
    cached, whole = (
        train(loaded, state, path, FEDERATION.training, seed=5, progress=lambda _, loss: losses.append(loss))
        for path in (data, plain(data))
    )
    steps = len(losses) // 2
    assert losses[:steps] == losses[steps:]
    assert all(np.array_equal(delta, whole.delta[name]) for name, delta in cached.delta.items())
    assert any(delta.any() for delta in cached.delta.values())


@pytest.mark.parametrize("model_type", ["bert", "llama"])
def test_padding_changes_nothing(folders: dict[str, Path], model_type: str) -> None:
    """A window's logits do not depend on how far its batch is padded."""
    loaded = load_model(folders[model_type], FEDERATION)
    data = dataset(loaded)
    batch = next(batch for batch in data.prepared.batches if len({len(window.ids) for window in batch.windows}) > 1)
    short = batch.windows[0]
    with torch.no_grad(), forward_pass(loaded, data.prepared) as forward:
        padded = forward(batch)[0, : len(short.ids)]
        alone = loaded_logits(loaded, short.ids)
    assert len(short.ids) < batch.ids.shape[1]
    torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-5)


def loaded_logits(loaded: LoadedModel, ids: np.ndarray) -> torch.Tensor:
    """The whole model's logits of one window, through a fresh copy of the model."""
    federation = tiny.federation()
    fresh = load_model(loaded.model.config.name_or_path, federation)
    logits: torch.Tensor = fresh.model(input_ids=torch.from_numpy(ids)[None]).logits[0]
    return logits


def test_the_frozen_blocks_come_back(folders: dict[str, Path]) -> None:
    """After a pass the model is whole again, also when the pass failed."""
    loaded = load_model(folders["llama"], FEDERATION)
    names = [name for name, _ in loaded.model.named_parameters()]
    data = dataset(loaded)

    def fail() -> None:
        with forward_pass(loaded, data.prepared):
            assert [name for name, _ in loaded.model.named_parameters()] != names
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [name for name, _ in loaded.model.named_parameters()] == names
    assert not loaded.model.model.layers[2]._forward_pre_hooks


@pytest.mark.parametrize(
    ("plan", "limit_bytes", "reason"),
    [
        ("all", 1 << 20, "the embeddings are trained"),
        ("0,3", 1 << 20, "block 0 is trained"),
        ("top:4", 1 << 20, "block 0 is trained"),
        ("top:2", 1000, "more than 0 MiB"),
    ],
)
def test_what_cannot_be_kept_is_said(folders: dict[str, Path], plan: str, limit_bytes: int, reason: str) -> None:
    """Where the states cannot be kept, training runs the whole model, and the reason is known."""
    loaded = load_model(folders["llama"], tiny.federation(layers={"plan": plan}))
    data = dataset(loaded, limit_bytes)
    assert not data.prepared.cached
    assert reason in data.prepared.reason
    assert train(loaded, read_trainable(loaded), data, FEDERATION.training, seed=1).delta


class Reading(nn.Module):
    """A block that also reads something that the kept states do not hold."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.calls = 0

    def forward(self, hidden: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        """Add the number of calls so far."""
        self.calls += 1
        out: torch.Tensor = self.block(hidden, *args, **kwargs)
        return out + self.calls


def test_a_model_that_disagrees_is_found_out(folders: dict[str, Path]) -> None:
    """When kept states do not give the whole model's logits, they are not used."""
    loaded = load_model(folders["llama"], FEDERATION)
    blocks = loaded.model.model.layers
    blocks[0] = Reading(blocks[0])
    prepared = prepare(loaded, dataset(load_model(folders["llama"], FEDERATION)).prepared.batches)
    assert prepared.reason == "the logits computed from kept states differ from the whole model's"
    assert blocks[0].calls > 0
