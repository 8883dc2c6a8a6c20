"""Checking a coordinator's folder while nobody writes it, and mending what can be mended.

What is wrong is found by `coordinator.proof`, what is merely left over by `coordinator.leftovers`. Mended is:

    leftovers          deleted
    audit.jsonl        written anew from the journal
    states, masters    computed again, from version 0 and the kept updates, where the bytes come out the same

Nothing else can be: the journal and the kept updates are the truth, and have no second copy here. An update that waits
to be merged and is damaged stops the run, since no version can be made without it; when no backup has it, `drop_lost`
gives it up: a row drops it under the rule LOST, and its site is told on its next hello. Whatever was mended
is checked once more, so that `repaired` is what was seen and not what was meant. A file that is replaced is damaged or
missing by then; no other is touched.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from coordinator.journal import Journal
from coordinator.kept import check_update
from coordinator.ledger import Ledger
from coordinator.leftovers import BEHIND, Leftover, find_leftovers
from coordinator.masters import version_of
from coordinator.means import CACHE_LOST
from coordinator.merging import last_merged
from coordinator.proof import AUDIT, Progress, Proof, prove
from coordinator.records import Accepted, Dropped
from coordinator.replay import replay
from coordinator.rows import JournalReader
from coordinator.trail import Finding
from coordinator.views import JOURNAL, not_begun
from shared import durable
from shared.audit import AuditLog
from shared.config import FederationConfig, MergeRule
from shared.errors import ConfigError, CorruptError, RefusedError
from shared.lock import FolderLock
from shared.manifest import Manifest
from shared.messages import LOST
from shared.plan import SealedPlan
from shared.problems import Problem
from shared.store import FrameStore

_BACKUP = "restore it from a backup"


@dataclass(frozen=True, slots=True)
class Checked:
    """What was looked at, and all that was found; fields as `Proof`."""

    rows: int
    head: str
    version: int
    updates: int
    pruned: tuple[str, ...]
    problems: tuple[Problem, ...]


def check(
    storage: Path,
    federation: FederationConfig,
    plan: SealedPlan,
    *,
    repair: bool = False,
    drop_lost: bool = False,
    progress: Progress = lambda _share: None,
) -> Checked:
    """Look at a coordinator's whole folder, with `repair` mend what can be, with `drop_lost` give up what cannot.

    Raises UnavailableError while a coordinator runs there or when the disk is full, ConfigError when no run has begun.
    """
    if not (storage / JOURNAL).is_file():
        raise not_begun(storage)
    lost = _drop_lost(storage, federation, plan) if drop_lost else []
    with FolderLock(storage / f"{JOURNAL}.lock", holder="coordinator"):
        before = prove(storage, federation, plan, progress=progress)
        leftovers, behind, ledger = _look(storage, federation)
        after, why = before, ""
        if repair:
            for leftover in leftovers:
                leftover.remove()
            if before.findings and ledger is not None:
                why = _mend(storage, federation, plan, before.findings, ledger)
                after = prove(storage, federation, plan, progress=progress)
    told = _told(before, after, leftovers, behind, _Advisor(ledger, federation.aggregation.rule, why, repair))
    return dataclasses.replace(told, problems=(*map(_given_up, lost), *told.problems))


def _look(storage: Path, federation: FederationConfig) -> tuple[list[Leftover], list[Finding], Ledger | None]:
    """Return leftovers, files from behind the journal's end, and the state of the run; None when it has none."""
    try:
        with Journal.open_read(storage / JOURNAL) as journal:
            ledger = fold(journal)
            leftovers, behind = find_leftovers(storage, journal, ledger, federation)
    except (CorruptError, RefusedError, AssertionError, LookupError):  # told by the proof, row by row
        return [], [], None
    return leftovers, behind, ledger


def fold(journal: JournalReader) -> Ledger:
    """The state of a run as its journal tells it, from the newest snapshot on."""
    restored = journal.restore()
    ledger = restored.ledger if restored else Ledger()
    for record in journal.replay(restored.row if restored else None):
        ledger.apply(record)
    return ledger


# -- mending ---


def _drop_lost(storage: Path, federation: FederationConfig, plan: SealedPlan) -> list[Accepted]:
    """Drop the updates that wait to be merged and are not what was accepted; their row first, then their bytes."""
    with Journal(storage / JOURNAL) as journal:
        ledger = fold(journal)
        digests = {version: published.digest for version, published in ledger.published.items()}
        lost = [
            accepted
            for accepted in ledger.pending
            if check_update(storage, accepted, digests.get(accepted.base_version), plan, federation)
        ]
        journal.append([Dropped(accepted.update_id, LOST, time.time()) for accepted in lost])
    if lost:
        mend_trail(storage)
    for accepted in lost:
        FrameStore(storage / "updates").delete(accepted.update_id)
    return lost


def _given_up(accepted: Accepted) -> Problem:
    what = f"an accepted update of {accepted.site} is damaged: dropped, and its site will be told"
    return Problem("damage", LOST, f"updates/{accepted.update_id}", what, True, "")


def _mend(
    storage: Path, federation: FederationConfig, plan: SealedPlan, findings: Sequence[Finding], ledger: Ledger
) -> str:
    """Mend what can be, and say why states and masters could not all be made again; empty when they could."""
    files = {finding.where.partition(":")[0] for finding in findings}
    if AUDIT in files:
        mend_trail(storage)
    damaged = {Path(name).name.partition(".")[0] for name in files if name.startswith("states/")}
    states = [manifest for transfer_id, manifest in ledger.transfers.items() if transfer_id in damaged]
    masters = {name for where in files for name in where.split(", ") if name.startswith("masters/")}
    if not (states or masters):
        return ""
    durable.make_folder(storage / "updates")  # a run may have been opened and no more
    with tempfile.TemporaryDirectory(prefix=durable.TEMPORARY_PREFIX, dir=storage) as scratch:
        return _recompute(storage, federation, plan, Path(scratch), states, masters)


def mend_trail(storage: Path) -> None:
    """Bring audit.jsonl in line with the journal."""
    with Journal.open_read(storage / JOURNAL) as journal:
        restored = journal.restore()
        pruned = max((segment.last for segment in journal.pruned()), default=0)
        AuditLog(storage / AUDIT, journal.rows, mark=restored.mark if restored else None, pruned=pruned)


def _recompute(
    storage: Path,
    federation: FederationConfig,
    plan: SealedPlan,
    scratch: Path,
    states: Sequence[Manifest],
    masters: set[str],
) -> str:
    """Make the versions again and take from them what is damaged; say what ended it early, if anything did."""
    try:
        for made in replay(storage, federation, plan, scratch):
            if made.differences:
                return f"version {made.version}: {made.differences[0]}"
            for state in states:
                _take_state(scratch / "states", storage / "states", state)
            for path in (scratch / "masters").glob("v*.safetensors"):
                if f"masters/{path.name}" in masters and version_of(path) == made.version > 0:
                    _take(path, storage / "masters" / path.name)
    except (CorruptError, ConfigError) as error:
        return error.message  # version 0 or the rows are not here
    return ""


def _take_state(source: Path, target: Path, state: Manifest) -> None:
    """Take a state when it was made, down to its frames: another release of zstd may cut the same file otherwise."""
    manifest = source / f"{state.transfer_id}.manifest"
    if manifest.exists() and manifest.read_bytes() == state.to_bytes():
        _take(source / f"{state.transfer_id}.frames", target / f"{state.transfer_id}.frames")
        _take(manifest, target / manifest.name)


def _take(source: Path, target: Path) -> None:
    """Put a copy in the place of a damaged file, durably and whole or not at all."""
    with durable.temporary_file(target.parent) as (temporary, fd):
        with durable.storage_errors(target.parent, source.stat().st_size):
            shutil.copyfile(source, temporary)
            durable.sync_file(fd)
        temporary.replace(target)
    durable.fsync_dir(target.parent)


# -- telling ---


@dataclass(frozen=True, slots=True)
class _Advisor:
    """What a person can do about damage; `why` says what kept a version from being made again."""

    ledger: Ledger | None
    rule: MergeRule
    why: str
    repair: bool

    def advice(self, finding: Finding) -> str:
        folder, _, name = finding.where.partition("/")
        if finding.rule == BEHIND:
            return "the journal was put back from a backup, perhaps: look for a later copy of it; nothing was deleted"
        if folder in {"states", "masters", AUDIT} and not self.repair:
            return "--repair makes it again, from version 0 and the kept updates"
        match folder:
            case "updates":
                return self._of_update(name.partition(".")[0])
            case "states" | "masters":
                why = self.why or "another release of the compressor may have made it"
                return f"{_BACKUP}; it could not be made again ({why})"
            case _:
                return "restore the journal from a backup, and do not continue this run before"

    def _of_update(self, update_id: str) -> str:
        known = self.ledger.known.get(update_id) if self.ledger else None
        if known is None or self.ledger is None:
            return _BACKUP
        if known.outcome == "accepted":
            return (
                f"{_BACKUP}: it waits to be merged, and version {self.ledger.version + 1} cannot be made without it; "
                "when there is no copy of it, --drop-lost gives it up and tells its site"
            )
        if self.rule == "ca2fl" and not self.ledger.finished and update_id in last_merged(self.ledger.known).values():
            return f"version {self.ledger.version + 1} takes back what {known.site} said last: {CACHE_LOST}"
        if known.outcome == "merged":
            return f"{_BACKUP}: version {known.version} stands, but it cannot be recomputed or proven without it"
        return f"{_BACKUP}: it was dropped, and no version needs it; the proof misses it"


def _told(
    before: Proof, after: Proof, leftovers: Sequence[Leftover], behind: Sequence[Finding], advisor: _Advisor
) -> Checked:
    problems = [
        Problem("leftover", *_parts(each.finding), advisor.repair, "" if advisor.repair else "--repair deletes it")
        for each in leftovers
    ]
    still = (*after.findings, *behind)
    new = [finding for finding in after.findings if finding not in before.findings]
    for finding in (*before.findings, *behind, *new):
        repaired = finding not in still
        problems.append(Problem("damage", *_parts(finding), repaired, "" if repaired else advisor.advice(finding)))
    return Checked(after.rows, after.head, after.version, after.updates, after.pruned, tuple(problems))


def _parts(finding: Finding) -> tuple[str, str, str]:
    return finding.rule, finding.where, finding.what
