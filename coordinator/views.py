"""Read-only views of a run, for people and scripts: versions, the life of an update, what each site gave.

Everything follows from the journal's records, and nothing is kept; `load_run` may be called while a coordinator writes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from coordinator.journal import Journal
from coordinator.ledger import Ledger
from coordinator.records import (
    Accepted,
    Anchored,
    Contribution,
    Dropped,
    Finished,
    Opened,
    Quarantined,
    Record,
    Rejected,
    Released,
    Validated,
    VersionCommitted,
)
from coordinator.rows import Restored
from shared.errors import ConfigError
from shared.manifest import Manifest, StepFacts, manifest_from_bytes

Fate = Literal["waiting", "quarantined", "merged", "rejected", "dropped"]

JOURNAL = "journal.sqlite"


@dataclass(frozen=True, slots=True)
class VersionView:
    """A published version; version 0 has no contributions."""

    version: int
    at: float
    """Unix seconds."""
    state: Manifest
    """Of its state, or of the step to it."""
    parts: tuple[str, ...]
    """Transfers that make up its state: one that is whole, and the steps behind it."""
    master_digest: str
    contributions: tuple[Contribution, ...]


@dataclass(frozen=True, slots=True)
class UpdateLife:
    """What the coordinator knows of one update; None where it did not come to that."""

    update_id: str
    site: str
    manifest_sha256: str
    decided_at: float
    """Unix seconds when it was accepted or rejected."""
    fate: Fate
    base_version: int | None = None
    examples: int | None = None
    norm: float | None = None
    """Global L2 norm of the delta."""
    file_digest: str | None = None
    loss: float | None = None
    """On the coordinator's notes, where updates are weighed by it."""
    rule: str | None = None
    """Why it was rejected, dropped or kept apart."""
    detail: str = ""
    settled_at: float | None = None
    """Unix seconds when it was merged, dropped or kept apart."""
    version: int | None = None
    """The version it was merged into."""
    staleness: int | None = None
    weight: float | None = None


@dataclass(frozen=True, slots=True)
class SiteSummary:
    """What one site gave, in counts of updates."""

    site: str
    waiting: int
    merged: int
    rejected: int
    dropped: int
    examples: int
    """Sum over the updates merged; a note counts once for each of them."""
    last_at: float
    """Unix seconds of the last decision about one of its updates."""


@dataclass(frozen=True, slots=True)
class RunView:
    """A run as its journal tells it."""

    opened: Opened
    versions: tuple[VersionView, ...]
    """Ascending, from version 0 on, without gaps."""
    updates: Mapping[str, UpdateLife]
    """By update id, in the order in which they were decided."""
    finished_at: float | None

    @property
    def current(self) -> VersionView:
        """The newest version."""
        return self.versions[-1]


def load_run(storage: Path) -> RunView:
    """Read and verify the journal in a coordinator's storage folder.

    Raises ConfigError when there is none or the run has not begun, CorruptError when its hash chain is broken.
    """
    path = storage / JOURNAL
    if not path.exists():
        raise not_begun(storage)
    with Journal.open_read(path) as journal:
        restored = journal.restore() if journal.pruned() else None
        if restored is None:
            return read_run(journal.replay(), storage)
        return read_run(journal.replay(restored.row), storage, since=restored)


def read_run(records: Iterable[Record], where: Path, *, since: Restored | None = None) -> RunView:
    """Return the view of `records`, given in order; ConfigError names the folder `where` when there are none.

    With a snapshot `since`, they are those behind it. Of what it sums up it knows what became of each update, and not
    when; the time of the snapshot stands for that, and contributions to its versions are left out.
    """
    opened: Opened | None = None
    versions: list[VersionView] = []
    updates: dict[str, UpdateLife] = {}
    finished_at: float | None = None
    if since is not None:
        opened, finished_at = since.ledger.opened, since.row.at if since.ledger.finished else None
        versions += _summed_up(since.ledger, since.row.at)
        updates |= {update_id: _settled(update_id, since) for update_id in since.ledger.known}
        losses = since.ledger.losses
        updates |= {each.update_id: _born(each, losses.get(each.update_id)) for each in since.ledger.pending}
        for each in since.ledger.quarantined.values():
            told = updates[each.update_id]
            born = _born(each, losses.get(each.update_id))
            held = replace(born, fate="quarantined", rule=told.rule, detail=told.detail, settled_at=since.row.at)
            updates[each.update_id] = held
    for record in records:
        match record:
            case Opened():
                opened = record
                state = manifest_from_bytes(record.state)
                parts = parts_after((), record)
                versions.append(VersionView(0, state.created, state, parts, record.master_digest, ()))
            case Accepted() | Rejected():
                updates[record.update_id] = _born(record)
            case Validated() | Quarantined() | Released() | Dropped():
                updates[record.update_id] = _moved(updates[record.update_id], record)
            case VersionCommitted():
                versions.append(_version(record, versions[-1]))
                for part in record.contributions:
                    updates[part.update_id] = _merged(updates[part.update_id], part, record)
            case Anchored():
                versions[-1] = replace(versions[-1], parts=parts_after((), record))
            case Finished():
                finished_at = record.at
    if opened is None:
        raise not_begun(where)
    return RunView(opened, tuple(versions), updates, finished_at)


def not_begun(storage: Path) -> ConfigError:
    """The error that says that there is no journal, or an empty one."""
    return ConfigError(f"{storage}: no run has begun there", hint="start one with: mailboat coordinator run")


def find_version(run: RunView, version: int | None) -> VersionView:
    """Return a version, the newest for None; ConfigError says which there are."""
    if version is None:
        return run.current
    if not 0 <= version < len(run.versions):
        raise ConfigError(
            f"there is no version {version}", hint=f"versions 0 to {run.current.version} have been published"
        )
    return run.versions[version]


def find_update(run: RunView, prefix: str) -> UpdateLife:
    """Return the one update whose id starts with `prefix`; ConfigError when none or several do."""
    found = [life for update_id, life in run.updates.items() if update_id.startswith(prefix.lower())]
    if not found:
        raise ConfigError(
            f"no update with an id that starts with {prefix!r} has been accepted or rejected",
            hint="`mailboat audit tail` lists them; one that is still on its way is not there yet",
        )
    if len(found) > 1:
        ids = ", ".join(life.update_id[: len(prefix) + 4] for life in found[:5])
        raise ConfigError(f"{len(found)} updates start with {prefix!r}: {ids}", hint="give more of its digits")
    return found[0]


def summarise_sites(run: RunView) -> tuple[SiteSummary, ...]:
    """Return a summary for each site that sent an update, by name."""
    by_site: dict[str, list[UpdateLife]] = {}
    for life in run.updates.values():
        by_site.setdefault(life.site, []).append(life)
    return tuple(_summary(site, by_site[site]) for site in sorted(by_site))


def _born(record: Accepted | Rejected, loss: float | None = None) -> UpdateLife:
    if isinstance(record, Rejected):
        return UpdateLife(
            update_id=record.update_id,
            site=record.site,
            manifest_sha256=record.manifest_sha256,
            decided_at=record.at,
            fate="rejected",
            rule=record.rule,
            detail=record.detail,
        )
    return UpdateLife(
        update_id=record.update_id,
        site=record.site,
        manifest_sha256=record.manifest_sha256,
        decided_at=record.at,
        fate="waiting",
        base_version=record.base_version,
        examples=record.examples,
        norm=record.norm,
        file_digest=record.file_digest,
        loss=loss,
    )


def _moved(life: UpdateLife, record: Validated | Quarantined | Released | Dropped) -> UpdateLife:
    match record:
        case Validated():
            return replace(life, loss=record.loss)
        case Quarantined():
            return replace(life, fate="quarantined", rule=record.rule, detail=record.detail, settled_at=record.at)
        case Released():
            return replace(life, fate="waiting", rule=None, detail="", settled_at=None)
        case Dropped():
            return replace(life, fate="dropped", rule=record.rule, settled_at=record.at)


def _summed_up(ledger: Ledger, at: float) -> Iterator[VersionView]:
    for version, published in ledger.published.items():
        state, master = published.transfers[-1], ledger.files[version].master
        yield VersionView(version, at, state, ledger.parts(version), master, ())


def _settled(update_id: str, since: Restored) -> UpdateLife:
    known, at = since.ledger.known[update_id], since.row.at
    fate: Fate = "waiting" if known.outcome == "accepted" else known.outcome
    return UpdateLife(
        update_id=update_id,
        site=known.site,
        manifest_sha256=known.manifest_sha256,
        decided_at=at,
        fate=fate,
        rule=known.rule,
        detail=known.detail,
        settled_at=at if fate in {"merged", "dropped"} else None,
        version=known.version,
        staleness=known.staleness,
        weight=known.weight,
    )


def _merged(life: UpdateLife, part: Contribution, record: VersionCommitted) -> UpdateLife:
    return replace(
        life,
        fate="merged",
        settled_at=record.at,
        version=record.version,
        staleness=part.staleness,
        weight=part.weight,
    )


def _version(record: VersionCommitted, before: VersionView) -> VersionView:
    state, parts = manifest_from_bytes(record.state), parts_after(before.parts, record)
    return VersionView(record.version, record.at, state, parts, record.master_digest, record.contributions)


def parts_after(before: tuple[str, ...], record: Opened | VersionCommitted | Anchored) -> tuple[str, ...]:
    """Return the transfers that make up the state that a record publishes: one that is whole, then steps.

    `before` are those of the version before.
    """
    manifest = manifest_from_bytes(record.state)
    return (*(before if isinstance(manifest.facts, StepFacts) else ()), manifest.transfer_id)


def _summary(site: str, lives: Sequence[UpdateLife]) -> SiteSummary:
    fates = [life.fate for life in lives]
    return SiteSummary(
        site=site,
        waiting=fates.count("waiting"),
        merged=fates.count("merged"),
        rejected=fates.count("rejected"),
        dropped=fates.count("dropped"),
        examples=sum(life.examples or 0 for life in lives if life.fate == "merged"),
        last_at=max(max(life.decided_at, life.settled_at or 0.0) for life in lives),
    )
