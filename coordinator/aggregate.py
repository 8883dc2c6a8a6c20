"""Merging: the files of version v out of the master of version v - 1 and the updates of a round.

Tensors are taken in the order of their names, as many at a time as their float32 sums fit in BLOCK_BYTES; for each
such block every update is opened, added and closed in turn, in the order of the plan. So memory and open files depend
neither on the number of updates nor on the size of the model, and each sum is formed in one order with one rounding
after each operation: the same inputs give the same bytes, on any machine.

A tensor that an update does not hold takes nothing from it, nor counts it in its mean (sites may train to different
depths); one that no update holds is copied, its slots too.

Formulas: `coordinator.merging` for the weights, `coordinator.optimizers` for the step, `coordinator.residual` for what
averaging the factors of adapters loses.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from coordinator.masters import TensorWriter, master_path, open_own, slot_path, slots_sha256, writing
from coordinator.merging import MergePlan, MergeResult, PlannedContribution
from coordinator.optimizers import SLOTS, server_step
from coordinator.publishing import publish
from coordinator.residual import correct
from coordinator.robust import trimmed, trimmed_mean
from shared.codec import SPAN
from shared.config import AggregationSection, FederationConfig
from shared.plan import SealedPlan
from shared.reader import TensorReader
from shared.states import State, file_metadata, open_part, open_state
from shared.store import FrameStore
from shared.tensorfile import F32Array, Shape

BLOCK_BYTES = 64 * 1024 * 1024
"""Sums held at a time, or one tensor where that is larger. Opening an update costs about one slice."""

STRETCH_UNIT = SPAN // 32
"""Values; robust means take a multiple of it of each update at a time. A multiple of every codec's block."""

Progress = Callable[[float], None]
"""Called with the share of the work that is done, 0 to 1; from the thread that merges."""


def merge(
    plan: MergePlan,
    updates: FrameStore,
    states: FrameStore,
    masters: Path,
    sealed: SealedPlan,
    federation: FederationConfig,
    *,
    created: float | None = None,
    progress: Progress = lambda _share: None,
) -> MergeResult:
    """Make master, slots and published form of `plan.version` durable; nothing of the version before it changes.

    `masters` is the folder of masters; `created` (unix seconds, by default now) goes into the manifest, for people. May
    be repeated: the same plan gives the same files, another one replaces the master.

    CorruptError when a file of ours is gone or changed, UnavailableError when the disk is full, and
    RefusedError(rule='non-finite') when the new master has overflowed.
    """
    shapes = dict(sorted(sealed.tensors.items()))
    slots = () if plan.mode == "fedasync" else SLOTS[federation.aggregation.server.optimizer]
    metadata = partial(file_metadata, plan.version, sealed.fingerprint, federation)
    with contextlib.ExitStack() as files:
        old_master = files.enter_context(open_own(master_path(masters, plan.base_version), shapes))
        # Without slot files, as at version 0, the slots are zero.
        begun = plan.base_version > 0
        old_slots = [
            files.enter_context(open_own(slot_path(masters, plan.base_version, slot), shapes)) if begun else None
            for slot in slots
        ]
        writers: list[TensorWriter] = [
            files.enter_context(writing(slot_path(masters, plan.version, slot), shapes, metadata(slot)))
            for slot in slots
        ]
        new_master = files.enter_context(writing(master_path(masters, plan.version), shapes, metadata("master")))
        section = federation.aggregation
        if section.rule == "mean":
            found = _means(plan, updates, states, shapes, progress)
        else:
            found = _robust_means(plan, updates, section, shapes, progress)
        for name, mean in found:
            master = old_master[name]
            slot_values = [np.zeros_like(master) if old is None else old[name] for old in old_slots]
            if name in sealed.residuals:
                _correct(plan, federation, master, updates, sealed.residuals[name])
            elif mean is not None:
                _step(plan, federation, master, mean, slot_values)
            new_master.write(name, master)
            for writer, values in zip(writers, slot_values, strict=True):
                writer.write(name, values)
    with open_own(master_path(masters, plan.version), shapes) as tensors:
        state, anchor = publish(states, plan.version, plan.before, tensors, sealed, federation, created=created)
    progress(1.0)
    return MergeResult(state, new_master.sha256, slots_sha256([writer.sha256 for writer in writers]), anchor)


def _means(
    plan: MergePlan, updates: FrameStore, states: FrameStore, shapes: Mapping[str, Shape], progress: Progress
) -> Iterator[tuple[str, F32Array | None]]:
    """Yield the weighted mean of each tensor, by name; None where nobody holds it."""
    totals = dict.fromkeys(shapes, 0.0)
    for part in plan.contributions:
        for name in open_part(updates, part.update_id).shapes:
            totals[name] += part.denominator
    steps, done = [*blocks(shapes, BLOCK_BYTES)], 0
    for block in steps:
        sums: dict[str, F32Array] = {name: np.zeros(shapes[name], dtype=np.float32) for name in block}
        for part in plan.contributions:
            base = open_state(states, part.base) if plan.mode == "fedasync" else None
            _add(part.numerator, open_part(updates, part.update_id), base, totals, sums)
            done += 1
            progress(0.9 * done / (len(steps) * len(plan.contributions)))
        for name in block:
            mean = sums.pop(name)
            yield name, mean if totals[name] > 0 else None


def _robust_means(
    plan: MergePlan, updates: FrameStore, section: AggregationSection, shapes: Mapping[str, Shape], progress: Progress
) -> Iterator[tuple[str, F32Array | None]]:
    """As `_means`, by the rule of the federation: median or trimmed mean of each number."""
    holders: dict[str, list[PlannedContribution]] = {name: [] for name in shapes}
    for part in plan.contributions:
        for name in open_part(updates, part.update_id).shapes:
            holders[name].append(part)
    for done, (name, parts) in enumerate(holders.items(), start=1):
        yield name, _robust_mean(name, shapes[name], parts, updates, section) if parts else None
        progress(0.9 * done / len(shapes))


def _robust_mean(
    name: str, shape: Shape, parts: Sequence[PlannedContribution], updates: FrameStore, section: AggregationSection
) -> F32Array:
    """All updates' values of a stretch of the tensor side by side, so that memory does not grow with updates."""
    mean = np.empty(shape, dtype=np.float32)
    flat, trim = mean.reshape(-1), trimmed(section.rule, len(parts), section.trim)
    stretch = max(1, BLOCK_BYTES // (4 * len(parts) * STRETCH_UNIT)) * STRETCH_UNIT
    for start in range(0, flat.size, stretch):
        count = min(stretch, flat.size - start)
        values = np.empty((len(parts), count), dtype=np.float32)
        for row, part in zip(values, parts, strict=True):
            update = open_part(updates, part.update_id).span(name, start, count)
            np.multiply(update, np.float32(part.numerator), out=row)
        flat[start : start + count] = trimmed_mean(values, trim)
    return mean


def _add(
    numerator: float,
    update: TensorReader,
    base: State | None,
    totals: Mapping[str, float],
    sums: Mapping[str, F32Array],
) -> None:
    for name in sums:
        if name not in update.shapes:
            continue
        weight = numerator / totals[name]
        update.add_tensor(name, weight, sums[name])
        if base is not None:
            base.add_tensor(name, weight, sums[name])


def _step(
    plan: MergePlan, federation: FederationConfig, master: F32Array, summed: F32Array, slots: Sequence[F32Array]
) -> None:
    # An overflow is found when the state is published, and told as such.
    with np.errstate(over="ignore", invalid="ignore"):
        if plan.mode == "fedasync":
            (only,) = plan.contributions
            np.multiply(master, np.float32(1 - only.numerator), out=master)
            np.add(master, summed, out=master)
        else:
            server = federation.aggregation.server
            server_step(server, master, summed, slots, version=plan.version, late=plan.latest)


def _correct(
    plan: MergePlan, federation: FederationConfig, residual: F32Array, updates: FrameStore, factors: tuple[str, str]
) -> None:
    """Take the updates that hold both factors; the others left the adapter as it was."""
    a, b = factors
    holders = [part for part in plan.contributions if {a, b} <= open_part(updates, part.update_id).shapes.keys()]
    total, rate = sum(part.denominator for part in holders), federation.aggregation.server.rate
    readers = ((rate * part.numerator / total, open_part(updates, part.update_id)) for part in holders)
    with np.errstate(over="ignore", invalid="ignore"):  # as in `_step`
        correct(
            residual, ((share, each.tensor(b), each.tensor(a)) for share, each in readers), federation.adapter.scale
        )


def blocks(shapes: Mapping[str, Shape], limit: int) -> Iterator[list[str]]:
    """Cut the names, in order, into runs whose float32 tensors have at most `limit` bytes, or into single ones."""
    block: list[str] = []
    size = 0
    for name, shape in shapes.items():
        own = 4 * int(np.prod(shape, dtype=np.int64))
        if block and size + own > limit:
            yield block
            block, size = [], 0
        block.append(name)
        size += own
    if block:
        yield block
