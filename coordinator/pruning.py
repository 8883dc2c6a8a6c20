"""Giving up the bytes of old updates, for good and on record: manifests, digests and signatures stay.

    row        `Pruned(version)` in the journal, signed with the next head    == from here on nobody counts on them
    frames     of all updates that were merged up to that version and no later merge reads, deleted
    master     and slots of that version: kept, as version 0 is, for `coordinator.replay` to begin with
    states     and steps: kept, all of them; what is published from there on is a step from one of them

Killed between the row and the last file, the frames that are left harm nobody; `fsck --repair` deletes them. Nothing
is given up that has not been proven to be sound a moment before: what is wrong would be lost sight of.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from coordinator.fsck import fold, mend_trail
from coordinator.journal import Journal
from coordinator.kept import check_master
from coordinator.ledger import Ledger
from coordinator.lineage import summed_up
from coordinator.merging import given_up
from coordinator.optimizers import SLOTS
from coordinator.proof import SHORT, Progress, prove
from coordinator.records import Pruned
from coordinator.views import JOURNAL, not_begun
from shared import durable
from shared.config import FederationConfig
from shared.errors import ConfigError, CorruptError
from shared.plan import SealedPlan


@dataclass(frozen=True, slots=True)
class Pruning:
    """What can be given up, or was."""

    version: int
    updates: int
    size: int
    """Bytes of their frames."""


def survey(storage: Path, federation: FederationConfig, upto: int | None) -> Pruning:
    """Return what would go up to version `upto`; None: up to the one before the newest, so that one can be recomputed.

    ConfigError when no run has begun, or when that version cannot stand in the place of those before it.
    """
    if not (storage / JOURNAL).exists():
        raise not_begun(storage)
    with Journal.open_read(storage / JOURNAL) as journal:
        return _survey(storage, federation, fold(journal), upto)


def prune(
    storage: Path,
    federation: FederationConfig,
    plan: SealedPlan,
    *,
    upto: int | None = None,
    progress: Progress = lambda _share: None,
) -> Pruning:
    """Give up the bytes of the updates merged up to version `upto`; as `survey`.

    CorruptError when anything about the run is wrong, and nothing is done; UnavailableError while a coordinator runs.
    """
    with Journal(storage / JOURNAL) as journal:
        proof = prove(storage, federation, plan, progress=progress)
        wrong = [finding for finding in proof.findings if finding.rule != SHORT]  # which is mended below, as by a start
        if wrong:
            raise CorruptError(f"{storage}: {wrong[0]}", hint="nothing was given up; see: mailboat coordinator fsck")
        ledger = fold(journal)
        found = _survey(storage, federation, ledger, upto)
        journal.append([Pruned(found.version, time.time())])
    mend_trail(storage)
    for path in _frames(storage, federation, ledger, found.version):
        path.unlink()
    durable.fsync_dir(storage / "updates")
    return found


def _survey(storage: Path, federation: FederationConfig, ledger: Ledger, upto: int | None) -> Pruning:
    version = ledger.version - 1 if upto is None else upto
    if not ledger.pruned < version <= ledger.version:
        raise ConfigError(
            f"updates can be given up from version {ledger.pruned + 1} to {ledger.version}, not {version}",
            hint="--upto names a version that was made since the last time",
        )
    recorded = summed_up(0, ledger.published[version], ledger.files[version])
    slots = SLOTS[federation.aggregation.server.optimizer]
    if check_master(storage, version, recorded, slots, required=True):
        raise ConfigError(
            f"the float32 files of version {version} are not here, and nothing could be recomputed without them",
            hint="--upto names one whose files are here: the newest always, and mostly the one before it",
        )
    frames = _frames(storage, federation, ledger, version)
    return Pruning(version, len(frames), sum(path.stat().st_size for path in frames))


def _frames(storage: Path, federation: FederationConfig, ledger: Ledger, version: int) -> list[Path]:
    """Frames that are here and would go."""
    gone = sorted(given_up(ledger.known, version, federation.aggregation))
    paths = (storage / "updates" / f"{update_id}.frames" for update_id in gone)
    return [path for path in paths if path.exists()]
