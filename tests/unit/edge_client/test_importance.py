"""What a block matters to a site's notes: the formulas by hand, and measured on a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

from edge_client.importance import _score, measure
from edge_client.model import LoadedModel, load_model, read_trainable, train_only
from edge_client.trainer import Dataset, make_dataset
from shared.config import ImportanceName
from tests.unit.edge_client import tiny

FEDERATION = tiny.federation(layers={"plan": "importance:2", "among": "top:3"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaMA of four blocks."""
    torch.set_num_threads(1)
    return tiny.save_model(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture
def loaded(folder: Path) -> LoadedModel:
    """The same, with its upper three blocks as candidates."""
    return load_model(folder, FEDERATION)


def dataset(loaded: LoadedModel, batch_size: int = 4) -> Dataset:
    """A few notes, prepared for a model."""
    return make_dataset(loaded, tiny.notes(6), batch_size=batch_size, seed=0)


@pytest.mark.parametrize(
    ("by", "expected"),
    [
        # Gradients (3, 1) and (1, 1) of two batches: their mean (2, 1) has the square 5.
        ("gradient-norm", 5.0),
        # The parameters (2, 4) have the square 20.
        ("relative-gradient-norm", 0.25),
        # Variances 2 and 0, of n - 1.
        ("snr", 2.5),
    ],
)
def test_the_formulas_by_hand(by: ImportanceName, expected: float) -> None:
    """One block of one tensor, two batches."""
    weights, sums, squares = ({"w": torch.tensor(values)} for values in ([2.0, 4.0], [4.0, 2.0], [10.0, 2.0]))
    assert _score(weights, sums, squares, ["w"], 2, by) == pytest.approx(expected)


def test_gradients_that_all_agree_are_no_reason_to_prefer_a_block() -> None:
    """Without any variance, as in a single batch, the ratio is large, finite and the same for every block."""
    scores = []
    for gradient in (0.3, 7.0):
        sums, squares = {"w": torch.tensor([gradient])}, {"w": torch.tensor([gradient**2])}
        scores.append(_score({"w": torch.ones(1)}, sums, squares, ["w"], 1, "snr"))
    assert scores[0] == pytest.approx(scores[1])
    assert np.isfinite(scores[0])
    nothing = {"w": torch.zeros(1)}
    assert [_score(nothing, nothing, nothing, ["w"], 1, by) for by in get_args(ImportanceName)] == [0.0, 0.0, 0.0]


def test_a_norm_is_that_of_the_gradient(loaded: LoadedModel) -> None:
    """With one batch the score of a block is the square of the gradient that backward leaves in its parameters."""
    data = dataset(loaded, batch_size=64)
    (batch,) = data.prepared.batches
    scores = measure(loaded, data.prepared, "gradient-norm", seed=0)
    assert set(scores) == {1, 2, 3}
    train_only(loaded, (1, 2, 3))
    loaded.task.loss(loaded.model(input_ids=batch.ids, use_cache=False).logits, batch.targets).backward()  # type: ignore[no-untyped-call]
    for block, score in scores.items():
        parts = [p.grad for name, p in loaded.trainable.items() if f".layers.{block}." in name and p.grad is not None]
        assert score == pytest.approx(sum(part.square().sum().item() for part in parts), rel=1e-4)


@pytest.mark.parametrize("by", get_args(ImportanceName))
def test_measuring_changes_nothing_and_is_repeatable(loaded: LoadedModel, by: ImportanceName) -> None:
    """The same arguments give the same scores, whatever is trained here now; weights stay as they are."""
    data, before = dataset(loaded), read_trainable(loaded)
    first = measure(loaded, data.prepared, by, seed=3)
    again = measure(train_only(loaded, (3,)), data.prepared, by, seed=3)
    assert first == again
    assert all(score > 0 for score in first.values())
    assert all(np.array_equal(values, before[name]) for name, values in read_trainable(loaded).items())
    assert all(parameter.grad is None for parameter in loaded.model.parameters())
