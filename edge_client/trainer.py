"""Local training of one update, and evaluation: from a published state to a delta."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edge_client.batches import Batch, make_batches
from edge_client.data import AnyNote
from edge_client.model import LoadedModel, State, apply_state, read_personal
from edge_client.prefix import MEMORY, Forward, Prepared, forward_pass, prepare
from edge_client.prefix_store import Keep
from edge_client.tasks import IGNORED, Ids, Scores, Window
from shared.config import TrainingSection
from shared.errors import ConfigError, RefusedError

Progress = Callable[[float, float], None]
"""Called after each step with the share done (0 to 1) and the step's loss."""

EVALUATION_BATCH = 16
"""Windows scored at once: no gradients are kept, so more fit than in training."""

FINAL_RATE = 0.1
"""The learning rate falls linearly to this share of its peak over one update."""


@dataclass(frozen=True, slots=True)
class Dataset:
    """Notes and what they became for one model."""

    notes: tuple[AnyNote, ...] = field(repr=False)
    prepared: Prepared = field(repr=False)
    examples: int


@dataclass(frozen=True, slots=True)
class TrainResult:
    """One update before it is sealed."""

    delta: State = field(repr=False)
    """Local minus published, float32, of what travels and is trained here."""
    personal: State = field(repr=False)
    """What stays, as it was trained."""
    examples: int
    metrics: dict[str, float]
    """`loss` (mean of the last epoch), `steps`, `seconds`."""


@dataclass(frozen=True, slots=True)
class Descent:
    """Where the gradients of an update come from."""

    steps: int
    epoch: int
    """Steps of the last epoch, whose mean loss is told."""
    gradient: Callable[[Forward, int], float]
    """Leaves the gradient of a step (counted from 0) in `.grad` of the trained parameters; returns the step's loss."""


def make_dataset(
    loaded: LoadedModel, notes: Sequence[AnyNote], *, batch_size: int, seed: int, keep: Keep = MEMORY
) -> Dataset:
    """Return `notes` as batches for `loaded`, with the frozen prefix computed and put into `keep` where it can be."""
    batches = make_window_batches(loaded, notes, size=batch_size, seed=seed)
    prepared = prepare(loaded, batches, keep)
    return Dataset(tuple(notes), prepared, loaded.task.examples(notes))


def make_window_batches(loaded: LoadedModel, notes: Sequence[AnyNote], *, size: int, seed: int) -> tuple[Batch, ...]:
    """Return the windows of `notes` in batches of at most `size`; ConfigError when the model lacks one of their ids."""
    windows = list(loaded.task.windows(notes, loaded.encoder))
    _check_ids(loaded, windows)
    return make_batches(
        windows,
        size=size,
        pad_id=loaded.pad_id,
        causal=loaded.family.causal,
        per_token=loaded.task.head.per_token,
        seed=seed,
    )


def round_seed(federation_seed: int, site: str, base_version: int) -> int:
    """Return a seed, 0 to 2^63 - 1, that is the same whenever this site trains from this version again."""
    digest = hashlib.sha256(f"{federation_seed}\n{site}\n{base_version}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def round_section(section: TrainingSection, base_version: int, versions: int) -> TrainingSection:
    """Return `section` with the rate for an update of `base_version` in a run of `versions` versions.

    lr_v = lr (1 - (1 - final_lr) v / (versions - 1)). Without a falling rate FedAvg stays a distance from the optimum
    that grows with the rate and with how much sites differ (Li et al., arXiv 1907.02189, theorem 4).
    """
    share = min(1.0, base_version / max(1, versions - 1))
    return section.model_copy(update={"lr": section.lr * (1 - (1 - section.final_lr) * share)})


def train(
    loaded: LoadedModel,
    state: Mapping[str, np.ndarray],
    data: Dataset,
    section: TrainingSection,
    *,
    seed: int,
    descent: Descent | None = None,
    progress: Progress = lambda _share, _loss: None,
) -> TrainResult:
    """Train from `state`, which holds the personal tensors too, on `data`, and return what changed.

    A fresh AdamW (Loshchilov and Hutter, 2019) for each update: its moments belong to a trajectory that the merge has
    left. With `section.proximal` what travels is held to where it started, see `pull_back`; the loss that is told is
    that of the notes alone. Without a `descent` of its own it takes the batches of `data` in turn, and the same
    arguments give the same bits. Afterwards the model holds the local weights. Raises RefusedError(rule='diverged')
    when loss or weights are not finite, and that of `apply_state`.
    """
    started = time.perf_counter()
    apply_state(loaded, state)
    descent = descent or _batch_by_batch(loaded, data, section, seed)
    steps = descent.steps
    if steps == 0:
        raise RefusedError("the notes hold nothing to train on", rule="note-missing", hint="check the notes' folder")
    losses = _descend(loaded, data, section, descent, seed, progress)
    loaded.model.eval()
    personal = read_personal(loaded)
    if not all(parameter.isfinite().all() for parameter in loaded.trained.values()):
        raise _diverged("a weight")
    trained = ((name, parameter) for name, parameter in loaded.trained.items() if name in loaded.trainable)
    delta = {name: parameter.detach().cpu().numpy() - state[name] for name, parameter in trained}
    last = losses[-descent.epoch :]
    seconds = round(time.perf_counter() - started, 3)
    metrics = {"loss": sum(last) / len(last), "steps": float(steps), "seconds": seconds}
    return TrainResult(delta, personal, data.examples, metrics)


def _descend(
    loaded: LoadedModel, data: Dataset, section: TrainingSection, descent: Descent, seed: int, progress: Progress
) -> list[float]:
    """Take all steps and return the loss of each; gradients and moments are gone before the delta is made."""
    optimizer, steps = _optimizer(loaded, section), descent.steps
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps, section.warmup))
    losses: list[float] = []
    held = [parameter for name, parameter in loaded.trained.items() if name in loaded.trainable]
    start = [parameter.detach().clone() for parameter in held] if section.proximal else []
    # Dropout draws from torch's own generator.
    with loaded.device.seeded(seed), forward_pass(loaded, data.prepared) as forward:
        _training_mode(loaded)
        for step in range(steps):
            losses.append(descent.gradient(forward, step))
            pull_back(held, start, section.proximal)
            optimizer.step()
            schedule.step()
            progress(len(losses) / steps, losses[-1])
    optimizer.zero_grad()
    optimizer.state.clear()  # it and its schedule know one another, and would stay until the garbage is collected
    return losses


def evaluate(loaded: LoadedModel, data: Dataset) -> Scores:
    """Score the model as it is on `data`."""
    return loaded.task.score(data.notes, predict(loaded, data))


@torch.no_grad()
def predict(loaded: LoadedModel, data: Dataset) -> npt.NDArray[Any]:
    """Return what the model as it is says of each unit of `data`, one row a unit, as the task's `decide` gives them.

    A unit in no window (a word without tokens, say) is predicted as zero.
    """
    loaded.model.eval()
    task = loaded.task
    if task.head.writes:
        with loaded.weights.whole(loaded.model):
            return _written(loaded, data)
    found = [task.decide(torch.empty((0, len(task.classes))))]
    units: list[Ids] = [np.empty(0, dtype=np.int64)]
    with forward_pass(loaded, data.prepared) as forward:
        for batch in data.prepared.batches:
            found.append(task.decide(_speaking(forward(batch).cpu(), batch, per_token=task.head.per_token)))
            units += [window.units for window in batch.windows]
    rows = np.concatenate(found)
    predictions = np.zeros((task.units(data.notes), *rows.shape[1:]), dtype=rows.dtype)
    predictions[np.concatenate(units)] = rows
    return predictions


@torch.no_grad()
def mean_loss(loaded: LoadedModel, data: Dataset) -> float:
    """Return the mean loss of the model as it is over all targets of `data`; it may be infinite, or no number.

    Raises RefusedError(rule='note-missing') when there are none.
    """
    loaded.model.eval()
    total, targets = 0.0, 0
    with forward_pass(loaded, data.prepared) as forward:
        for batch in data.prepared.batches:
            count = int((batch.targets != IGNORED).sum()) if loaded.task.head.per_token else len(batch.windows)
            if count:
                total += count * loaded.loss(forward(batch), batch.targets).item()
                targets += count
    if not targets:
        raise RefusedError("the notes hold nothing to measure a loss on", rule="note-missing", hint="annotate them")
    return total / targets


def _written(loaded: LoadedModel, data: Dataset) -> npt.NDArray[Any]:
    """What the task reads from the model's answers, one for each unit; zero for a unit in no window.

    Greedy, so that the same model gives the same answers, and at most to the window's length.
    """
    task = loaded.task
    answers = np.zeros(task.units(data.notes), dtype=object)
    for batch in data.prepared.batches:
        prompts = [window.ids[: int(window.positions[0])] for window in batch.windows]
        begin = max(len(prompt) for prompt in prompts)
        ids = np.full((len(prompts), begin), loaded.pad_id, dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, begin - len(prompt) :], mask[row, begin - len(prompt) :] = prompt, 1
        with loaded.device.computing():
            written = loaded.model.generate(
                input_ids=loaded.device.take(torch.from_numpy(ids)),
                attention_mask=loaded.device.take(torch.from_numpy(mask)),
                do_sample=False,
                max_new_tokens=max(1, loaded.max_length - begin),
                eos_token_id=loaded.encoder.stop,
                pad_token_id=loaded.pad_id,
            )
        read = task.decide(loaded.tokenizer.batch_decode(written[:, begin:].cpu(), skip_special_tokens=True))
        for window, answer in zip(batch.windows, read, strict=True):
            answers[window.units] = answer
    return answers


def _speaking(logits: torch.Tensor, batch: Batch, *, per_token: bool) -> torch.Tensor:
    """The logits (units, classes) that speak for the units of the batch's windows, in their order."""
    if not per_token:
        return logits
    return torch.cat([logits[row, torch.from_numpy(window.positions)] for row, window in enumerate(batch.windows)])


def _check_ids(loaded: LoadedModel, windows: Sequence[Window]) -> None:
    rows = loaded.model.get_input_embeddings().num_embeddings
    if loaded.pad_id >= rows or any(int(window.ids.max()) >= rows for window in windows):
        raise ConfigError(
            f"the tokenizer of {loaded.model.config.name_or_path} gives token ids that the model does not have",
            hint="take tokenizer and weights from the same model",
        )


def pull_back(parameters: Sequence[torch.Tensor], start: Sequence[torch.Tensor], mu: float) -> None:
    """Add mu (w - w_t) to each gradient: that of (mu / 2) ||w - w_t||^2, w_t being where this update started.

    FedProx (Li et al., arXiv 1812.06127, algorithm 2); FedAsync has the same with the name rho (Xie et al., arXiv
    1903.03934, algorithm 1). It comes after clipping, and after any noise: both are for what notes say, and this says
    nothing of them. Nothing happens when mu is 0.
    """
    if mu:
        moved = [(each.grad, each.detach(), at) for each, at in zip(parameters, start, strict=True)]
        gradients, now, then = zip(*moved, strict=True)
        # One call for all tensors, as in the fused optimizer; torch has it under no public name.
        torch._foreach_add_(gradients, torch._foreach_sub(now, then), alpha=mu)  # noqa: SLF001 - see above


def _batch_by_batch(loaded: LoadedModel, data: Dataset, section: TrainingSection, seed: int) -> Descent:
    """The mean loss of each batch, every batch once an epoch in an order drawn from `seed`."""
    batches, chance, trained = data.prepared.batches, np.random.default_rng(seed), loaded.trained.values()
    order = np.concatenate([chance.permutation(len(batches)) for _ in range(section.epochs)])

    def gradient(forward: Forward, step: int) -> float:
        batch = batches[order[step]]
        for parameter in trained:
            parameter.grad = None
        loss = loaded.loss(forward(batch), batch.targets)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(trained, section.max_grad_norm)
        value = loss.item()
        if not (math.isfinite(value) and math.isfinite(norm.item())):
            raise _diverged("the loss or its gradient")
        return value

    return Descent(len(order), len(batches), gradient)


def _diverged(what: str) -> RefusedError:
    return RefusedError(
        f"training diverged: {what} is not a finite number",
        rule="diverged",
        hint="lower training.lr, or raise training.warmup",
    )


def _optimizer(loaded: LoadedModel, section: TrainingSection) -> torch.optim.AdamW:
    """AdamW; norms and biases are left out of the weight decay, as usual for transformers."""
    matrices = [parameter for parameter in loaded.trained.values() if parameter.ndim > 1]
    vectors = [parameter for parameter in loaded.trained.values() if parameter.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": section.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=section.lr, fused=True)


def _rate(step: int, steps: int, warmup: float) -> float:
    """The learning rate of a step (from 0) as a share of its peak: up over the first steps, then down to FINAL_RATE."""
    rising = math.ceil(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    falling = max(1, steps - rising)
    return 1.0 - (1.0 - FINAL_RATE) * min(1.0, (step - rising) / falling)


def _training_mode(loaded: LoadedModel) -> None:
    """Dropout on in what is trained and above the blocks, off in what is frozen."""
    model = loaded.model
    if loaded.full and loaded.here == loaded.layers:
        model.train()
        return
    model.eval()
    blocks = model.get_submodule(loaded.family.blocks)
    for index in loaded.here:
        blocks[index].train()
    for name, part in model.named_children():
        if name != loaded.family.backbone:
            part.train()
