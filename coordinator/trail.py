"""The journal read as an auditor reads it: a fold that trusts nothing and names each fact that cannot be right.

`coordinator.ledger` applies records that this coordinator wrote a moment ago and asserts that they follow from each
other. Here they are evidence, perhaps forged with a sound hash chain, so each assertion is a finding instead, and what
the rules determine is worked out anew: the weights of a version, its staleness, and the order of addition.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import assert_never

from coordinator.ledger import Known, Ledger
from coordinator.lineage import Broken, Lineage, RecordedVersion
from coordinator.merging import MergePlan, choosing, in_order, plan_merge
from coordinator.records import (
    Accepted,
    Anchored,
    Contribution,
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
from coordinator.robust import KRUMS, chosen
from coordinator.views import JOURNAL
from shared.config import FederationConfig
from shared.plan import SealedPlan


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is not as it must be."""

    rule: str
    """Name of what was broken, for scripts."""
    where: str
    """File below the storage folder, and the row, frame or field in it."""
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what} [{self.rule}]"


def row_place(seq: int) -> str:
    """How a row is named in a finding."""
    return f"{JOURNAL}: row {seq}"


class Trail:
    """The run so far, as far as it could be followed; `version` is -1 until it was opened."""

    def __init__(self, federation: FederationConfig, plan: SealedPlan) -> None:
        self.federation = federation
        self.plan = plan
        self.version = -1
        self.lineage = Lineage(federation, plan)
        self.known: dict[str, Known] = {}
        self.accepted: dict[str, tuple[int, Accepted]] = {}
        """Row and record of each accepted update, in order of acceptance."""
        self.pending: dict[str, Accepted] = {}
        """Accepted and not yet merged, in order of acceptance."""
        self.losses: dict[str, float] = {}
        """Of updates that are not merged yet."""
        self.quarantined: dict[str, Accepted] = {}
        """Accepted and kept apart."""
        self.answered: set[str] | None = set()
        """Sites whose update was rejected or kept apart since the newest version; None when that is not known."""
        self.substituted: Substituted | None = None
        """What was said of the version of the next row."""
        self.finished = False
        self.pruned = 0
        """As in the ledger."""

    @property
    def versions(self) -> Mapping[int, RecordedVersion]:
        """What the journal says of each version."""
        return self.lineage.versions

    def begin(self, seq: int, ledger: Ledger) -> None:
        """Start from the snapshot of row `seq`, because the rows before it are not here."""
        self.version, self.finished, self.answered = ledger.version, ledger.finished, None
        self.pruned = ledger.pruned
        self.lineage.begin(seq, ledger)
        self.known = {update_id: dataclasses.replace(known) for update_id, known in ledger.known.items()}
        self.pending = {accepted.update_id: accepted for accepted in ledger.pending}
        self.losses = dict(ledger.losses)
        self.quarantined = dict(ledger.quarantined)
        waiting = (*ledger.pending, *ledger.quarantined.values())
        self.accepted = {accepted.update_id: (seq, accepted) for accepted in waiting}

    def differs(self, ledger: Ledger) -> str | None:
        """Name what a snapshot says otherwise than the rows before it; None when it sums them up rightly."""
        held, theirs_held = list(self.quarantined.values()), list(ledger.quarantined.values())
        end, their_end = (self.finished, self.pruned), (ledger.finished, ledger.pruned)
        versions = self.lineage.differs(ledger)
        said = (versions, list(self.known.items()), list(self.pending.values()), held, self.losses, end)
        told = (False, list(ledger.known.items()), ledger.pending, theirs_held, ledger.losses, their_end)
        names = ("versions", "decided updates", "waiting updates", "quarantine", "losses", "end, or beginning")
        return next((name for name, a, b in zip(names, said, told, strict=True) if a != b), None)

    def take(self, seq: int, record: Record) -> list[Finding]:
        """Follow one fact, as far as it can be followed, and return what is wrong with it."""
        where = row_place(seq)
        return [Finding(rule, where, what) for rule, what in self._take(seq, record)]

    def plan_for(self, record: VersionCommitted) -> MergePlan | None:
        """Return how the rules make this version, to be asked before `take`; None when they make none of it."""
        updates = [self.pending.get(part.update_id) for part in record.contributions]
        merged = [update for update in updates if update is not None]
        section = self.federation.aggregation
        sound = (
            len(merged) == len(record.contributions) == len({part.update_id for part in record.contributions})
            and record.version == self.version + 1 >= 1
            and all(update.base_version in self.versions and update.examples >= 1 for update in merged)
            and (len(merged) == 1 if section.mode == "fedasync" else bool(merged))
            and (section.quality == "none" or all(update.update_id in self.losses for update in merged))
        )
        if not sound:
            return None
        return plan_merge(record.version, merged, section, self.lineage.parts, known=self.known, losses=self.losses)

    # -- one record ---

    def _take(self, seq: int, record: Record) -> Iterator[Broken]:
        if (self.version < 0) != isinstance(record, Opened):
            yield "opened-once", f"{record.kind} {'before the run was' if self.version < 0 else 'again, it was'} opened"
        if self.finished and not isinstance(record, Rejected | Signed | Pruned | Snapshot):
            yield "after-the-end", f"{record.kind} after the run was finished"
        match record:
            case Opened():
                yield from self._opened(seq, record)
            case Accepted():
                yield from self._accepted(seq, record)
            case Rejected():
                yield from self._rejected(record)
            case Validated() | Quarantined() | Released() | Dropped():
                yield from self._waiting(record)
            case Substituted():
                self.substituted = record
            case VersionCommitted() | Anchored():
                yield from self._published(seq, record)
            case Signed() | Witnessed():
                pass  # `coordinator.seals` follows them
            case Finished() | Pruned() | Snapshot():
                yield from self._of_the_run(record)
            case _:
                assert_never(record)

    def _opened(self, seq: int, record: Opened) -> Iterator[Broken]:
        for name in ("fingerprint", "config_sha256", "frozen_sha256"):
            if getattr(record, name) != getattr(self.plan, name):
                yield "other-plan", f"its {name} is not that of plan.json"
        self.version = max(self.version, 0)
        yield from self.lineage.publish(seq, 0, record.state, record.master_digest)

    def _accepted(self, seq: int, record: Accepted) -> Iterator[Broken]:
        if record.update_id in self.known:
            yield "decided-twice", f"update {record.update_id} was decided before"
            return
        if not 0 <= record.base_version <= self.version:
            yield "base-unknown", f"it starts from version {record.base_version}, the newest is {self.version}"
        if record.examples < 1:
            yield "no-examples", "an update of no examples"
        self.known[record.update_id] = Known(record.site, record.manifest_sha256, "accepted")
        self.accepted[record.update_id] = (seq, record)
        self.pending[record.update_id] = record

    def _published(self, seq: int, record: VersionCommitted | Anchored) -> Iterator[Broken]:
        if isinstance(record, Anchored):
            yield from self.lineage.anchor(record, self.version)
        else:
            yield from self._committed(seq, record)

    def _validated(self, record: Validated) -> Iterator[Broken]:
        if self.federation.aggregation.quality == "none" or record.update_id in self.losses:
            yield "validated-in-vain", f"update {record.update_id} has a loss, and needs none or had one"
        if record.update_id not in self.pending:
            yield "not-pending", f"update {record.update_id} is validated, but was not waiting"
            return
        self.losses[record.update_id] = record.loss

    def _rejected(self, record: Rejected) -> Iterator[Broken]:
        if record.update_id in self.known:
            yield "decided-twice", f"update {record.update_id} was decided before"
            return
        known = Known(record.site, record.manifest_sha256, "rejected", record.rule, record.detail)
        self.known[record.update_id] = known
        self._answer(record.site)

    def _waiting(self, record: Validated | Quarantined | Released | Dropped) -> Iterator[Broken]:
        match record:
            case Validated():
                yield from self._validated(record)
            case Quarantined():
                yield from self._quarantined(record)
            case Released():
                yield from self._released(record)
            case Dropped():
                yield from self._dropped(record)

    def _quarantined(self, record: Quarantined) -> Iterator[Broken]:
        held = self.pending.pop(record.update_id, None)
        if held is None:
            yield "not-pending", f"update {record.update_id} is kept apart, but was not waiting"
            return
        self.quarantined[record.update_id] = held
        self._answer(held.site)
        self.known[record.update_id].rule, self.known[record.update_id].detail = record.rule, record.detail

    def _released(self, record: Released) -> Iterator[Broken]:
        held = self.quarantined.pop(record.update_id, None)
        if held is None:
            yield "not-quarantined", f"update {record.update_id} is released, but was not kept apart"
            return
        self.pending[record.update_id] = held
        self.known[record.update_id].rule, self.known[record.update_id].detail = None, ""

    def _dropped(self, record: Dropped) -> Iterator[Broken]:
        waiting = self.pending.pop(record.update_id, None) or self.quarantined.pop(record.update_id, None)
        self.losses.pop(record.update_id, None)
        if waiting is None:
            yield "not-pending", f"update {record.update_id} is dropped, but was not waiting"
            return
        known = self.known[record.update_id]
        known.outcome, known.rule = "dropped", record.rule

    def _of_the_run(self, record: Finished | Pruned | Snapshot) -> Iterator[Broken]:
        match record:
            case Finished():
                yield from self._finished(record)
            case Pruned():
                if not self.pruned < record.version <= self.version:
                    yield (
                        "pruned-twice",
                        f"up to version {record.version}; before up to {self.pruned} of {self.version}",
                    )
                self.pruned = record.version
            case Snapshot():
                if (record.version, record.updates) != (self.version, len(self.known)):
                    yield "snapshot-differs", f"it sums up version {record.version} and {record.updates} updates"

    def _finished(self, record: Finished) -> Iterator[Broken]:
        last = self.federation.federation.versions
        if not record.version == self.version == last:
            yield "last-version", f"finished at {record.version}; committed {self.version}, agreed were {last}"
        if self.pending or self.quarantined:
            yield (
                "left-pending",
                f"{len(self.pending) + len(self.quarantined)} accepted updates were neither merged nor dropped",
            )
        yield from self.lineage.anchor_due(self.version)
        self.finished = True

    # -- versions ---

    def _committed(self, seq: int, record: VersionCommitted) -> Iterator[Broken]:
        planned = self.plan_for(record)
        if record.version != self.version + 1:
            yield "version-gap", f"version {record.version} follows version {self.version}"
        for part in record.contributions:
            if part.update_id not in self.pending:
                known = self.known.get(part.update_id)
                fate = "was never accepted" if known is None else f"is {known.outcome} already"
                yield "counted-twice" if known else "unknown-update", f"update {part.update_id} {fate}"
            elif self.federation.aggregation.quality != "none" and part.update_id not in self.losses:
                yield "not-validated", f"update {part.update_id} counts, and its loss was never measured"
        yield from self._round(record.contributions)
        if planned is not None:
            yield from self._counted(record, planned)
        self.substituted, self.answered = None, set()
        self._merge(record)
        yield from self.lineage.anchor_due(self.version)
        digests = record.master_digest, record.optimizer_digest
        yield from self.lineage.publish(seq, record.version, record.state, *digests)
        self.version = record.version

    def _round(self, parts: tuple[Contribution, ...]) -> Iterator[Broken]:
        """What the closing rules say of any round, whoever was present."""
        section = self.federation.aggregation
        merged = [part.update_id for part in parts]
        oldest = list(self.pending.values())[: len(merged)]
        # Earlier runs added up in order of acceptance.
        if merged not in ([update.update_id for update in order] for order in (in_order(oldest), oldest)):
            yield "merge-order", "its updates are not the oldest ones waiting, by site, base version and id"
        match section.mode:
            case "sync":
                sites = {part.site for part in parts}
                fits = self.answered is None or len(sites | self.answered) >= section.quorum
            case "fedbuff":
                fits = 1 <= len(parts) <= section.buffer
            case "fedasync":
                fits = len(parts) == 1
            case _:
                assert_never(section.mode)
        if not fits:
            yield "round-size", f"{len(parts)} updates, which no round of mode {section.mode} closes with here"

    def _counted(self, record: VersionCommitted, planned: MergePlan) -> Iterator[Broken]:
        """Whether the rule is the one that was agreed, or told, and the weights follow from it."""
        section, parts, said = self.federation.aggregation, record.contributions, self.substituted
        stands_in = None if planned.rule == section.rule else (record.version, planned.rule, len(parts))
        if stands_in != (None if said is None else (said.version, said.rule, said.updates)):
            told = "nothing" if said is None else f"{said.rule} of {said.updates} for version {said.version}"
            yield "substituted", f"merged by {planned.rule}, and the row before says of what stood in: {told}"
        if planned.rule in KRUMS:
            # Which updates are chosen only their tensors tell; how many, and what each then counts, the rule does.
            counts = {part.update_id for part in parts if part.weight > 0}
            wanted = chosen(planned.rule, len(parts), section.byzantine)
            if len(counts) != wanted:
                yield "contribution", f"{len(counts)} updates count, {planned.rule} chooses {wanted} of {len(parts)}"
                return
            planned = choosing(planned, counts)
        yield from miscounted(planned.recorded(), parts)

    def _answer(self, site: str) -> None:
        if self.answered is not None:
            self.answered.add(site)

    def _merge(self, record: VersionCommitted) -> None:
        for part in record.contributions:
            self.losses.pop(part.update_id, None)
            if self.pending.pop(part.update_id, None) is not None:
                known = self.known[part.update_id]
                known.outcome, known.version = "merged", record.version
                known.staleness, known.weight = part.staleness, part.weight


def miscounted(ours: tuple[Contribution, ...], recorded: tuple[Contribution, ...]) -> Iterator[Broken]:
    """Yield what is recorded of each contribution otherwise than it came out here."""
    for wanted, found in zip(ours, recorded, strict=True):
        for name in ("site", "base_version", "staleness", "weight"):
            given, told = getattr(wanted, name), getattr(found, name)
            if given != told:
                yield "contribution", f"update {found.update_id} has {name} {told}, the rules give {given}"
