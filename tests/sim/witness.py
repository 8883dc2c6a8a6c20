"""Checkers that keep books of their own, from what was said and stored, and believe nothing that the code believes.

Held at any time:
    an update with a receipt stays known, with an outcome that only moves on, and its bytes stay readable
    no update counts in two versions, or counts at all without having been sealed and accepted
    versions are contiguous, and each one's digests are those of a recomputation from its recorded inputs
    the state after replay is the state before the crash
    granted credits stay within the budget, windows within what was granted, disk and memory within their bounds
    what a bitmap has promised is there after any crash; a sealed update stays in the outbox until its receipt
    a loss is recorded once, beside the acceptance, and the weights of a version follow from the losses
    a site holds, steps on from and trains on what was published, bit for bit, and on nothing else
After the faults (`ended`): every sealed update of a site that stayed has its answer, and every such site the last
version.

There is no privacy ledger yet, and so no check of one.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

from blake3 import blake3

from coordinator.core import Core
from coordinator.decisions import Send
from coordinator.ledger import Ledger
from coordinator.merging import MergePlan
from coordinator.records import (
    Accepted,
    Anchored,
    Dropped,
    Finished,
    Opened,
    Record,
    Rejected,
    Signed,
    Substituted,
    Validated,
    VersionCommitted,
)
from edge_client import decisions as sd
from edge_client.outbox import Outbox
from shared.manifest import Manifest
from shared.messages import Message, Receipt, Want
from shared.store import FrameStore
from shared.transfer import Bitmap
from tests.factories import SLICE
from tests.sim.replicas import Replicas, ViolationError, demand
from tests.sim.toys import loss_of, merged_master, read_whole
from tests.sim.weather import Scenario

if TYPE_CHECKING:
    from tests.sim.coordinator import CoordinatorMachine
    from tests.sim.machine import Machine
    from tests.sim.site import SiteMachine

MOVES_TO = {
    "accepted": {"accepted", "merged", "dropped"},
    "rejected": {"rejected"},
    "merged": {"merged"},
    "dropped": {"dropped"},
}
TOGETHER = ({"accepted", "merged"}, {"accepted", "dropped"}, {"rejected"})
"""What a site may be told of one update, in whatever order its words arrive."""

MASTERS = 4
"""Of version 0, of the newest, of the one before, and of one that a crash kept from being committed."""

STATES_AT_A_SITE = 4
"""Ready, training, pulling, and the one that was just verified."""


class Witness:
    """See the module's docstring."""

    def __init__(self, scenario: Scenario, first_master: bytes, fingerprint: str) -> None:
        self.scenario = scenario
        self.deciding = False
        """A decision was made and is not yet stored: a crash now undoes it."""
        self._payload: dict[str, list[bytes]] = {}
        self.sealed: dict[str, Manifest] = {}
        self.receipts: dict[str, str] = {}
        """Outcome that a site was last told, by update."""
        self._kept: dict[str, set[str]] = {name: set() for name in scenario.names}
        self._left: dict[str, list[bytes]] = {}
        """Frames of what each update left out."""
        self._owing: dict[str, str] = dict.fromkeys(scenario.names, "")
        """The update whose residual counts at a site."""
        self._forgiven: set[str] = set()
        """Sites that may have dropped their residual, or not yet."""
        self._records: list[Record] = []
        self._uncertain: list[Record] = []
        """Handed to the journal; whether they are there is known when it returns, or after the next start."""
        self._pending: set[str] = set()
        self.decided: dict[str, str] = {}
        self.version = -1
        self.finished = False
        self._master = first_master
        self.replicas = Replicas(scenario, fingerprint)
        self._acknowledged: dict[str, set[int]] = {}
        self._spoilt: set[str] = set()
        self._granted: dict[str, int] = {}
        self._window: dict[str, int] = {}
        self._handed: dict[str, int] = {}
        self._before: Ledger | None = None
        self._looked_at: dict[tuple[str, str], int] = {}
        """Changes of a machine's folder when it was looked at last."""
        self._losses: dict[str, float] = {}
        self._last_of: dict[str, str] = {}
        """Each site's update that was merged last."""
        self._substituted: Substituted | None = None
        self._answered: set[str] = set()
        """Sites with a rejected update since the last version."""

    @property
    def outcomes(self) -> Counter[str]:
        """What became of the updates that were sealed; some of a site that went away for ever have no outcome."""
        return Counter(self.decided.get(update_id, "open") for update_id in self.sealed)

    # -- the journal ---

    def commits(self, records: list[Record]) -> None:
        """The coordinator hands facts to the journal."""
        self._uncertain = list(records)

    def stored(self, core: Core) -> None:
        """The journal has returned: they are facts."""
        self._take(self._uncertain)
        self._uncertain = []
        self._before = core.ledger

    def _take(self, records: list[Record]) -> None:
        for record in records:
            self._fact(record)
        self._records += records

    def _fact(self, record: Record) -> None:
        demand(not self.finished or isinstance(record, Rejected | Signed), f"{record.kind} after the end")
        match record:
            case Opened():
                self._publish(0, record.state, record.master_digest)
            case Accepted():
                mine = self.sealed.get(record.update_id)
                demand(mine is not None, f"update {record.update_id} was accepted and never sealed")
                demand(record.update_id not in self.decided, f"update {record.update_id} was decided before")
                self.decided[record.update_id] = "accepted"
                self._pending.add(record.update_id)
            case Validated():
                self._validated(record)
            case Substituted():
                self._substituted = record
            case Rejected():
                demand(record.update_id not in self.decided, f"update {record.update_id} was decided before")
                self.decided[record.update_id] = "rejected"
                self._answered.add(record.site)
            case Dropped():
                demand(record.update_id in self._pending, f"update {record.update_id} was dropped, but not pending")
                self._pending.remove(record.update_id)
                self.decided[record.update_id] = "dropped"
            case VersionCommitted():
                self._committed(record)
            case Anchored():
                self.replicas.anchor(record.version, record.state)
            case Finished():
                demand(record.version == self.version, f"finished at {record.version}, not {self.version}")
                demand(not self._pending, "finished with updates pending")
                self.finished = True

    def _committed(self, record: VersionCommitted) -> None:
        demand(record.version == self.version + 1, f"version {record.version} follows {self.version}")
        demand(record.contributions, f"version {record.version} of nothing")
        self._closed_by_rule(record)
        self._counted_by_rule(record)
        order = [(part.site, part.base_version, part.update_id) for part in record.contributions]
        demand(order == sorted(order), f"version {record.version} is added up in an order of its own")
        for part in record.contributions:
            demand(
                part.update_id in self._pending,
                f"update {part.update_id} counts in version {record.version}, but was "
                f"{self.decided.get(part.update_id, 'never seen')}",
            )
            self._pending.remove(part.update_id)
            self.decided[part.update_id] = "merged"
            facts = self.sealed[part.update_id].update
            demand(facts.base_version == part.base_version, "a contribution names another base than its update")
            demand(part.staleness == record.version - 1 - part.base_version, "a contribution of another staleness")
        self._master = merged_master(
            self._master, [(part, self._payload[part.update_id]) for part in record.contributions]
        )
        self._publish(record.version, record.state, record.master_digest)

    def _closed_by_rule(self, record: VersionCommitted) -> None:
        """One update for fedasync, at most a buffer of them for fedbuff, an answer of a quorum of sites for sync."""
        section, count = self.scenario.federation.aggregation, len(record.contributions)
        sites = {part.site for part in record.contributions} | self._answered
        kept = {"fedasync": count == 1, "fedbuff": count <= section.buffer, "sync": len(sites) >= section.quorum}
        demand(kept[section.mode], f"version {record.version} of {count} updates of {sorted(sites)}, {section.mode}")
        self._answered.clear()

    def _validated(self, record: Validated) -> None:
        section, manifest = self.scenario.federation.aggregation, self.sealed[record.update_id]
        demand(section.quality != "none", "a loss was measured that nobody asked for")
        demand(self.decided.get(record.update_id) == "accepted", "a loss of an update that was not accepted")
        demand(record.update_id not in self._losses, "a loss was recorded twice")
        demand(record.loss == loss_of(manifest), "the loss of another update")
        self._losses[record.update_id] = record.loss

    def _counted_by_rule(self, record: VersionCommitted) -> None:
        """Weights by loss and size, how many Krum leaves out, and what is said of a round that is too small for it."""
        section, parts, said = self.scenario.federation.aggregation, record.contributions, self._substituted
        self._substituted = None
        few = section.rule == "multi-krum" and len(parts) < 5
        demand(few == (said is not None), f"version {record.version} of {len(parts)} by {section.rule}: {said}")
        demand(said is None or (said.version, said.updates) == (record.version, len(parts)), f"of another: {said}")
        if section.rule == "multi-krum" and not few:
            demand(sum(part.weight == 0 for part in parts) == 1, "multi-krum left out more than one, or none")
        if section.quality != "none":
            shares = []
            for part in parts:
                demand(part.update_id in self._losses, f"update {part.update_id} counts without a loss")
                size = self.sealed[part.update_id].update.examples if section.quality == "size-exp-loss" else 1
                shares.append(size * math.exp(-self._losses[part.update_id]))
            for part, share in zip(parts, shares, strict=True):
                wanted = share / sum(shares) / math.sqrt(1 + part.staleness)
                demand(math.isclose(part.weight, wanted, rel_tol=1e-9), f"{part} counts {part.weight}, not {wanted}")
        for part in parts:
            self._last_of[part.site] = part.update_id

    def merges(self, plan: MergePlan) -> None:
        """A merge begins: what CA2FL takes from before is each site's update that was merged last."""
        cached = {each.site: each.update_id for each in plan.cached}
        wanted = self._last_of if plan.rule == "ca2fl" else {}
        demand(cached == wanted, f"version {plan.version} takes {cached} from before, not {wanted}")

    def _publish(self, version: int, state: bytes, master_digest: str) -> None:
        demand(blake3(self._master).hexdigest() == master_digest, f"version {version} is not what its inputs give")
        self.replicas.publish(version, self._master, state)
        self.version = version

    def recovered(self, core: Core, records: list[Record], updates: FrameStore, states: FrameStore) -> None:
        """A coordinator has read its journal again."""
        known, uncertain = len(self._records), self._uncertain
        demand(records[:known] == self._records, "the journal lost or changed what it had stored")
        rest = records[known:]
        demand(not known or rest in ([], uncertain), "the journal holds what was never handed to it")
        self._uncertain = []
        self._take(rest)
        self._same_ledger(core.ledger, bool(rest))
        self.replicas.recovered(core.ledger, states)
        for update_id, outcome in self.receipts.items():
            now = core.ledger.known.get(update_id)
            demand(now is not None, f"update {update_id} has a receipt ({outcome}) and is forgotten")
            demand(now is not None and now.outcome in MOVES_TO[outcome], f"update {update_id} was {outcome} and is not")
        for update_id, outcome in self.decided.items():
            if outcome in {"accepted", "merged"}:
                stored = updates.get(update_id)
                demand(stored is not None, f"accepted update {update_id} is not in the store")
                demand(stored is not None and read_whole(stored) == self._payload[update_id], "its bytes changed")
        # Grants and what was on its way are forgotten with the process.
        self._granted.clear()

    def _same_ledger(self, now: Ledger, moved_on: bool) -> None:
        before, self._before = self._before, now
        if before is not None and not moved_on and not self.deciding:
            for name in ("version", "published", "known", "pending", "losses", "finished"):
                demand(getattr(before, name) == getattr(now, name), f"after replay the ledger's {name} differ")
        self.deciding = False

    # -- the coordinator's words ---

    def says(self, core: Core, send: Send) -> None:
        """The coordinator is about to send something."""
        match send.message:
            case Want():
                self._wants(core, send.message)
            case Receipt(rule="id-reused"):
                raise ViolationError("two updates under one id")
            case _:
                pass

    def _wants(self, core: Core, want: Want) -> None:
        manifest = self.sealed.get(want.transfer_id)
        if manifest is None:
            return
        have = Bitmap.from_bytes(manifest.frames, want.have)
        self._acknowledged[want.transfer_id] = {index for index in range(manifest.frames) if index in have}
        self._granted[want.transfer_id] = min(want.window, manifest.frames - len(have)) * SLICE

    def closed(self, transfer_id: str) -> None:
        """The coordinator took a grant back."""
        self._granted.pop(transfer_id, None)

    def resumed(self, manifest: Manifest, have: bytes) -> None:
        """An update's spool was opened: what was acknowledged is there."""
        held = Bitmap.from_bytes(manifest.frames, have)
        lost = [index for index in self._acknowledged.get(manifest.transfer_id, ()) if index not in held]
        if lost and manifest.transfer_id in self._spoilt:  # noticed only now, and perhaps acknowledged again meanwhile
            self._spoilt.remove(manifest.transfer_id)
            return
        demand(not lost, f"chunks {lost} of update {manifest.transfer_id} were acknowledged and are lost")

    def spoilt(self, transfer_id: str) -> None:
        """The coordinator's disk broke what it had promised to hold, before it was accepted."""
        self._acknowledged.pop(transfer_id, None)
        self._spoilt.add(transfer_id)

    def bounds(self, machine: CoordinatorMachine) -> None:
        """After each decision of the coordinator."""
        core, spooler = machine.core, machine.spooler
        uploads, most = core.uploads, 2 * len(self.scenario.sites)
        budget, arrived = uploads.budget_bytes, len(spooler.arrived)
        if uploads.reserved > budget:
            raise ViolationError("more is reserved than the budget holds")
        if uploads.reserved != sum(upload.reserved for upload in uploads._by_id.values()):
            raise ViolationError("what is reserved is not what the uploads hold")
        if len(uploads._by_id) > most:
            raise ViolationError("more uploads than one under way and one in admission for each site")
        if len(spooler.spooler._open) > most:
            raise ViolationError("more files open than that")
        if arrived * SLICE > 2 * budget:
            raise ViolationError(f"{arrived} chunks in memory, twice the budget is {2 * budget // SLICE}")
        if self._granted:
            for update_id in [each for each in self._granted if each not in uploads._by_id]:
                del self._granted[update_id]
            granted = sum(self._granted.values())
            demand(granted <= budget, f"{granted} bytes are granted, the budget is {budget}")
        if len(core.downlink.active) > len(self.scenario.sites):
            raise ViolationError("more pulls than sites")
        self._coordinator_disk(machine)

    def _coordinator_disk(self, machine: CoordinatorMachine) -> None:
        """Bytes of updates: of what is to be kept, of what is on its way, and of rejected ones about to go."""
        updates = self._changed(machine, "updates")
        if updates is not None:
            rejected = [each for each in updates if self.decided.get(each) == "rejected"]
            demand(updates <= self._payload.keys(), "bytes of an update that nobody made")
            demand(len(rejected) <= 2 * len(self.scenario.sites), f"bytes of {len(rejected)} rejected updates")
        states = self._changed(machine, "states")
        if states is not None:
            most = (self.version + 2) * (2 if self.scenario.federation.codec.steps else 1)
            demand(len(states) <= most, f"{len(states)} states of {self.version} versions and the next")
        masters = self._changed(machine, "masters")
        if masters is not None:
            demand(len(masters) <= MASTERS, f"{len(masters)} masters are kept")

    def _changed(self, machine: Machine, name: str) -> set[str] | None:
        """Ids in a folder, unless it is as it was at the last look; files being written do not count.

        Nor do those given up, but for updates, which the coordinator never writes over.
        """
        folder = machine.disk.folders[name]
        if self._looked_at.get((machine.name, name)) == folder.changes:
            return None
        self._looked_at[machine.name, name] = folder.changes
        passed_over = (".tmp-",) if name == "updates" else (".tmp-", ".spare-")
        return {each.partition(".")[0] for each in folder.names if not each.startswith(passed_over)}

    # -- sites ---

    def begins_to_seal(self, update_id: str, frames: list[bytes], left: list[bytes]) -> None:
        """A site has trained."""
        self._payload[update_id] = frames
        self._left[update_id] = left

    def seals(self, site: str, manifest: Manifest) -> None:
        """An update is sealed: from here on it is never lost, and what it left is owed."""
        self.sealed[manifest.transfer_id] = manifest
        self._kept[site].add(manifest.transfer_id)
        self._owing[site] = manifest.transfer_id

    def begins_to_settle(self, site: str, receipt: Receipt) -> None:
        """What is owed goes with an update that is refused, at some moment before its receipt is here."""
        if receipt.update_id in self.sealed and receipt.outcome in {"rejected", "dropped"}:
            self._forgiven.add(site)

    def owes(self, site: str, outbox: Outbox) -> None:
        """A site owes what its last update left, or nothing since one was refused: nothing earlier, nothing later."""
        counts, stored = outbox.residuals._current, outbox.residuals._found()
        if stored is None and site in self._forgiven:
            self._owing[site] = ""
        self._forgiven.discard(site)
        due = self._left.get(self._owing[site], [])
        found = read_whole(stored) if stored else []
        demand(found == due, f"{site} owes what {counts} left, not what {self._owing[site] or 'nobody'} did")

    def reopened(self, site: str, pending: list[Manifest], outbox: Outbox) -> None:
        """A site has started and looked into its outbox."""
        for manifest in pending:
            if manifest.transfer_id not in self.sealed:  # it died after the rename and before it knew
                self.seals(site, manifest)
            for index, frame in enumerate(self._payload[manifest.transfer_id]):
                found = outbox.read_frame(manifest.transfer_id, index)
                demand(found is not None and found[1] == frame, f"sealed update {manifest.transfer_id} changed")
        here = {manifest.transfer_id for manifest in pending}
        for update_id in sorted(self._kept[site] - here):
            # It may have died between the receipt and knowing of it.
            demand(
                outbox._receipts.__truediv__(f"{update_id}.json").exists(),
                f"update {update_id} of {site} left the outbox without a receipt",
            )
            self._kept[site].remove(update_id)
        self._window.pop(site, None)

    def hears(self, site: str, message: Message) -> None:
        """A message reached a site."""
        if isinstance(message, Receipt):
            before = self.receipts.setdefault(message.update_id, message.outcome)
            both = {before, message.outcome}
            demand(
                any(both <= each for each in TOGETHER),
                f"update {message.update_id} was {before} and is {message.outcome}",
            )
            if message.outcome in MOVES_TO[before]:  # an earlier word may come late
                self.receipts[message.update_id] = message.outcome
        elif isinstance(message, Want):
            self._window[site] = message.window
            self._handed[site] = 0

    def settles(self, site: str, receipt: Receipt) -> None:
        """A site has kept a receipt and let the update's bytes go."""
        self._kept[site].discard(receipt.update_id)
        if receipt.outcome in {"rejected", "dropped"}:
            self._owing[site] = ""
        demand(receipt.rule or receipt.outcome in {"accepted", "merged"}, f"{receipt.outcome} without a rule")

    def sends_chunks(self, site: str, job: sd.SendChunks) -> None:
        """A site hands chunks to its link: between two words of the coordinator no more than the window."""
        self._handed[site] = self._handed.get(site, 0) + len(job.indices)
        window = self._window.get(site, 0)
        demand(self._handed[site] <= window, f"{site} sends {self._handed[site]} chunks in a window of {window}")

    def trains(self, site: str, base: Manifest) -> None:
        """A site begins to train."""
        demand(self.replicas.knows(base), f"{site} trains on a state that was never published")

    def leaves(self, site: str, ready: Manifest | None) -> None:
        """A site has ended its run: it holds the last version."""
        demand(self.finished, f"{site} left before the end")
        demand(ready and ready.file_digest == self.replicas.newest, f"{site} left without the last version")

    def site_bounds(self, machine: SiteMachine) -> None:
        """After each decision of a site."""
        if len(machine.session.outbox) > machine.scenario.outbox_max:
            raise ViolationError(f"{machine.name} holds too many updates")
        states = self._changed(machine, "states")
        if states is not None:
            most = STATES_AT_A_SITE + (self.version if self.scenario.federation.codec.steps else 0)
            demand(len(states) <= most, f"{machine.name} keeps {len(states)} states and steps")
        outbox = self._changed(machine, "outbox")
        if outbox is not None:
            most = machine.scenario.outbox_max + 1  # one has its receipt and is about to go
            demand(len(outbox) <= most, f"{machine.name} keeps {len(outbox)} updates")
        residuals = self._changed(machine, "residual") if "residual" in machine.disk.folders else None
        if residuals is not None:
            demand(len(residuals) <= 2, f"{machine.name} keeps {len(residuals)} residuals")

    # -- the end ---

    def ended(self, stayed: list[SiteMachine], updates: FrameStore) -> None:
        """The world came to its end: nothing is open."""
        target = self.scenario.federation.federation.versions
        demand(self.finished, "the run is not finished")
        demand(self.version == target, f"the last version is {self.version}, not {target}")
        for machine in stayed:
            name = machine.name
            demand(not self._kept[name], f"{name} still waits for receipts of {sorted(self._kept[name])}")
            mine = [each for each, manifest in self.sealed.items() if manifest.update.site == name]
            for update_id in mine:
                demand(update_id in self.decided, f"update {update_id} of {name} was never decided")
        kept = {each for each, outcome in self.decided.items() if outcome != "rejected"}
        litter = sorted(set(updates.ids() + updates.partial_ids()) - kept - self._unanswered(stayed))
        demand(not litter, f"the coordinator keeps bytes of {litter}, which no rule keeps")

    def _unanswered(self, stayed: list[SiteMachine]) -> set[str]:
        names = {machine.name for machine in stayed}
        return {each for each, manifest in self.sealed.items() if manifest.update.site not in names}
