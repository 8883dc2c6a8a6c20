"""What crashes leave in a coordinator's folder, and may go: bytes that no row of the journal counts or will count.

    rejected-update    an update that was rejected, or given up; the crash came before its bytes were deleted
    stale-upload       one still arriving, or arrived and never decided, that would be refused if it were offered now
    damaged-upload     one of those whose manifest cannot be read; its site has it still
    uncommitted-state  a state, or a step to one, that a merge wrote, and no row published
    pruned-update      frames of an update that was given up
    stale-master       float32 files of a version that is neither 0, nor pruned up to, nor one of the newest two
    loose-segment      rows copied for a compaction that did not commit; the journal has them
    litter             files under temporary names, frames that no manifest speaks of

A journal that was put back from a backup knows less than the files beside it. Files from behind its newest version are
therefore never leftovers; they are named under the rule `journal-behind`, and left alone.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from coordinator.ledger import Ledger
from coordinator.masters import version_of
from coordinator.merging import given_up
from coordinator.rows import ARCHIVE, JournalReader
from coordinator.trail import Finding
from shared import durable
from shared.config import FederationConfig
from shared.errors import RefusedError
from shared.manifest import Manifest, UpdateFacts, manifest_from_bytes
from shared.messages import LOST

BEHIND = "journal-behind"
VALIDATION = "validation"
"""Folder of the model whose loss is being measured."""


@dataclass(frozen=True, slots=True)
class Leftover:
    """Files that may go, in the order in which they must."""

    finding: Finding
    paths: tuple[Path, ...]

    def remove(self) -> None:
        """Delete them, durably where the order matters."""
        *first, last = self.paths
        for path in first:
            durable.remove(path)
        if last.is_dir():  # scratch of a repair that was killed
            shutil.rmtree(last)
        else:
            last.unlink(missing_ok=True)


def find_leftovers(
    storage: Path, journal: JournalReader, ledger: Ledger, federation: FederationConfig
) -> tuple[list[Leftover], list[Finding]]:
    """Return what may go, and what stays because the journal is behind it; nobody else may write meanwhile."""
    leftovers: list[Leftover] = []
    behind: list[Finding] = []
    for found in (
        *_updates(storage, ledger, federation),
        *_states(storage, ledger),
        *_masters(storage, ledger),
        *_segments(storage, journal),
        *_litter(storage),
    ):
        if isinstance(found, Leftover):
            leftovers.append(found)
        else:
            behind.append(found)
    return leftovers, behind


def _updates(storage: Path, ledger: Ledger, federation: FederationConfig) -> Iterator[Leftover | Finding]:
    limit = federation.aggregation.staleness.limit
    pruned = given_up(ledger.known, ledger.pruned, federation.aggregation)
    for path in _manifests(storage / "updates"):
        update_id = path.name.partition(".")[0]
        known = ledger.known.get(update_id)
        if known is not None:
            frames = path.with_suffix(".frames")
            if known.outcome == "rejected" or known.rule == LOST:
                yield _transfer(path, "rejected-update", f"rejected under the rule {known.rule}")
            elif update_id in pruned and frames.exists():
                what = f"of version {known.version}, whose updates were given up"
                yield Leftover(Finding("pruned-update", _place(frames), what), (frames,))
            continue
        manifest = _manifest(path)
        if manifest is None or not isinstance(manifest.facts, UpdateFacts):
            yield _transfer(path, "damaged-upload", "never decided, and its manifest cannot be read")
            continue
        late = ledger.version - manifest.update.base_version
        if late < 0:
            yield _behind(path, f"it starts from version {manifest.update.base_version}", ledger)
        elif ledger.finished or late > limit:
            why = "the run is complete" if ledger.finished else f"it is {late} versions late"
            yield _transfer(path, "stale-upload", f"never decided, and {why}")


def _states(storage: Path, ledger: Ledger) -> Iterator[Leftover | Finding]:
    for path in _manifests(storage / "states"):
        if path.name.partition(".")[0] in ledger.transfers:
            continue
        manifest = _manifest(path)
        if manifest is not None and not isinstance(manifest.facts, UpdateFacts):
            version = manifest.version
            # A merge that did not commit leaves the version after the newest one, and no later one.
            if version > ledger.version + 1:
                yield _behind(path, f"it is version {version}", ledger)
                continue
        yield _transfer(path, "uncommitted-state", "no row published it")


def _masters(storage: Path, ledger: Ledger) -> Iterator[Leftover | Finding]:
    for path in sorted((storage / "masters").glob("v*.safetensors")):
        version = version_of(path)
        if version is None or version in {0, ledger.pruned, ledger.version - 1, ledger.version}:
            continue
        if version > ledger.version + 1:
            yield _behind(path, f"it is version {version}", ledger)
        else:
            yield Leftover(
                Finding("stale-master", _place(path), f"of version {version}, which needs it no more"), (path,)
            )


def _segments(storage: Path, journal: JournalReader) -> Iterator[Leftover | Finding]:
    named = {segment.path.name for segment in journal.segments()}
    for path in sorted((storage / ARCHIVE).glob("rows-*.sqlite")):
        if path.name in named:
            continue
        last = int(path.stem.rpartition("-")[2])
        if next(journal.rows(last - 1, limit=1), None) is None:
            yield Finding(BEHIND, _place(path), f"it holds rows up to {last}, and the journal ends before")
        else:
            yield Leftover(Finding("loose-segment", _place(path), "the journal has its rows"), (path,))


def _litter(storage: Path) -> Iterator[Leftover]:
    for name in ("", "updates", "states", "masters", ARCHIVE):
        for path in durable.temporaries(storage / name):
            yield Leftover(Finding("litter", _place(path), "a file that was being written, or to be"), (path,))
    for path in sorted((storage / VALIDATION).glob("*")):
        yield Leftover(Finding("litter", _place(path), "a model that was being measured"), (path,))
    for name in ("updates", "states"):
        for path in sorted((storage / name).glob("*.frames")):
            if not any(path.with_suffix(suffix).exists() for suffix in (".manifest", ".part.manifest")):
                yield Leftover(Finding("litter", _place(path), "frames that no manifest speaks of"), (path,))


def _manifests(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.manifest"))


def _manifest(path: Path) -> Manifest | None:
    try:
        return manifest_from_bytes(path.read_bytes())
    except RefusedError:
        return None


def _transfer(path: Path, rule: str, what: str) -> Leftover:
    # Manifest first: frames without one are litter, one without frames would look like damage.
    frames = path.with_name(f"{path.name.partition('.')[0]}.frames")
    return Leftover(Finding(rule, _place(path), what), (path, frames))


def _behind(path: Path, what: str, ledger: Ledger) -> Finding:
    return Finding(BEHIND, _place(path), f"{what}, and the journal ends at version {ledger.version}")


def _place(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"
