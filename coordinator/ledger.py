"""The durable state of a run: a fold over the journal's records, and nothing else.

Which version is current, which updates wait to be merged, and what became of every update there ever was. Recovery is
applying the journal from its first record, or from its newest snapshot (`coordinator.snapshots`); the result is the
state before the crash, because nothing else changes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import assert_never

from coordinator.records import (
    Accepted,
    Dropped,
    Finished,
    Opened,
    Pruned,
    Quarantined,
    Record,
    Rejected,
    Released,
    Signed,
    Snapshot,
    Substituted,
    Validated,
    VersionCommitted,
    Witnessed,
)
from shared.ids import TransferId
from shared.manifest import Manifest, manifest_from_bytes
from shared.messages import Outcome, Receipt


@dataclass(slots=True)
class Known:
    """What became of one update; about 300 bytes, kept for the life of the run so that nothing counts twice."""

    site: str
    manifest_sha256: str
    outcome: Outcome
    rule: str | None = None
    detail: str = ""
    version: int | None = None
    staleness: int | None = None
    weight: float | None = None


@dataclass(frozen=True, slots=True)
class Files:
    """SHA-256 (hex) of a version's master, and of its optimizer's slots, None where it has none."""

    master: str
    optimizer: str | None


class Ledger:
    """See the module's docstring; `version` is -1 until the run was opened."""

    def __init__(self) -> None:
        self.version = -1
        self.opened: Opened | None = None
        self.states: dict[int, Manifest] = {}
        """Published state of each version."""
        self.files: dict[int, Files] = {}
        """Float32 files of each version; kept are those of the newest one, of version 0, and of `pruned`."""
        self.known: dict[str, Known] = {}
        self.pending: list[Accepted] = []
        """Accepted and not yet merged, in acceptance order."""
        self.losses: dict[str, float] = {}
        """Of updates that are not merged yet, where losses are measured."""
        self.quarantined: dict[str, Accepted] = {}
        """Accepted and kept apart, by id, in the order in which they were."""
        self.finished = False
        self.pruned = 0
        """Updates that were merged up to this version were given up: `coordinator.merging.given_up` says which."""
        self.signed: Signed | None = None
        """The newest head of the chain that was signed."""

    @property
    def state_ids(self) -> dict[int, TransferId]:
        """Transfer id of each version's published state."""
        return {version: manifest.transfer_id for version, manifest in self.states.items()}

    @property
    def state(self) -> Manifest:
        """The current version's published state."""
        return self.states[self.version]

    @property
    def head_is_signed(self) -> bool:
        """Whether the chain was signed since the newest version."""
        return self.signed is not None and self.signed.version == self.version

    def apply(self, record: Record) -> None:
        """Take one fact; asserts that it follows from those before it."""
        match record:
            case Opened():
                self.version = 0
                self.opened = record
                self.states[0] = manifest_from_bytes(record.state)
                self.files[0] = Files(record.master_sha256, None)
            case Accepted():
                assert record.update_id not in self.known, f"update {record.update_id} was decided before"
                self.pending.append(record)
                self.known[record.update_id] = Known(record.site, record.manifest_sha256, "accepted")
            case Validated():
                assert record.update_id in self.known, f"update {record.update_id} was never accepted"
                self.losses[record.update_id] = record.loss
            case Rejected():
                assert record.update_id not in self.known, f"update {record.update_id} was decided before"
                self.known[record.update_id] = Known(
                    record.site, record.manifest_sha256, "rejected", record.rule, record.detail
                )
            case Quarantined() | Released():
                self._apply_quarantine(record)
            case Dropped():
                self.pending = [update for update in self.pending if update.update_id != record.update_id]
                self.quarantined.pop(record.update_id, None)
                self.losses.pop(record.update_id, None)
                known = self.known[record.update_id]
                known.outcome, known.rule = "dropped", record.rule
            case VersionCommitted():
                self._apply_version(record)
            case Finished():
                self.finished = True
            case Signed():
                self.signed = record
            case Pruned():
                assert self.pruned < record.version <= self.version, f"version {record.version} was pruned before"
                self.pruned = record.version
            case Substituted() | Witnessed() | Snapshot():
                pass  # said of the next row; evidence for others; what was applied before it
            case _:
                assert_never(record)

    def _apply_quarantine(self, record: Quarantined | Released) -> None:
        known = self.known[record.update_id]
        if isinstance(record, Released):
            self.pending.append(self.quarantined.pop(record.update_id))
            known.rule, known.detail = None, ""
            return
        held = next(update for update in self.pending if update.update_id == record.update_id)
        self.pending.remove(held)
        self.quarantined[record.update_id] = held
        known.rule, known.detail = record.rule, record.detail

    def _apply_version(self, record: VersionCommitted) -> None:
        assert record.version == self.version + 1, f"version {record.version} follows {self.version}"
        self.version = record.version
        self.states[record.version] = manifest_from_bytes(record.state)
        self.files[record.version] = Files(record.master_sha256, record.optimizer_sha256)
        merged = {part.update_id for part in record.contributions}
        self.pending = [update for update in self.pending if update.update_id not in merged]
        for part in record.contributions:
            known = self.known[part.update_id]
            assert known.outcome == "accepted", f"update {part.update_id} counted after it was {known.outcome}"
            known.outcome, known.version = "merged", record.version
            self.losses.pop(part.update_id, None)
            known.staleness, known.weight = part.staleness, part.weight

    def by_rule(self, rule: str) -> dict[str, list[str]]:
        """Ids of the updates that were rejected or dropped under `rule`, by site."""
        found: dict[str, list[str]] = {}
        for update_id, known in self.known.items():
            if known.rule == rule:
                found.setdefault(known.site, []).append(update_id)
        return found

    def receipt(self, update_id: str) -> Receipt:
        """What a site is told of its update; KeyError for one that was never decided."""
        known = self.known[update_id]
        return Receipt(
            update_id=update_id,
            manifest_sha256=known.manifest_sha256,
            outcome=known.outcome,
            rule=known.rule,
            detail=known.detail,
            version=known.version,
            staleness=known.staleness,
            weight=known.weight,
        )
