"""What a round's updates amount to, tensor by tensor: their mean by the rule of the plan, out of the kept updates.

Weighted means: tensors are taken in the order of their names, as many at a time as their float32 sums fit in
BLOCK_BYTES; for each such block every update is opened, added and closed in turn, in the order of the plan. Medians,
trimmed means and the distances of Krum need all updates' values side by side: a stretch of one tensor at a time, short
enough for BLOCK_BYTES. So memory and open files depend neither on the number of updates nor on the size of the model,
and each sum is formed in one order with one rounding after each operation: the same inputs give the same bytes, on any
machine.

A tensor that an update does not hold takes nothing from it (sites may train to different depths), nor counts it in its
mean, unless the federation says so (`missing`); for a distance, a tensor that is not held did not move.

Formulas: `coordinator.merging` for the coefficients, `coordinator.robust` for the rules that trust nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from coordinator.merging import MergePlan, PlannedContribution, choosing, coefficients
from coordinator.robust import KRUMS, MIDDLES, chosen, krum_choice, squared_distances, trimmed, trimmed_mean
from shared.codec import SPAN
from shared.config import AggregationSection
from shared.errors import CorruptError
from shared.states import open_part, open_state
from shared.store import FrameStore
from shared.tensorfile import F32Array, Shape

BLOCK_BYTES = 32 * 1024 * 1024
"""Sums held at a time, or one tensor where that is larger. Opening an update costs about one slice."""

STRETCH_UNIT = SPAN // 32
"""Values; rules that compare updates take a multiple of it of each at a time. A multiple of every codec's block."""


CACHE_LOST = (
    "restore its files from a backup; without a copy no further version can be made: "
    "export the newest one, and begin another federation from that model"
)
"""What can be done when the update that ca2fl takes back is lost: its site had its receipt, and has deleted it."""


@dataclass(frozen=True, slots=True)
class Kept:
    """Where what was accepted and published lies."""

    updates: FrameStore
    states: FrameStore


Progress = Callable[[float], None]
"""Called with the share of the work that is done, 0 to 1; from a thread."""

Means = Iterator[tuple[str, F32Array | None]]
"""Name and mean of each tensor, names ascending; None where no update of the round holds it."""


def settled(
    plan: MergePlan, kept: Kept, section: AggregationSection, shapes: Mapping[str, Shape], progress: Progress
) -> MergePlan:
    """Return the plan with all that only tensors can decide: which updates Krum or multi-Krum chooses."""
    if plan.rule not in KRUMS:
        return plan
    held = _held(plan, kept)
    count = len(plan.contributions)
    distances = np.zeros((count, count), dtype=np.float64)
    for done, (name, shape) in enumerate(shapes.items(), start=1):
        rows = [part if name in names else None for part, names in zip(plan.contributions, held, strict=True)]
        if any(rows):
            for _start, values in _side_by_side(name, int(np.prod(shape, dtype=np.int64)), rows, kept):
                distances += squared_distances(values)
        progress(done / len(shapes))
    best = krum_choice(distances, section.byzantine, chosen(plan.rule, count, section.byzantine))
    return choosing(plan, {plan.contributions[row].update_id for row in best})


def means(
    plan: MergePlan, kept: Kept, section: AggregationSection, shapes: Mapping[str, Shape], progress: Progress
) -> Means:
    """Yield what each tensor is moved by; CorruptError when what the journal needs is gone or damaged."""
    if plan.rule in MIDDLES:
        return _middles(plan, kept, section, shapes, progress)
    return _sums(plan, kept, shapes, progress)


def _sums(plan: MergePlan, kept: Kept, shapes: Mapping[str, Shape], progress: Progress) -> Means:
    """The sum over all updates, each times its coefficient."""
    ids = [part.update_id for part in plan.contributions if part.denominator > 0]
    ids += [each.update_id for each in plan.cached]
    held = dict[str, frozenset[str]]()
    for update_id in ids:
        with _explained(plan, update_id):
            held[update_id] = frozenset(open_part(kept.updates, update_id).shapes)
    factors = {name: coefficients(plan, {update_id for update_id in ids if name in held[update_id]}) for name in shapes}
    # What fedasync mixes in is the site's whole state: what it started from, and its delta.
    mixed_in = plan.contributions[0].base if plan.mode == "fedasync" else None
    steps, done = [*blocks(shapes, BLOCK_BYTES)], 0
    for block in steps:
        sums: dict[str, F32Array] = {name: np.zeros(shapes[name], dtype=np.float32) for name in block}
        for update_id in ids:
            update = open_part(kept.updates, update_id)
            base = None if mixed_in is None else open_state(kept.states, mixed_in)
            for name in block:
                if factor := factors[name].get(update_id):
                    with _explained(plan, update_id):
                        update.add_tensor(name, factor, sums[name])
                    if base is not None:
                        base.add_tensor(name, factor, sums[name])
            done += 1
            progress(done / (len(steps) * len(ids)))
        for name in block:
            mean = sums.pop(name)
            yield name, mean if factors[name] else None


def _middles(
    plan: MergePlan, kept: Kept, section: AggregationSection, shapes: Mapping[str, Shape], progress: Progress
) -> Means:
    """The median or trimmed mean of each number, over those who hold its tensor."""
    held = _held(plan, kept)
    for done, (name, shape) in enumerate(shapes.items(), start=1):
        parts = [part for part, names in zip(plan.contributions, held, strict=True) if name in names]
        mean = np.empty(shape, dtype=np.float32) if parts else None
        if mean is not None:
            flat, trim = mean.reshape(-1), trimmed(plan.rule, len(parts), section.trim)
            for start, values in _side_by_side(name, flat.size, parts, kept):
                flat[start : start + values.shape[1]] = trimmed_mean(values, trim)
        yield name, mean
        progress(done / len(shapes))


@contextmanager
def _explained(plan: MergePlan, update_id: str) -> Iterator[None]:
    """Say of a damaged update that is not of this round why it is needed all the same."""
    try:
        yield
    except CorruptError as error:
        for each in plan.cached:
            if each.update_id == update_id:
                raise CorruptError(
                    f"{error.message}; update {update_id} is what {each.site} said last, and version {plan.version} "
                    'takes that back (rule = "ca2fl")',
                    hint=CACHE_LOST,
                ) from None
        raise


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


def _held(plan: MergePlan, kept: Kept) -> list[frozenset[str]]:
    """Names of the tensors in each update of the round."""
    return [frozenset(open_part(kept.updates, part.update_id).shapes) for part in plan.contributions]


def _side_by_side(
    name: str, size: int, rows: Sequence[PlannedContribution | None], kept: Kept
) -> Iterator[tuple[int, F32Array]]:
    """Yield start and (updates, values) of one tensor, stretch by stretch, each update times its numerator.

    A row of None is an update that does not hold it: zeros.
    """
    stretch = max(1, BLOCK_BYTES // (4 * len(rows) * STRETCH_UNIT)) * STRETCH_UNIT
    for start in range(0, size, stretch):
        count = min(stretch, size - start)
        values = np.zeros((len(rows), count), dtype=np.float32)
        for row, part in zip(values, rows, strict=True):
            if part is not None:
                update = open_part(kept.updates, part.update_id).span(name, start, count)
                np.multiply(update, np.float32(part.numerator), out=row)
        yield start, values
