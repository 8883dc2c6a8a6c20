"""The coordinator's machine: the real core, ledger, journal and staging; `service.py`'s duties in virtual time."""

from __future__ import annotations

import hashlib
import math
from collections import deque
from pathlib import Path
from typing import Any

from blake3 import blake3

from coordinator import decisions as d
from coordinator.arrivals import DAMAGED_RETRY_S, sender
from coordinator.core import Core
from coordinator.decisions import Instant
from coordinator.disk import discard_rejected, discard_uncommitted
from coordinator.journal import Journal
from coordinator.masters import check_files, master_path, prune_masters
from coordinator.merging import MergePlan, MergeResult, choosing
from coordinator.publishing import publish
from coordinator.records import Opened, VersionCommitted
from coordinator.renewals import Offers
from shared import durable
from shared.config import CoordinatorConfig
from shared.errors import CorruptError, NoRoomError, RefusedError, UnavailableError
from shared.manifest import Manifest, StateFacts
from shared.messages import Renewed, parse_chunk
from shared.plan import SealedPlan
from shared.room import POLL_S
from shared.states import Imprint
from shared.store import FrameStore
from shared.topics import Channel
from shared.trust.guard import CoordinatorsGuard, TurnedAwayError
from tests.sim.broker import Address
from tests.sim.machine import Machine
from tests.sim.replicas import demand
from tests.sim.shells import VirtualPump, VirtualSpooler
from tests.sim.toys import (
    ToyFrames,
    admit,
    loss_of,
    manifest_of,
    merged_master,
    published_frames,
    read_whole,
    tensors_of,
)
from tests.sim.trust import coordinator_guard, grants
from tests.sim.weather import Scenario
from tests.sim.witness import Witness

READS = (Channel.UP_CTL, Channel.UP_DATA, Channel.PRESENCE)
TICK = d.Tick()
FIRST_MASTER = b"the base model's own layers"


class CoordinatorMachine(Machine):
    """See the module's docstring; `journal_path` is on a real file system."""

    core: Core
    guard: CoordinatorsGuard
    updates: FrameStore
    states: FrameStore
    spooler: VirtualSpooler
    pump: VirtualPump

    def __init__(
        self, scenario: Scenario, plan: SealedPlan, witness: Witness, journal_path: Path, **machine: Any
    ) -> None:
        super().__init__("coordinator", latency_s=0.005, **machine)
        self.scenario = scenario
        self.plan = plan
        self.witness = witness
        self.journal_path = journal_path
        self.journal: Journal | None = None
        self.journal_fails = self.bad_losses = self.slow_losses = 0.0
        self.config = CoordinatorConfig.model_validate({"federation": "f", "storage": "s"}).model_copy(
            update={"link": scenario.link}
        )

    # -- life ---

    def boot(self) -> None:
        """As `run_coordinator` and `Service.run`, up to the link."""
        root = self.disk.path()
        self.updates, self.states = FrameStore(root / "updates"), FrameStore(root / "states")
        self.masters = root / "masters"
        durable.make_folder(self.masters)
        self.journal = Journal(self.journal_path)
        if not self.journal.length:
            self.step()
            self.journal.append([self._genesis()])
        boot = hashlib.sha256(f"boot {self.scenario.seed} {self.life}".encode()).hexdigest()[:16]
        self.guard = coordinator_guard(self.scenario.sealed, self.plan.fingerprint, root / "trust", self.wall)
        self.offers = Offers()
        self.offers.hold(grants() if self.scenario.sealed else {})
        self.core = Core(self.scenario.federation, self.plan, config=self.config, boot=boot, attest=self.guard.attest)
        # Less than any configuration admits, so that a few chunks spend it.
        self.core.uploads.budget_bytes = self.scenario.budget_chunks * 4096
        for store in (self.updates, self.states):
            store.recover()
        records = []
        newest: Opened | VersionCommitted | None = None
        for record in self.journal.replay():
            self.core.apply(record)
            records.append(record)
            newest = record if isinstance(record, Opened | VersionCommitted) else newest
        assert newest is not None
        version = newest.version if isinstance(newest, VersionCommitted) else 0
        check_files(self.masters, version, (), newest.master_digest, None)
        discard_rejected(self.updates, self.core.ledger)
        discard_uncommitted(self.states, self.core.ledger)
        self.spooler = VirtualSpooler(self, self.updates, self._chunks_stored, lambda _rule: None, sender=sender)
        self.pump = VirtualPump(self, self._read_state_chunk, None)
        self._held: d.Decision | None = None
        """What waits for room in the journal, and with it all that is to be decided after it."""
        self._backlog: deque[d.Event] = deque()
        self.witness.recovered(self.core, records, self.updates, self.states)
        if not self.core.ledger.head_is_signed:  # killed between the two
            self._sign_head()

    def part(self) -> None:
        """See Machine."""
        self.spooler.spooler._close_all()

    def ended(self) -> None:
        """See Machine; the journal's lock goes with the process."""
        if self.journal is not None:
            self.journal.close()
            self.journal = None

    def _genesis(self) -> Opened:
        durable.replace_atomic(master_path(self.masters, 0), FIRST_MASTER)
        state, _ = self._publish(0, (), FIRST_MASTER)
        return Opened(
            fingerprint=self.plan.fingerprint,
            config_sha256=self.plan.config_sha256,
            frozen_sha256=self.plan.frozen_sha256,
            state=state.to_bytes(),
            master_digest=blake3(FIRST_MASTER).hexdigest(),
        )

    def _publish(self, version: int, before: tuple[str, ...], master: bytes) -> tuple[Manifest, Manifest | None]:
        federation = self.scenario.federation
        if federation.codec.steps:
            tensors = tensors_of(master, self.scenario)
            imprint = Imprint(federation, self.plan.fingerprint, version)
            return publish(self.states, imprint, before, tensors.__getitem__, self.plan.tensors, created=self.wall)
        frames = ToyFrames(published_frames(master, self.scenario.state_frames))
        facts, wall = StateFacts(version=version), self.wall
        sealing: Any = frames
        state = self.states.seal(
            sealing, lambda summary: manifest_of(self.plan, summary.file_digest[:32], summary, facts, wall)
        )
        return state.manifest, None

    # -- link ---

    def reads(self, address: Address) -> bool:
        """See Machine."""
        return address[0] in READS

    def will(self) -> None:
        """See Machine."""

    def greeting(self) -> None:
        """See Machine."""

    def link_up(self) -> None:
        """See Machine."""
        self.decide(d.LinkUp())

    def link_down(self) -> None:
        """See Machine."""
        self.pump.clear()
        self.decide(d.LinkDown())

    def taken(self, address: Address, data: bytes) -> None:
        """See Machine."""
        channel, site = address
        assert site is not None
        if channel is not Channel.UP_DATA:
            message = self.opened(address, data)
            if isinstance(message, Renewed):
                demand(message.rule is None, f"{site} refused its renewal: {message.rule}")
                self.offers.answered(site, message)
            elif message is not None:
                self.decide(d.Received(site, message))
            return
        chunk = parse_chunk(data)
        if self.core.uploads.accepts(site, chunk.transfer_id, chunk.index):
            self.spooler.put(chunk)

    def _chunks_stored(self, transfer_id: str, indices: tuple[int, ...]) -> None:
        self.later(0, self.decide, d.ChunksStored(transfer_id, indices))

    def refused(self, site: str | None, error: RefusedError) -> None:
        """As `Service.refused`."""
        if isinstance(error, TurnedAwayError):
            self.post((Channel.DOWN_CTL, site), error.answer)

    def ticked(self) -> None:
        """See Machine; and as `Renewals.run`."""
        self.decide(TICK)
        here = {name: site.session for name, site in self.core.sites.items() if site.session is not None}
        for name, renewal in self.offers.due(here, self.clock.now):
            self.post((Channel.DOWN_CTL, name), renewal)

    # -- decide ---

    def decide(self, event: d.Event) -> None:
        """As `Service._decide`: durable, then said, then done."""
        if self._held is not None:
            self._backlog.append(event)
            return
        self.witness.deciding = True
        self._carry_out(self.core.handle(event, Instant(self.clock.now, self.wall)))

    def _carry_out(self, decision: d.Decision) -> None:
        if decision.records and not self._append(decision):
            self._held = decision
            self.later(POLL_S, self._try_again, decision)
            return
        if any(isinstance(record, VersionCommitted) for record in decision.records):
            decision.sends[:0] = self._sign_head()
        self.witness.deciding = False
        for send in decision.sends:
            self.witness.says(self.core, send)
            channel = Channel.ANNOUNCE if send.site is None else Channel.DOWN_CTL
            self.post((channel, send.site), send.message)
        for job in decision.jobs:
            self.step()
            self._start(job)
        self.witness.bounds(self)

    def _sign_head(self) -> list[d.Send]:
        """As `Service._sign_head`; on a full disk the next start does it."""
        assert self.journal is not None
        signed = self.guard.sign_head(self.core.ledger.version, self.journal.length, self.journal.head.hex())
        if signed is None:
            return []
        decision = self.core.signed(*signed, self.wall)
        if not self._append(decision):
            raise UnavailableError("no room for the signature")
        return decision.sends

    def _try_again(self, decision: d.Decision) -> None:
        self._held = None
        self._carry_out(decision)
        while self._backlog and self._held is None:
            self.decide(self._backlog.popleft())

    def _append(self, decision: d.Decision) -> bool:
        assert self.journal is not None
        self.step()
        if self.disk.full:
            return False
        fails = self.rng.random() < self.journal_fails
        self.disk.faults["journal failed"] += fails
        if fails and self.rng.random() < 0.5:
            raise UnavailableError("the journal failed, nothing was written")
        self.told("journal", *decision.records)
        self.witness.commits(decision.records)
        self.journal.append(decision.records)
        self.witness.stored(self.core)
        if fails:
            raise UnavailableError("the journal failed, after it had written")
        self.step()
        return True

    def _start(self, job: d.Job) -> None:
        match job:
            case d.OpenSpool():
                self.spooler.soon(self._open_spool, job.manifest)
            case d.CloseSpool():
                self.witness.closed(job.transfer_id)
                self.spooler.close(job.transfer_id)
            case d.Discard():
                self.spooler.close(job.update_id, delete=True)
            case d.Verify():
                self.spooler.soon(self._finish, job.update_id)
            case d.Validate():
                slow = self.rng.random() < self.slow_losses
                self.later(self.rng.uniform(5.0, 15.0) if slow else self.rng.uniform(0.02, 1.0), self._measure, job)
            case d.Merge():
                self.later(self.rng.uniform(0.02, 1.0), self._merge, job.plan)
            case d.Serve():
                channel = Channel.BULK if job.site is None else Channel.DOWN_DATA
                self.pump.put((channel, job.site), job.transfer_id, job.indices)
            case d.Stop():
                raise AssertionError("this coordinator stays")

    # -- jobs ---

    def _open_spool(self, manifest: Manifest) -> None:
        try:
            have = self.spooler.open(manifest)
        except RefusedError as error:
            self.later(0, self.decide, d.VerifyFailed(manifest.transfer_id, error.rule, error.message))
        except NoRoomError as error:
            self._postpone(manifest.transfer_id, "no-room", error.message, self.config.link.backoff_cap_s)
        except CorruptError:
            self._begin_anew(manifest.transfer_id)
        else:
            self.witness.resumed(manifest, have)
            self.later(0, self.decide, d.SpoolOpened(manifest.transfer_id, have))

    def _finish(self, update_id: str) -> None:
        stored = self.spooler.spooler._finish(update_id)
        self.later(self.rng.uniform(0.01, 0.3), self._admit, stored)

    def _admit(self, stored: Any) -> None:
        update_id = stored.manifest.transfer_id
        if self.rots(stored):
            self.witness.spoilt(update_id)
        try:
            norm = admit(stored)
        except RefusedError as error:
            self.decide(d.VerifyFailed(update_id, error.rule, error.message))
        except CorruptError:
            self.spooler.soon(self._begin_anew, update_id)
        else:
            self.decide(d.Verified(update_id, norm))

    def _measure(self, job: d.Validate) -> None:
        update = self.updates.get(job.update_id)
        assert update is not None, "a verified update is in the store"
        here = all(self.states.get(each) is not None for each in job.base)
        assert here, "the state that it starts from is in the store"
        broken = self.rng.random() < self.bad_losses
        self.disk.faults["loss is no number"] += broken
        self.decide(d.Validated(job.update_id, job.norm, math.nan if broken else loss_of(update.manifest)))

    def _begin_anew(self, update_id: str) -> None:
        self.spooler.spooler._close(update_id, delete=True)
        self._postpone(update_id, "damaged-at-rest", "the coordinator's disk damaged it", DAMAGED_RETRY_S)

    def _postpone(self, update_id: str, rule: str, detail: str, retry_s: float) -> None:
        self.later(0, self.decide, d.Postponed(update_id, rule, detail, retry_s))

    def _merge(self, plan: MergePlan) -> None:
        self.witness.merges(plan)
        if plan.rule == "multi-krum":
            chosen = self.rng.sample(plan.contributions, len(plan.contributions) - 1)
            plan = choosing(plan, {part.update_id for part in chosen})
        self._merge_once_room(plan)

    def _merge_once_room(self, plan: MergePlan) -> None:
        try:
            self._merge_given_room(plan)
        except NoRoomError:
            self.later(POLL_S, self._merge_once_room, plan)

    def _merge_given_room(self, plan: MergePlan) -> None:
        before = master_path(self.masters, plan.base_version).read_bytes()
        parts = []
        for part in plan.recorded():
            stored = self.updates.get(part.update_id)
            assert stored is not None, "an accepted update is in the store"
            parts.append((part, read_whole(stored)))
        master = merged_master(before, parts)
        # In this order, as both are made in one pass, and the master's file gets its name at the end of it.
        state, anchor = self._publish(plan.version, plan.before, master)
        durable.replace_atomic(master_path(self.masters, plan.version), master)
        prune_masters(self.masters, {plan.base_version, plan.version})
        result = MergeResult(state, blake3(master).hexdigest(), None, plan.recorded(), anchor)
        self.later(0.01, self.decide, d.Merged(plan, result))

    def _read_state_chunk(self, transfer_id: str, index: int) -> bytes:
        stored = self.states.get(transfer_id)
        assert stored is not None, "a state of the ledger is in the store"
        return self.guard.seal_chunk(stored.manifest, index, stored.read_frame(index))
