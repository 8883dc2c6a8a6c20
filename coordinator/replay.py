"""A run computed again: version after version from version 0 and the kept updates, in a folder of its own.

Where updates were given up (`coordinator.pruning`) it begins with the version up to which they were, whose master is
kept and has the digest that the journal recorded; what led to it is followed in the journal alone. A version that is a
step is made from the published state before it, which is then added up out of the kept steps and has its digest, too.

The merge is the one that made the versions (`coordinator.aggregate`), the weights come from the rules and not from the
record, and each update passes admission once more, so that nothing is taken on trust but version 0 and what sites sent.
Compared bit for bit with the journal: contributions, master, slots and the published file. Not compared are the frames
that the file was cut into, which another release of zstd may choose differently; `coordinator.proof` compares those
that are kept with their digests.

In the folder lie at most two versions' float32 files, and what makes up the published states that a later merge still
needs: that of the newest, and in fedasync those that updates still to come started from. The run's own files are only
read.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from coordinator.aggregate import merge
from coordinator.journal import Journal
from coordinator.kept import check_master, check_state, check_update
from coordinator.masters import master_path, open_own, slot_path
from coordinator.merging import MergePlan, MergeResult
from coordinator.optimizers import SLOTS
from coordinator.publishing import publish
from coordinator.records import Opened, Pruned, VersionCommitted
from coordinator.trail import Finding, Trail, miscounted, row_place
from coordinator.views import JOURNAL, not_begun
from shared import durable
from shared.config import FederationConfig
from shared.errors import ConfigError, CorruptError, RefusedError
from shared.manifest import Manifest, manifest_from_bytes
from shared.plan import SealedPlan, blocks_from
from shared.states import Imprint, check_state_digest
from shared.store import FrameStore, Stored, frame_offsets

FRAMES_ONLY = {"created", "frame_lengths", "frame_hashes"}
"""Fields of a state's manifest that say nothing of the tensors."""

Progress = Callable[[int, float], None]
"""Called with the version in work and the share of it that is done, 0 to 1."""


@dataclass(frozen=True, slots=True)
class Recomputed:
    """One version, made again."""

    version: int
    last: int
    """The last version that will be made."""
    updates: int
    seconds: float
    differences: tuple[Finding, ...]
    """Empty when it is the same, bit for bit."""


def replay(
    storage: Path,
    federation: FederationConfig,
    plan: SealedPlan,
    scratch: Path,
    *,
    upto: int | None = None,
    progress: Progress = lambda _version, _share: None,
) -> Iterator[Recomputed]:
    """Yield each version from the first to `upto` (None: the newest) as it is made; the first that differs is the last.

    The first is version 0, or the one up to which updates were given up. `scratch` is an empty folder. ConfigError when
    there is no such version, CorruptError when the journal's chain is broken or the first version cannot be read,
    UnavailableError when the disk is full.
    """
    outline = _outline(storage, federation, upto)
    run = _Replay(storage, federation, plan, scratch, outline.needed)
    odd: list[Finding] = []
    with Journal.open_read(storage / JOURNAL) as journal:
        for seq, record in enumerate(journal.replay(), start=1):
            planned = run.trail.plan_for(record) if isinstance(record, VersionCommitted) else None
            odd += run.trail.take(seq, record)
            if not isinstance(record, Opened | VersionCommitted):
                continue
            begun = time.monotonic()
            version = record.version if isinstance(record, VersionCommitted) else 0
            if version < outline.first and not odd:
                continue
            if not odd and version == outline.first:
                odd += run.first(version, manifest_from_bytes(record.state))
            elif not odd and isinstance(record, VersionCommitted):
                odd += run.next(seq, record, planned, progress)
            updates = len(record.contributions) if isinstance(record, VersionCommitted) else 0
            yield Recomputed(version, outline.last, updates, time.monotonic() - begun, tuple(odd))
            if odd or version >= outline.last:
                return


class _Replay:
    """The folder in which versions are made again, and what is known of the run so far."""

    def __init__(
        self, storage: Path, federation: FederationConfig, plan: SealedPlan, scratch: Path, needed: dict[int, int]
    ) -> None:
        self.storage = storage
        self.scratch = scratch
        self.federation = federation
        self.plan = plan
        self.trail = Trail(federation, plan)
        self.needed = needed
        self.updates = _existing(storage, "updates")
        self.states = FrameStore(scratch / "states")
        self.held: set[str] = set()
        """Ids of the states and steps that lie in the folder."""
        self.masters = scratch / "masters"
        durable.make_folder(self.masters)

    def first(self, version: int, state: Manifest) -> list[Finding]:
        """Take a version's float32 files from the run and compare them, and what they publish, with the journal."""
        recorded = self.trail.versions[version]
        slots = SLOTS[self.federation.aggregation.server.optimizer] if recorded.optimizer_digest else ()
        source = self.storage / "masters"
        for path in (master_path(source, version), *(slot_path(source, version, slot) for slot in slots)):
            _copy(path, self.masters / path.name)
        # The copies are compared: what was hashed is what will be used.
        damaged = check_master(self.scratch, version, recorded, slots, required=True)
        bases = {older for older, last_read in self.needed.items() if older < version < last_read}
        if version > 0 and self.federation.codec.steps:
            bases.add(version - 1)
        for older in sorted(bases):
            damaged += self._take_state(older)
        return damaged or [*self._compare_state(recorded.row, state, self._publish(version, created=state.created))]

    def _take_state(self, version: int) -> list[Finding]:
        """Take what makes up a published state from the run, and compare it and what it adds up to with the journal."""
        parts = self.trail.lineage.made_of(version)
        for part in parts:
            if part.transfer_id not in self.held:
                for name in (f"{part.transfer_id}.frames", f"{part.transfer_id}.manifest"):
                    _copy(self.storage / "states" / name, self.states.root / name)
                self.held.add(part.transfer_id)
        damaged = [finding for part in parts for finding in check_state(self.scratch, version, part, self.plan)]
        if not damaged:
            try:
                check_state_digest(self.states, [part.transfer_id for part in parts])
            except RefusedError as error:
                damaged.append(Finding(error.rule, f"states/{parts[-1].transfer_id}", error.message))
        return damaged

    def _publish(self, version: int, *, created: float) -> Manifest:
        """Publish a version out of its master, and of the state before it where it is a step from there."""
        with open_own(master_path(self.masters, version), dict(sorted(self.plan.tensors.items()))) as master:
            imprint = Imprint(self.federation, self.plan.fingerprint, version, blocks_from(master.metadata))
            before, read = self.trail.lineage.parts(version - 1), master.__getitem__
            state, anchor = publish(self.states, imprint, before, read, self.plan.tensors, created=created)
        self.held |= {each.transfer_id for each in (state, anchor) if each is not None}
        return state

    def next(self, seq: int, record: VersionCommitted, planned: MergePlan | None, progress: Progress) -> list[Finding]:
        """Make a version from the one before it and compare it with its record."""
        assert planned is not None, "the trail names what no plan can be made of"
        damaged = [finding for part in planned.contributions for finding in self._check(part.update_id)]
        if damaged:
            return damaged
        recorded = manifest_from_bytes(record.state)
        try:
            made = merge(
                planned,
                self.updates,
                self.states,
                self.masters,
                self.plan,
                self.federation,
                created=recorded.created,
                progress=lambda share: progress(record.version, share),
            )
        except (CorruptError, RefusedError) as error:
            return [Finding("merge", row_place(seq), f"version {record.version} cannot be made: {error.message}")]
        self._tidy(record.version, made)
        found = [
            Finding(rule, row_place(seq), what) for rule, what in miscounted(made.contributions, record.contributions)
        ]
        found += self._compare_state(seq, recorded, made.state)
        for rule in ("master_digest", "optimizer_digest"):
            ours, theirs = getattr(made, rule), getattr(record, rule)
            if ours != theirs:
                what = f"the journal says {theirs}, recomputed {ours}"
                found.append(Finding(rule.removesuffix("_digest"), f"{row_place(seq)}: {rule}", what))
        return found

    def _check(self, update_id: str) -> list[Finding]:
        _seq, accepted = self.trail.accepted[update_id]
        base = self.trail.versions[accepted.base_version]
        return check_update(self.storage, accepted, base.state_digest, self.plan, self.federation)

    def _compare_state(self, seq: int, recorded: Manifest, ours: Manifest) -> Iterator[Finding]:
        wanted, made = (each.model_dump(exclude=FRAMES_ONLY) for each in (recorded, ours))
        differing = [name for name, value in wanted.items() if made[name] != value]
        if not differing:
            return
        where = f"{row_place(seq)}: state.{differing[0]}"
        yield Finding("state", where, f"the journal says {wanted[differing[0]]}, recomputed {made[differing[0]]}")
        kept = Stored(recorded, self.storage / "states" / f"{recorded.transfer_id}.frames", frame_offsets(recorded))
        own = self.states.get(ours.transfer_id)
        if own is not None and kept.path.exists():
            yield from _first_value(kept, own)

    def _tidy(self, version: int, made: MergeResult) -> None:
        for path in self.masters.glob(f"v{version - 1:08d}*.safetensors"):
            path.unlink()
        to_come = [base for base, last_read in self.needed.items() if base <= version < last_read]
        newest = self.trail.lineage.parts(version) if made.anchor is None else (made.anchor.transfer_id,)
        used = {made.state.transfer_id, *newest}.union(*(self.trail.lineage.parts(each) for each in to_come))
        for unused in self.held - used:
            self.states.delete(unused)
        self.held = used


@dataclass(frozen=True, slots=True)
class _Outline:
    first: int
    last: int
    needed: dict[int, int]
    """For each base state that a merge reads, the last version that reads it."""


def _outline(storage: Path, federation: FederationConfig, upto: int | None) -> _Outline:
    """Return which versions to make; ConfigError when there is no such one."""
    newest, first = -1, 0
    needed: dict[int, int] = {}
    with Journal.open_read(storage / JOURNAL) as journal:
        for record in journal.replay():
            if isinstance(record, Opened):
                newest = max(newest, 0)
            elif isinstance(record, Pruned):
                first = record.version
            elif isinstance(record, VersionCommitted):
                newest = max(newest, record.version)
                if federation.aggregation.mode == "fedasync":
                    needed |= {part.base_version: record.version for part in record.contributions}
    if newest < 0:
        raise not_begun(storage)
    if upto is not None and not 0 <= upto <= newest:
        raise ConfigError(f"there is no version {upto}", hint=f"versions 0 to {newest} have been published")
    if upto is not None and upto < first:
        raise ConfigError(
            f"version {upto} cannot be computed again", hint=f"the updates up to version {first} were given up"
        )
    return _Outline(first, newest if upto is None else upto, needed)


def _existing(storage: Path, name: str) -> FrameStore:
    if not (storage / name).is_dir():
        # A store makes its folder, and a replay makes nothing in the run's.
        raise CorruptError(f"{storage / name} is gone", hint="restore the folder from a backup")
    return FrameStore(storage / name)


def _copy(source: Path, target: Path) -> None:
    if not source.exists():
        raise CorruptError(f"{source} is gone", hint="restore it from a backup; without it nothing can be recomputed")
    with durable.storage_errors(target.parent, source.stat().st_size):
        shutil.copyfile(source, target)


def _first_value(kept: Stored, ours: Stored) -> Iterator[Finding]:
    """Name the first value, in order of names, in which the kept published state differs from the one made again."""
    where = f"states/{kept.path.name}"
    try:
        kept.check_frames()
        with kept.open_tensors(verify=True) as theirs, ours.open_tensors() as made:
            if theirs.shapes != made.shapes:
                yield Finding("state-value", where, "the published state holds other tensors than the plan")
                return
            for name, values in made.tensors():
                differs = np.flatnonzero(theirs.tensor(name).view(np.uint32) != values.view(np.uint32))
                if differs.size:
                    at = int(differs[0])
                    said = f"{theirs.tensor(name).flat[at]!s}, recomputed {values.flat[at]!s}"
                    yield Finding("state-value", f"{where}: tensor {name}, value {at}", f"published {said}")
                    return
    except (CorruptError, RefusedError) as error:
        yield Finding("state-value", where, f"the published state cannot be read: {error.message}")
