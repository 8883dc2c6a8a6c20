"""The durable state of a run: a fold over the journal's records, and nothing else.

Which version is current, which updates wait to be merged, and what became of every update there ever was. Recovery is
applying the journal from its first record, or from its newest snapshot (`coordinator.snapshots`); the result is the
state before the crash, because nothing else changes it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import assert_never

from coordinator.records import (
    Accepted,
    Anchored,
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
from shared.manifest import Manifest, StepFacts, manifest_from_bytes
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
class Published:
    """How a version can be had: whole, as the step from the version before, or both."""

    digest: str
    """Digest of its state, in hex: what updates that start from it name."""
    whole: Manifest | None
    step: Manifest | None

    @property
    def transfers(self) -> tuple[Manifest, ...]:
        """What there is of it to send, the whole state first."""
        return tuple(each for each in (self.whole, self.step) if each is not None)


@dataclass(frozen=True, slots=True)
class Files:
    """BLAKE3 (hex) of a version's master, and of its optimizer's slots, None where it has none."""

    master: str
    optimizer: str | None


class Ledger:
    """See the module's docstring; `version` is -1 until the run was opened."""

    def __init__(self) -> None:
        self.version = -1
        self.opened: Opened | None = None
        self.published: dict[int, Published] = {}
        """How each version can be had."""
        self.transfers: dict[str, Manifest] = {}
        """All that was ever published, by transfer id."""
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
    def newest(self) -> Published:
        """The current version."""
        return self.published[self.version]

    def parts(self, version: int) -> tuple[TransferId, ...]:
        """The transfers that make up the state of a version: one that is whole, and the steps behind it, in order."""
        steps: list[TransferId] = []
        while (whole := self.published[version].whole) is None:
            step = self.published[version].step
            assert step is not None, f"version {version} was published"
            steps.append(step.transfer_id)
            version -= 1
        return (whole.transfer_id, *reversed(steps))

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
                self.publish(0, manifest_from_bytes(record.state))
                self.files[0] = Files(record.master_digest, None)
            case Accepted():
                assert record.update_id not in self.known, f"update {record.update_id} was decided before"
                self.pending.append(record)
                self.known[record.update_id] = Known(record.site, record.manifest_sha256, "accepted")
            case Rejected():
                assert record.update_id not in self.known, f"update {record.update_id} was decided before"
                self.known[record.update_id] = Known(
                    record.site, record.manifest_sha256, "rejected", record.rule, record.detail
                )
            case Validated() | Quarantined() | Released() | Dropped():
                self._apply_waiting(record)
            case VersionCommitted():
                self._apply_version(record)
            case Anchored():
                self.anchor(record.version, manifest_from_bytes(record.state))
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

    def _apply_waiting(self, record: Validated | Quarantined | Released | Dropped) -> None:
        match record:
            case Validated():
                assert record.update_id in self.known, f"update {record.update_id} was never accepted"
                self.losses[record.update_id] = record.loss
            case Quarantined() | Released():
                self._apply_quarantine(record)
            case Dropped():
                self.pending = [update for update in self.pending if update.update_id != record.update_id]
                self.quarantined.pop(record.update_id, None)
                self.losses.pop(record.update_id, None)
                known = self.known[record.update_id]
                known.outcome, known.rule = "dropped", record.rule
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
        self.publish(record.version, manifest_from_bytes(record.state))
        self.files[record.version] = Files(record.master_digest, record.optimizer_digest)
        merged = {part.update_id for part in record.contributions}
        self.pending = [update for update in self.pending if update.update_id not in merged]
        for part in record.contributions:
            known = self.known[part.update_id]
            assert known.outcome == "accepted", f"update {part.update_id} counted after it was {known.outcome}"
            known.outcome, known.version = "merged", record.version
            self.losses.pop(part.update_id, None)
            known.staleness, known.weight = part.staleness, part.weight

    def publish(self, version: int, manifest: Manifest) -> None:
        """A version exists; asserts that a step leads to it from the version before."""
        is_step = isinstance(manifest.facts, StepFacts)
        assert not is_step or manifest.step.base_digest == self.published[version - 1].digest, "it is a step from there"
        whole, step = (None, manifest) if is_step else (manifest, None)
        self.published[version] = Published(manifest.leads_to, whole, step)
        self.transfers[manifest.transfer_id] = manifest

    def anchor(self, version: int, whole: Manifest) -> None:
        """The state of a published version is here whole; asserts that it is that state."""
        assert whole.file_digest == self.published[version].digest, f"another state than version {version} has"
        self.published[version] = replace(self.published[version], whole=whole)
        self.transfers[whole.transfer_id] = whole

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
