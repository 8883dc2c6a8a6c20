"""What is known of a running demonstration: read from the coordinator's files, never asked of its memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from coordinator import records
from coordinator.journal import Journal
from coordinator.records import Accepted, Anchored, Finished, Opened, Record, Rejected, VersionCommitted
from coordinator.status import LiveStatus, SiteStatus
from coordinator.views import parts_after

ProcessState = Literal["absent", "starting", "running", "killed", "ended"]


@dataclass(frozen=True, slots=True)
class Score:
    """The task's measures on the held-out notes by name, each 0 to 1."""

    measures: Mapping[str, float]
    """The first is the one that models are compared by."""

    @property
    def name(self) -> str:
        """Name of the measure that models are compared by."""
        return next(iter(self.measures))

    @property
    def main(self) -> float:
        """The measure that models are compared by."""
        return self.measures[self.name]


@dataclass(frozen=True, slots=True)
class Meter:
    """A counter that starts anew with each process of a site: what ended processes counted, and the present one."""

    before: int = 0
    now: int = 0

    @property
    def total(self) -> int:
        """Sum over all processes."""
        return self.before + self.now

    def read(self, value: int) -> Meter:
        """Take the newest reading; a smaller one than before comes from a new process."""
        return Meter(self.before + self.now, value) if value < self.now else Meter(self.before, value)


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes of one site's link, over all its processes."""

    up: Meter = Meter()
    down: Meter = Meter()

    def read(self, status: SiteStatus) -> Traffic:
        """Take the newest status; one in which the site has said nothing yet counts nothing."""
        if status.phase is None:
            return self
        return Traffic(self.up.read(status.bytes_up), self.down.read(status.bytes_down))


@dataclass(frozen=True, slots=True)
class Facts:
    """All that the view, the checks and the report rest on, at one moment."""

    live: LiveStatus | None = None
    opened: Opened | None = None
    versions: tuple[VersionCommitted, ...] = ()
    published: tuple[tuple[str, ...], ...] = ()
    """Transfers that make up the state of each version, version 0 first."""
    accepted: tuple[Accepted, ...] = ()
    rejected: tuple[Rejected, ...] = ()
    finished: bool = False
    traffic: Mapping[str, Traffic] = field(default_factory=dict)
    scores: Mapping[int, Score] = field(default_factory=dict)
    """By version."""
    processes: Mapping[str, ProcessState] = field(default_factory=dict)

    @property
    def version(self) -> int:
        """The newest published version; 0 until one was merged."""
        return self.versions[-1].version if self.versions else 0

    @property
    def all_scored(self) -> bool:
        """Whether version 0 and every version since has its score."""
        return len(self.scores) == len(self.versions) + 1

    def site(self, name: str) -> SiteStatus | None:
        """What the coordinator knows of one site."""
        return self.live.sites.get(name) if self.live else None

    @property
    def uplink_transfers(self) -> int:
        """Updates that arrived whole and sound."""
        return len(self.accepted)

    @property
    def downlink_transfers(self) -> int:
        """States that a site must have pulled whole: those it trained on, and the last one, which lets it leave."""
        trained = {(update.site, update.base_version) for update in self.accepted}
        final = {(name, self.version) for name, state in self.processes.items() if self.finished and state == "ended"}
        return len(trained | final)


def with_records(facts: Facts, new: Iterable[Record]) -> Facts:
    """Return `facts` after these records of the journal."""
    versions, accepted, rejected = list(facts.versions), list(facts.accepted), list(facts.rejected)
    opened, finished, published = facts.opened, facts.finished, list(facts.published)
    for record in new:
        match record:
            case Opened():
                opened = record
                published.append(parts_after((), record))
            case VersionCommitted():
                versions.append(record)
                published.append(parts_after(published[-1], record))
            case Anchored():
                published[-1] = parts_after((), record)
            case Accepted():
                accepted.append(record)
            case Rejected():
                rejected.append(record)
            case Finished():
                finished = True
            case _:
                pass  # dropped: the update was accepted, and counts as a transfer all the same
    return replace(
        facts,
        opened=opened,
        versions=tuple(versions),
        published=tuple(published),
        accepted=tuple(accepted),
        rejected=tuple(rejected),
        finished=finished,
    )


def with_status(facts: Facts, live: LiveStatus) -> Facts:
    """Return `facts` after reading the coordinator's live status."""
    traffic = dict(facts.traffic)
    for name, status in live.sites.items():
        traffic[name] = traffic.get(name, Traffic()).read(status)
    return replace(facts, live=live, traffic=traffic)


class Watcher:
    """Reads journal and status of one coordinator, each row once."""

    def __init__(self, storage: Path) -> None:
        self._journal = storage / "journal.sqlite"
        self._status = storage / "status.json"
        self._after = 0

    def read(self, facts: Facts) -> Facts:
        """Return `facts` brought up to date; unchanged until there is a status, which is later than the journal."""
        try:
            text = self._status.read_bytes()
        except FileNotFoundError:
            return facts
        return with_status(with_records(facts, self._new_records()), LiveStatus.model_validate_json(text))

    def _new_records(self) -> list[Record]:
        with Journal.open_read(self._journal) as journal:
            rows = list(journal.rows(after=self._after))
        self._after = rows[-1].seq if rows else self._after
        return [records.from_bytes(row.body) for row in rows]
