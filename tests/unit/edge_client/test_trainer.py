from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from edge_client import trainer
from edge_client.data import Note, Sentence
from edge_client.model import LoadedModel, apply_state, load_model, read_personal, read_trainable
from edge_client.trainer import (
    FINAL_RATE,
    _rate,
    evaluate,
    make_dataset,
    mean_loss,
    pull_back,
    round_section,
    round_seed,
    train,
)
from shared.config import TrainingSection
from shared.errors import RefusedError
from shared.tensorfile import F32Array
from tests.unit.edge_client import tiny

FEDERATION = tiny.federation()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with a tiny model of each type."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("models")
    return {model_type: tiny.save_model(root / model_type, model_type) for model_type in tiny.MODEL_TYPES}


@pytest.fixture
def llama(folders: dict[str, Path]) -> LoadedModel:
    """A tiny LLaMA that the test may change."""
    return load_model(folders["llama"], FEDERATION)


@pytest.mark.parametrize("model_type", tiny.MODEL_TYPES)
def test_training_changes_the_trainable_tensors_alone(folders: dict[str, Path], model_type: str) -> None:
    """After an update every trainable tensor has moved by its delta, and everything else is as it was."""
    loaded = load_model(folders[model_type], FEDERATION)
    before = {name: parameter.detach().clone() for name, parameter in loaded.model.named_parameters()}
    state = read_trainable(loaded)
    result = train(
        loaded, state, make_dataset(loaded, tiny.notes(2), batch_size=2, seed=0), FEDERATION.training, seed=1
    )
    after = dict(loaded.model.named_parameters())
    assert {name for name in before if not torch.equal(before[name], after[name])} == set(loaded.trainable)
    assert list(result.delta) == sorted(loaded.trainable)
    for name, delta in result.delta.items():
        assert delta.dtype == np.float32
        np.testing.assert_array_equal(delta, after[name].detach().numpy() - state[name])


def test_the_same_arguments_give_the_same_bits(llama: LoadedModel) -> None:
    """An update can be computed again bit for bit, whatever ran before it; another seed gives another one."""
    state, data = read_trainable(llama), make_dataset(llama, tiny.notes(), batch_size=4, seed=0)
    first = train(llama, state, data, FEDERATION.training, seed=1)
    torch.rand(5)
    other = train(llama, state, data, FEDERATION.training, seed=2)
    again = train(llama, state, data, FEDERATION.training, seed=1)
    assert all(np.array_equal(delta, again.delta[name]) for name, delta in first.delta.items())
    assert any(not np.array_equal(delta, other.delta[name]) for name, delta in first.delta.items())


def test_gradients_and_moments_are_gone_before_the_delta_is_made(llama: LoadedModel) -> None:
    """When the base is looked up for it, nothing of the optimizer's is left, though no garbage was collected."""
    state, data = read_trainable(llama), make_dataset(llama, tiny.notes(), batch_size=4, seed=0)
    optimizers: list[torch.optim.AdamW] = []
    looked_up = 0

    class Base(dict[str, F32Array]):
        def __getitem__(self, name: str) -> F32Array:
            nonlocal looked_up
            for optimizer in optimizers:
                assert not optimizer.state
                assert all(parameter.grad is None for parameter in llama.trained.values())
                looked_up += 1
            return super().__getitem__(name)

    def remembered(loaded: LoadedModel, section: TrainingSection) -> torch.optim.AdamW:
        optimizers.append(make_optimizer(loaded, section))
        return optimizers[-1]

    make_optimizer = trainer._optimizer
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(trainer, "_optimizer", remembered)
        train(llama, Base(state), data, FEDERATION.training, seed=1)
    assert looked_up == len(state)


def test_personal_tensors_are_trained_and_returned_whole(folders: dict[str, Path]) -> None:
    """The same training as without them, bit for bit; only that they come out as values and not in the delta."""
    plain = load_model(folders["llama"], FEDERATION)
    loaded = load_model(folders["llama"], tiny.federation(layers={"personal": ["score.*", "*.norm.weight"]}))
    begin = read_trainable(plain)
    results = [
        train(model, begin, make_dataset(model, tiny.notes(4), batch_size=4, seed=0), FEDERATION.training, seed=1)
        for model in (plain, loaded)
    ]
    assert results[0].personal == {}
    assert set(results[1].personal) == {"score.bias", "score.weight", "model.norm.weight"}
    for name, delta in results[0].delta.items():
        own = results[1].personal
        assert np.array_equal(own[name] - begin[name] if name in own else results[1].delta[name], delta), name
    assert set(results[1].delta) == set(begin) - set(results[1].personal)


def test_training_leaves_the_global_generator_alone(llama: LoadedModel) -> None:
    """A caller's own random numbers do not depend on whether an update was trained in between."""
    data = make_dataset(llama, tiny.notes(2), batch_size=4, seed=0)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(llama, read_trainable(llama), data, FEDERATION.training, seed=1)
    assert torch.equal(torch.rand(3), expected)


def test_it_learns(llama: LoadedModel) -> None:
    """Twelve epochs over notes whose words tell their labels lift held-out strict F1 far above the start."""
    data = make_dataset(llama, tiny.notes(16), batch_size=8, seed=0)
    held_out = make_dataset(llama, tiny.notes(4, seed=1), batch_size=8, seed=0)
    start = evaluate(llama, held_out)
    section = FEDERATION.training.model_copy(update={"epochs": 12, "lr": 1e-2})
    result = train(llama, read_trainable(llama), data, section, seed=1)
    end = evaluate(llama, held_out)
    assert start.overall["strict_f1"] < 0.3
    assert end.overall["strict_f1"] > 0.6
    assert end.overall["lenient_f1"] >= end.overall["strict_f1"]
    assert result.metrics["loss"] < 0.5


def test_what_an_update_says_of_itself(llama: LoadedModel) -> None:
    """Examples are lines with words; steps are batches times epochs; progress rises to 1."""
    data = make_dataset(llama, tiny.notes(6, lines=5), batch_size=4, seed=0)
    seen: list[tuple[float, float]] = []
    section = FEDERATION.training.model_copy(update={"epochs": 2})
    result = train(llama, read_trainable(llama), data, section, seed=1, progress=lambda *step: seen.append(step))
    steps = 2 * len(data.prepared.batches)
    assert result.examples == 30
    assert result.metrics["steps"] == steps == len(seen)
    assert [share for share, _ in seen] == pytest.approx([(index + 1) / steps for index in range(steps)])
    assert result.metrics["loss"] == pytest.approx(np.mean([loss for _, loss in seen[steps // 2 :]]))
    assert result.metrics["seconds"] > 0


def test_a_diverging_run_is_refused(llama: LoadedModel) -> None:
    """A loss that is no longer finite stops the update with a hint about the learning rate."""
    data = make_dataset(llama, tiny.notes(2), batch_size=4, seed=0)
    state = read_trainable(llama)
    state["score.bias"][0] = np.inf
    with pytest.raises(RefusedError) as caught:
        train(llama, state, data, FEDERATION.training, seed=1)
    assert caught.value.rule == "diverged"
    assert "training.lr" in caught.value.hint


def test_notes_without_words_cannot_be_trained_on(llama: LoadedModel) -> None:
    """A data set without a single word is refused, not merged with weight 0."""
    data = make_dataset(llama, [Note("empty", (Sentence((), ()),))], batch_size=4, seed=0)
    with pytest.raises(RefusedError) as caught:
        train(llama, read_trainable(llama), data, FEDERATION.training, seed=1)
    assert caught.value.rule == "note-missing"


def test_batches_hold_windows_of_like_length(llama: LoadedModel) -> None:
    """Sorting by length leaves little padding, and each window is in one batch."""
    data = make_dataset(llama, tiny.notes(20, lines=3), batch_size=4, seed=0)
    windows = [window for batch in data.prepared.batches for window in batch.windows]
    tokens = sum(len(window.ids) for window in windows)
    assert tokens / sum(batch.ids.numel() for batch in data.prepared.batches) > 0.9
    units = np.concatenate([window.units for window in windows])
    assert sorted(units.tolist()) == list(range(llama.task.units(data.notes)))


def test_the_rate_rises_then_falls() -> None:
    """The rate starts above 0, peaks after the warm-up, and ends near its final share."""
    rates = [_rate(step, 100, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[-1] == pytest.approx(FINAL_RATE, abs=0.02)
    assert all(0 < rate <= 1 for rate in rates)
    assert [_rate(step, 1, 0.0) for step in range(2)] == pytest.approx([1.0, FINAL_RATE])


def test_the_seed_of_a_round() -> None:
    """Seed, site and version each change the seed of an update; nothing else does."""
    seeds = {round_seed(*of) for of in ((0, "a", 1), (1, "a", 1), (0, "b", 1), (0, "a", 2))}
    assert len(seeds) == 4
    assert round_seed(0, "a", 1) in seeds
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_the_rate_falls_evenly_from_version_to_version() -> None:
    """By hand: 0.4 at version 0 falls to a fifth of it at version 4 of 5, and no further for a late one."""
    section = TrainingSection(lr=0.4, final_lr=0.2)
    rates = [round_section(section, version, 5).lr for version in (0, 1, 2, 3, 4, 9)]
    assert rates == pytest.approx([0.4, 0.32, 0.24, 0.16, 0.08, 0.08])
    assert round_section(section, 0, 1).lr == pytest.approx(0.4)


def test_the_proximal_term_s_gradient() -> None:
    """By hand, mu 0.5: w 3 and -1 that started at 1 and 1, gradients 0.25 and 2, become 0.25 + 0.5 x 2 and 2 - 0.5 x 2.

    So it is the gradient of mu / 2 ||w - w_t||^2 as torch derives it.
    """
    weights, start = torch.nn.Parameter(torch.tensor([3.0, -1.0])), torch.tensor([1.0, 1.0])
    weights.grad = torch.tensor([0.25, 2.0])
    pull_back([weights], [start], 0.5)
    assert weights.grad.tolist() == [1.25, 1.0]
    weights.grad = torch.tensor([0.25, 2.0])
    (0.25 * (weights - start).square().sum()).backward()  # type: ignore[no-untyped-call]
    assert weights.grad.tolist() == [1.25, 1.0]
    pull_back([weights], [], 0.0)
    assert weights.grad.tolist() == [1.25, 1.0]


def test_a_proximal_term_keeps_an_update_near_its_start(folders: dict[str, Path]) -> None:
    """The first step does not know it; the more it weighs, the shorter the delta; what stays at the site is free."""
    loaded = load_model(folders["llama"], tiny.federation(layers={"personal": ["score.*"]}))
    state, data = start_of(loaded), make_dataset(loaded, tiny.notes(8), batch_size=4, seed=0)
    results = [
        train(loaded, state, data, FEDERATION.training.model_copy(update={"epochs": 4, "proximal": mu}), seed=1)
        for mu in (0.0, 0.3, 30.0)
    ]
    lengths = [sum(float(np.square(delta).sum()) for delta in result.delta.values()) ** 0.5 for result in results]
    assert lengths[0] > lengths[1] > lengths[2]
    heads = [np.abs(result.personal["score.weight"] - state["score.weight"]).max() for result in results]
    assert heads[2] > 0.3 * heads[0]
    one = make_dataset(loaded, tiny.notes(1), batch_size=64, seed=0)
    free, bound = (
        train(loaded, state, one, FEDERATION.training.model_copy(update={"proximal": mu}), seed=1).delta
        for mu in (0.0, 30.0)
    )
    assert len(one.prepared.batches) == 1
    assert all(np.array_equal(free[name], bound[name]) for name in free)


def start_of(loaded: LoadedModel) -> dict[str, np.ndarray]:
    """Version 0 with what stays."""
    return read_trainable(loaded) | read_personal(loaded)


def test_the_mean_loss_is_over_all_targets_and_not_over_batches(llama: LoadedModel) -> None:
    """Whatever the batches, it is the cross-entropy of each labelled token once; no weight moves."""
    notes = tiny.notes(5)
    before = read_trainable(llama)
    losses = [mean_loss(llama, make_dataset(llama, notes, batch_size=size, seed=size)) for size in (1, 3, 100)]
    (whole,) = make_dataset(llama, notes, batch_size=100, seed=0).prepared.batches
    with torch.no_grad():
        logits = llama.model(input_ids=whole.ids, attention_mask=whole.mask).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), whole.targets.flatten()).item()
    assert losses == pytest.approx([expected] * 3, rel=1e-5)
    assert all(np.array_equal(before[name], values) for name, values in read_trainable(llama).items())


def test_the_mean_loss_of_a_broken_model_is_told(llama: LoadedModel) -> None:
    """Weights that overflow give a loss that is no number or infinite, and no error."""
    state = {name: np.full_like(values, 1e19) for name, values in read_trainable(llama).items()}
    apply_state(llama, state)
    assert not math.isfinite(mean_loss(llama, make_dataset(llama, tiny.notes(2), batch_size=4, seed=0)))


def test_there_is_no_mean_loss_of_nothing(llama: LoadedModel) -> None:
    """Notes without anything to predict are refused, by name."""
    with pytest.raises(RefusedError) as caught:
        mean_loss(llama, make_dataset(llama, (), batch_size=4, seed=0))
    assert caught.value.rule == "note-missing"
