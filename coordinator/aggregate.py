"""Merging: the files of version v out of the master of version v - 1 and the updates of a round.

Tensor by tensor, in the order of their names: `coordinator.means` says what the updates amount to, the server optimizer
(`coordinator.optimizers`) moves the master by it, and `coordinator.residual` makes what averaging the factors of
adapters loses. One that no update holds is copied, its slots too. Each goes into the new master's file and, in the same
pass, into what is published of it (a state that is published besides a step follows in a second one). While a tensor
is summed up in one thread, the one before it is stepped, written down, encoded and compressed in another. Memory is
that of a few tensors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from coordinator.masters import TensorFile, TensorWriter, master_path, open_own, slot_path, slots_digest, writing
from coordinator.means import Kept, Progress, means, settled
from coordinator.merging import MergePlan, MergeResult, coefficients
from coordinator.optimizers import SLOTS, server_step
from coordinator.publishing import publish
from coordinator.residual import correct
from coordinator.selection import next_blocks
from shared.ahead import ahead
from shared.config import FederationConfig
from shared.plan import Blocks, SealedPlan, blocks_from
from shared.states import Imprint, open_part, stored_part
from shared.store import FrameStore
from shared.tensorfile import F32Array, Shape


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
    with contextlib.ExitStack() as files:
        old_master = files.enter_context(open_own(master_path(masters, plan.base_version), shapes))
        blocks = _next_blocks(plan, updates, old_master, sealed, federation)
        imprint = Imprint(federation, sealed.fingerprint, plan.version, blocks)
        slots = () if plan.mode == "fedasync" else SLOTS[federation.aggregation.server.optimizer]
        optimizer = [_Slot.open(files, masters, plan, slot, shapes, imprint) for slot in slots]
        new_master = files.enter_context(
            writing(master_path(masters, plan.version), shapes, imprint.metadata("master"))
        )
        kept, section = Kept(updates, states), federation.aggregation
        plan = settled(plan, kept, section, shapes, lambda share: progress(0.45 * share))
        found = means(plan, kept, section, shapes, lambda share: progress(0.45 + 0.45 * share))
        coming = files.enter_context(contextlib.closing(ahead(found)))

        def stepped(name: str) -> F32Array:
            """The next tensor of the new master, which is written down on its way to the sites."""
            next_name, mean = next(coming, (None, None))
            assert next_name == name, "tensors come in order of their names"
            master = old_master[name]
            slot_values = [slot.read(name, master) for slot in optimizer]
            if name in sealed.residuals:
                _correct(plan, federation, master, kept, sealed.residuals[name])
            elif mean is not None:
                _step(plan, federation, master, mean, slot_values)
            new_master.write(name, master)
            for slot, values in zip(optimizer, slot_values, strict=True):
                slot.new.write(name, values)
            return master

        state, anchor = publish(states, imprint, plan.before, stepped, shapes, created=created)
    progress(1.0)
    optimizer_digest = slots_digest([slot.new.digest for slot in optimizer])
    return MergeResult(state, new_master.digest, optimizer_digest, plan.recorded(), anchor)


@dataclass(frozen=True, slots=True)
class _Slot:
    """The files of one slot of the server optimizer: of the version before, and of the one that is made."""

    old: TensorFile | None
    new: TensorWriter

    @classmethod
    def open(
        cls,
        files: contextlib.ExitStack,
        masters: Path,
        plan: MergePlan,
        slot: str,
        shapes: Mapping[str, Shape],
        imprint: Imprint,
    ) -> Self:
        """Open both until `files` closes."""
        # Without slot files, as at version 0, the slots are zero.
        before = slot_path(masters, plan.base_version, slot)
        old = files.enter_context(open_own(before, shapes)) if plan.base_version > 0 else None
        new = writing(slot_path(masters, plan.version, slot), shapes, imprint.metadata(slot))
        return cls(old, files.enter_context(new))

    def read(self, name: str, master: F32Array) -> F32Array:
        """What it holds for a tensor of the master."""
        return np.zeros_like(master) if self.old is None else self.old[name]


def _next_blocks(
    plan: MergePlan, updates: FrameStore, old_master: TensorFile, sealed: SealedPlan, federation: FederationConfig
) -> Blocks | None:
    kept = ((part.denominator, stored_part(updates, part.update_id)) for part in plan.contributions)
    votes = ((weight, stored.manifest.update.metrics) for weight, stored in kept)
    return next_blocks(
        blocks_from(old_master.metadata),
        votes,
        base_version=plan.base_version,
        rechoose=federation.layers.rechoose,
        sealed=sealed,
    )


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
    plan: MergePlan, federation: FederationConfig, residual: F32Array, kept: Kept, factors: tuple[str, str]
) -> None:
    """Take the updates that hold both factors; the others left the adapter as it was."""
    a, b = factors
    ids = [part.update_id for part in plan.contributions]
    holders = {each for each in ids if {a, b} <= open_part(kept.updates, each).shapes.keys()}
    shares, rate = coefficients(plan, holders), federation.aggregation.server.rate
    readers = ((rate * share, open_part(kept.updates, each)) for each, share in shares.items())
    with np.errstate(over="ignore", invalid="ignore"):  # as in `_step`
        correct(
            residual, ((share, each.tensor(b), each.tensor(a)) for share, each in readers), federation.adapter.scale
        )
