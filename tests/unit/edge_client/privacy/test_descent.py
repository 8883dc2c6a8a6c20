"""Gradients of DP-SGD, held to those computed one by one, to Opacus, and to their bounds."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import structlog
import torch
from opacus.grad_sample.utils import prepare_module
from opacus.optimizers import DPOptimizer

from edge_client.data import Note, Sentence
from edge_client.model import LoadedModel, load_model, read_trainable
from edge_client.prefix import forward_pass, prepare
from edge_client.prefix_store import NOWHERE
from edge_client.privacy import chance
from edge_client.privacy import descent as module
from edge_client.privacy.descent import RecordGradient, add_clipped, make_private, private_descent, record_gradient
from edge_client.privacy.ledger import Charge
from edge_client.privacy.records import Records, make_records
from edge_client.trainer import Descent, evaluate, make_dataset, make_window_batches, train
from shared.config import PrivacySection
from shared.errors import RefusedError
from tests.unit.edge_client import tiny

SECTION = PrivacySection(delta=1e-3, noise_multiplier=1.0)
PRIVATE = tiny.federation(privacy=SECTION.model_dump())
CHARGE = Charge(sample_rate=0.5, noise_multiplier=1.0, steps=4)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with a tiny model of each type."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("models")
    return {model_type: tiny.save_model(root / model_type, model_type) for model_type in tiny.MODEL_TYPES}


@pytest.fixture
def llama(folders: dict[str, Path]) -> LoadedModel:
    """A tiny LLaMA that the test may change."""
    return load_model(folders["llama"], PRIVATE)


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The key of the secret stream is one that we know: the same draws each time, for what most draws have in common.

    Of keys drawn anew one in ten million strays further than the bounds below.
    """
    monkeypatch.setattr(chance, "os", SimpleNamespace(urandom=bytes))


def gradients(loaded: LoadedModel, records: Records) -> list[RecordGradient]:
    """That of each record, by the code under test."""
    batches = records.data.prepared.batches
    with forward_pass(loaded, records.data.prepared) as forward:
        return [record_gradient(loaded, forward, [batches[place] for place in span]) for span in records.spans]


def one_by_one(loaded: LoadedModel, note: Note) -> list[torch.Tensor]:
    """The same by hand: the whole model on one window after the other, none padded, and the sum."""
    parameters = list(loaded.trainable.values())
    total = [torch.zeros_like(parameter) for parameter in parameters]
    for batch in make_window_batches(loaded, [note], size=1, seed=0):
        logits = loaded.model(input_ids=batch.ids).logits
        found = torch.autograd.grad(loaded.task.loss(logits, batch.targets), parameters)
        total = [before + each for before, each in zip(total, found, strict=True)]
    return total


def norm_of(tensors: Any) -> float:
    """L2 norm over all tensors, in double precision."""
    return float(np.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors)))


@pytest.mark.parametrize("plan", ["top:2", "all"])
@pytest.mark.parametrize("model_type", tiny.MODEL_TYPES)
def test_a_record_asks_for_the_sum_of_its_windows(folders: dict[str, Path], model_type: str, plan: str) -> None:
    """In every model, with the frozen prefix and without: as computed window by window, each alone."""
    loaded = load_model(folders[model_type], tiny.federation(layers={"plan": plan}))
    notes = tiny.notes(3, lines=8)
    records = make_records(loaded, notes)
    assert records.data.prepared.cached == (plan != "all")
    assert all(sum(len(records.data.prepared.batches[place].windows) for place in span) > 1 for span in records.spans)
    for note, found in zip(notes, gradients(loaded, records), strict=True):
        for tensor, by_hand in zip(found.tensors, one_by_one(loaded, note), strict=True):
            torch.testing.assert_close(tensor, by_hand, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Full backward hook")
@pytest.mark.parametrize("model_type", ["llama", "bert"])
def test_opacus_finds_the_same(folders: dict[str, Path], model_type: str) -> None:
    """Its hooks give each window's gradient; summed by record, and clipped by its optimizer, they are ours."""
    loaded = load_model(folders[model_type], PRIVATE)
    notes = tiny.notes(4, lines=8)
    ours = gradients(loaded, make_records(loaded, notes))
    batches = [make_window_batches(loaded, [note], size=99, seed=0)[0] for note in notes]
    parameters = list(loaded.trainable.values())
    hooks = prepare_module(loaded.model, "hooks", wrap_model=False, loss_reduction="sum", strict=False)
    for part in loaded.model.modules():  # Opacus looks at what is in training mode alone
        part.training = any(parameter.requires_grad for parameter in part.parameters(recurse=False))
    found: list[list[torch.Tensor]] = []
    with forward_pass(loaded, prepare(loaded, batches, NOWHERE)) as forward:
        for batch in batches:
            rows = zip(torch.split(forward(batch), 1), torch.split(batch.targets, 1), strict=True)
            torch.stack([loaded.task.loss(*row) for row in rows]).sum().backward()  # type: ignore[no-untyped-call]
            found.append([parameter.grad_sample.sum(0) for parameter in parameters])  # type: ignore[attr-defined]
            for parameter in parameters:
                parameter.grad = parameter.grad_sample = None  # type: ignore[attr-defined]
    hooks.cleanup()
    for record, theirs in zip(ours, found, strict=True):
        for tensor, by_opacus in zip(record.tensors, theirs, strict=True):
            torch.testing.assert_close(tensor, by_opacus, rtol=1e-4, atol=1e-6)

    bound = sorted(norm_of(record) for record in found)[1]  # some are clipped, some are not
    sums = [torch.zeros_like(parameter) for parameter in parameters]
    for record in ours:
        add_clipped(sums, record, bound)
    for index, parameter in enumerate(parameters):
        parameter.grad_sample = torch.stack([record[index] for record in found])  # type: ignore[attr-defined]
    optimizer = DPOptimizer(
        torch.optim.SGD(parameters), noise_multiplier=0.0, max_grad_norm=bound, expected_batch_size=2
    )
    optimizer.pre_step()
    for parameter, total in zip(parameters, sums, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(total / 2, parameter.grad, rtol=1e-4, atol=1e-6)


def test_no_record_moves_the_sum_by_more_than_the_bound(llama: LoadedModel) -> None:
    """Each one, clipped: its norm is at most the bound, its direction as it was; a short one stays as it is."""
    found = gradients(llama, make_records(llama, tiny.notes(8, lines=9)))
    for bound in (0.01, 1.0, 1e3):
        for record in found:
            sums = [torch.zeros_like(tensor) for tensor in record.tensors]
            assert add_clipped(sums, record, bound) == record.loss
            assert norm_of(sums) <= bound
            factor = min(1.0, bound / norm_of(record.tensors))
            for total, tensor in zip(sums, record.tensors, strict=True):
                torch.testing.assert_close(total, factor * tensor, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_a_gradient_without_a_norm_adds_nothing(bad: float) -> None:
    """NaN, infinity and what float32 cannot scale down soundly; a huge one that it can is clipped."""
    sums = [torch.zeros(2), torch.zeros(3)]
    assert add_clipped(sums, RecordGradient((torch.tensor([bad, 0.0]), torch.full((3,), bad)), 5.0), 1.0) == 0.0
    assert norm_of(sums) == 0.0
    assert add_clipped(sums, RecordGradient((torch.tensor([0.0, -4e29]), torch.full((3,), 4e29)), 5.0), 1.0) == 5.0
    assert norm_of(sums) == pytest.approx(1.0, rel=1e-5)
    assert norm_of(sums) <= 1.0


def test_a_record_whose_loss_is_not_finite_adds_nothing() -> None:
    """Its gradient may look sound all the same."""
    sums = [torch.zeros(2)]
    assert add_clipped(sums, RecordGradient((torch.ones(2),), float("inf")), 1.0) == 0.0
    assert norm_of(sums) == 0.0


@pytest.mark.usefixtures("known")
def test_a_step_may_draw_nobody(llama: LoadedModel) -> None:
    """Then it is noise alone: of the promised strength, over the records expected, and no loss."""
    records = make_records(llama, tiny.notes(3))
    charge = Charge(sample_rate=1e-9, noise_multiplier=3.0, steps=1)
    descent = private_descent(llama, records, charge, 0.5)
    with forward_pass(llama, records.data.prepared) as forward:
        assert descent.gradient(forward, 0) == 0.0
    drawn = torch.cat(
        [parameter.grad.flatten() for parameter in llama.trainable.values() if parameter.grad is not None]
    )
    scaled = drawn.double().numpy() * (1e-9 * 3) / (3.0 * 0.5)
    assert len(scaled) == llama.trained_parameters > 3000
    assert abs(scaled.mean()) < 6 / np.sqrt(len(scaled))
    assert abs(scaled.std() - 1) < 6 / np.sqrt(2 * len(scaled))


@pytest.mark.usefixtures("known")
def test_records_are_drawn_by_themselves(llama: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in its share of the steps, steps of different sizes: Poisson sampling, no permutation."""
    records = make_records(llama, tiny.notes(20, lines=1))
    drawn: list[list[int]] = []
    place = {id(batch): index for index, batch in enumerate(records.data.prepared.batches)}
    nothing = RecordGradient(tuple(torch.zeros_like(each) for each in llama.trainable.values()), 0.0)

    def noted(_loaded: object, _forward: object, batches: list[object]) -> RecordGradient:
        drawn[-1] += [place[id(batch)] for batch in batches]
        return nothing

    monkeypatch.setattr(module, "record_gradient", noted)
    charge = Charge(sample_rate=0.3, noise_multiplier=1.0, steps=400)
    descent = private_descent(llama, records, charge, 1.0)
    for step in range(400):
        drawn.append([])
        descent.gradient(lambda _batch: torch.zeros(1), step)
    counts = Counter(record for step in drawn for record in step)
    assert all(abs(counts[record] - 120) < 6 * np.sqrt(400 * 0.3 * 0.7) for record in range(20))
    assert all(len(step) == len(set(step)) for step in drawn)
    assert abs(np.var([len(step) for step in drawn]) - 20 * 0.3 * 0.7) < 6 * 4.2 * np.sqrt(2 / 400)


def trained(loaded: LoadedModel, records: Records, **changes: Any) -> dict[str, Any]:
    """The delta of a private training, always of the same seed."""
    section = PRIVATE.training.model_copy(update=changes)
    descent = private_descent(loaded, records, CHARGE, 1.0)
    state = {name: values.copy() for name, values in read_trainable(loaded).items()}
    return dict(train(loaded, state, records.data, section, seed=1, descent=descent).delta)


def test_the_same_arguments_give_another_update(folders: dict[str, Path]) -> None:
    """Everything that others know is the same twice, and no tensor comes out the same."""
    runs = []
    for _ in range(2):
        loaded = load_model(folders["llama"], PRIVATE)
        torch.manual_seed(3)
        runs.append(trained(loaded, make_records(loaded, tiny.notes(4))))
    assert all(not np.array_equal(first, runs[1][name]) for name, first in runs[0].items())


@pytest.mark.usefixtures("known")
def test_it_learns_with_little_noise(llama: LoadedModel) -> None:
    """Clipping by record and Poisson sampling alone do not keep it from learning what the plain trainer learns."""
    records = make_records(llama, tiny.notes(16))
    held_out = make_dataset(llama, tiny.notes(4, seed=1), batch_size=8, seed=0)
    charge = Charge(sample_rate=0.25, noise_multiplier=0.05, steps=60)
    section = PRIVATE.training.model_copy(update={"lr": 1e-2})
    descent = private_descent(llama, records, charge, 1.0)
    result = train(llama, read_trainable(llama), records.data, section, seed=1, descent=descent)
    assert evaluate(llama, held_out).main > 0.5
    assert result.examples == 16
    assert result.metrics["steps"] == 60


def test_a_state_that_is_not_finite_ends_as_diverged(llama: LoadedModel) -> None:
    """No record moves anything then, and the update, which is no number, is refused."""
    records, state = make_records(llama, tiny.notes(2)), read_trainable(llama)
    state["score.bias"][0] = np.inf
    descent = private_descent(llama, records, CHARGE, 1.0)
    with pytest.raises(RefusedError) as caught:
        train(llama, state, records.data, PRIVATE.training, seed=1, descent=descent)
    assert caught.value.rule == "diverged"


def test_what_a_federation_trains_on(llama: LoadedModel) -> None:
    """By hand: 4 of 10 records, ten steps for four epochs, the noise as written; the log says so."""
    section = PrivacySection(delta=1e-3, noise_multiplier=2.0, clip_norm=0.7)
    federation = tiny.federation(privacy=section.model_dump(), training={"batch_size": 4, "epochs": 4})
    with structlog.testing.capture_logs() as logs:
        private = make_private(llama, tiny.notes(10), federation, section)
    (line,) = logs
    assert (line["event"], line["records"], line["noise_multiplier"]) == ("private", 10, 2.0)
    assert private.charge == Charge(sample_rate=0.4, noise_multiplier=2.0, steps=10)
    descent = private.descent(llama)
    assert isinstance(descent, Descent)
    assert (descent.steps, descent.epoch) == (10, 3)


def test_a_delta_that_promises_nothing_is_told(llama: LoadedModel) -> None:
    """One over the number of records, or more: a line in the log."""
    section = PrivacySection(delta=0.01, noise_multiplier=1.0)
    told = []
    for count in (3, 100):
        with structlog.testing.capture_logs() as logs:
            make_private(llama, tiny.notes(count, lines=1), PRIVATE, section)
        told.append([entry["event"] for entry in logs if entry["log_level"] == "warning"])
    assert told == [[], ["delta-is-large"]]


def test_notes_without_words_cannot_be_trained_on(llama: LoadedModel) -> None:
    """Noise alone is no update."""
    with pytest.raises(RefusedError) as caught:
        make_private(llama, [Note("empty", (Sentence((), ()),))], PRIVATE, SECTION)
    assert caught.value.rule == "note-missing"
