"""A site's machine: the real session, outbox and staging; `agent.py`'s duties in virtual time, training but a wait."""

from __future__ import annotations

import hashlib
import math
from typing import Any

from edge_client import decisions as d
from edge_client.heads import Heads
from edge_client.outbox import Outbox
from edge_client.session import Identity, Session
from edge_client.states import States
from shared.errors import CorruptError, NoRoomError, RefusedError
from shared.ids import marked
from shared.manifest import Manifest, StateFacts, StepFacts, UpdateFacts
from shared.messages import Head, Message, Presence, Receipt, Renewal, Renewed, parse_chunk
from shared.plan import SealedPlan
from shared.room import POLL_S
from shared.states import stored_part
from shared.topics import Channel
from shared.trust.guard import SitesGuard, StaleKeyError
from tests.sim.broker import Address
from tests.sim.machine import Machine
from tests.sim.replicas import content_of
from tests.sim.shells import VirtualPump, VirtualSpooler
from tests.sim.toys import BAD, ToyFrames, frames_of, manifest_of
from tests.sim.trust import renewal_rule, site_guard
from tests.sim.weather import Scenario, SitePlan
from tests.sim.witness import Witness

ALL = (Channel.ANNOUNCE, Channel.BULK)
OWN = (Channel.DOWN_CTL, Channel.DOWN_DATA)
TICK = d.Tick()
CONTROL = (Channel.ANNOUNCE, Channel.DOWN_CTL)


class SiteMachine(Machine):
    """See the module's docstring; `exit` is how the process left."""

    session: Session
    guard: SitesGuard
    outbox: Outbox
    states: States
    spooler: VirtualSpooler
    pump: VirtualPump

    def __init__(self, scenario: Scenario, site: SitePlan, plan: SealedPlan, witness: Witness, **machine: Any) -> None:
        super().__init__(site.name, latency_s=site.latency_s, **machine)
        self.scenario = scenario
        self.site = site
        self.plan = plan
        self.witness = witness
        self.bad_updates = 0.0
        self.exit: d.Exit | None = None
        self.trainings = 0
        self.renewed: bytes | None = None
        """The grant that this site took."""

    # -- life ---

    def boot(self) -> None:
        """As `run_site` and `Agent.run`, up to the link."""
        root = self.disk.path()
        self.outbox = Outbox(root)
        self.states = States(root / "states", self.scenario.federation, self.plan.fingerprint)
        self.states.store.recover()
        self.identity = Identity(
            site=self.name,
            session=hashlib.sha256(f"{self.name} {self.scenario.seed} {self.life}".encode()).hexdigest()[:16],
            fingerprint=self.plan.fingerprint,
            config_sha256=self.plan.config_sha256,
            frozen_sha256=self.plan.frozen_sha256,
            software="test",
        )
        self.guard = site_guard(self.name, self.scenario.sealed, self.plan.fingerprint, root / "trust")
        self.heads = Heads(root)
        # Sealed once a process, as the agent does: the broker holds the will for as long as that lives.
        self._away, self._here = self._presence(online=False), self._presence(online=True)
        self._asked_for_keys = -math.inf
        pending = self.outbox.pending()
        self.witness.reopened(self.name, pending, self.outbox)
        self.witness.owes(self.name, self.outbox)
        self.session = Session(
            self.identity,
            link=self.scenario.link,
            outbox=pending,
            trained=self.outbox.trained(),
            outbox_max=self.scenario.outbox_max,
            held=self.states.held(),
        )
        self.spooler = VirtualSpooler(self, self.states.store, self._chunks_stored, self._chunk_refused)
        self.pump = VirtualPump(self, self._read_update_chunk, self._chunk_sent)
        self._training = 0
        self._sealing = False
        """An update that is trained waits for room; see `Agent`."""
        self._unsettled = 0
        """Receipts that wait for room."""
        self._leaving = False

    def part(self) -> None:
        """See Machine."""
        self.spooler.spooler._close_all()

    def ended(self) -> None:
        """See Machine."""

    # -- link ---

    def _presence(self, *, online: bool) -> tuple[Address, bytes]:
        said = Presence(site=self.name, session=self.identity.session, online=online)
        return (Channel.PRESENCE, self.name), self.guard.seal(said, Channel.PRESENCE, self.name, self.wall)

    def reads(self, address: Address) -> bool:
        """See Machine."""
        channel, site = address
        return channel in ALL if site is None else site == self.name and channel in OWN

    def will(self) -> tuple[Address, bytes]:
        """See Machine."""
        return self._away

    def greeting(self) -> tuple[Address, bytes]:
        """See Machine."""
        return self._here

    def link_up(self) -> None:
        """See Machine."""
        self.decide(d.LinkUp())

    def link_down(self) -> None:
        """See Machine."""
        self.pump.clear()
        self.decide(d.LinkDown())

    def taken(self, address: Address, data: bytes) -> None:
        """See Machine."""
        if address[0] in CONTROL:
            message = self.opened(address, data)
            if isinstance(message, Head):
                self.heads.take(message, self.guard.check_head)
            elif isinstance(message, Renewal):
                self._renew(message.grant)
            elif message is not None:
                self.decide(d.Received(message))
            return
        chunk = parse_chunk(data)
        if self.session.pulls.accepts(chunk.transfer_id, chunk.index):
            self.spooler.put(chunk)

    def _renew(self, grant: bytes) -> None:
        """As `Renewals.take`; the kit lies elsewhere and survives whatever happens here."""
        rule = None if grant == self.renewed else renewal_rule(self.name, grant)
        if rule is None:
            self.renewed = grant
        sha256 = hashlib.sha256(grant).hexdigest()
        self._say(Renewed(session=self.identity.session, grant_sha256=sha256, rule=rule))

    def refused(self, _site: str | None, error: RefusedError) -> None:
        """As `Agent.refused`."""
        if isinstance(error, StaleKeyError):
            self._ask_for_keys()

    def _chunk_refused(self, rule: str) -> None:
        if rule == "bad-seal":
            self._ask_for_keys()

    def _ask_for_keys(self) -> None:
        patient = self.clock.now - self._asked_for_keys < self.scenario.link.stall_s
        if self.connection is not None and self.session.welcome and not patient:
            self._asked_for_keys = self.clock.now
            self.link_down()
            self.link_up()

    def ticked(self) -> None:
        """See Machine."""
        self.decide(TICK)

    def _chunks_stored(self, transfer_id: str, indices: tuple[int, ...]) -> None:
        self.later(0, self.decide, d.ChunksStored(transfer_id, indices))

    def _chunk_sent(self, transfer_id: str) -> None:
        self.decide(d.ChunkSent(transfer_id))

    # -- decide ---

    def decide(self, event: d.Event) -> None:
        """As `Agent._decide`."""
        if self._leaving:
            return
        if isinstance(event, d.Received):
            self.witness.hears(self.name, event.message)
        decision = self.session.handle(event, self.clock.now, self.wall)
        for message in decision.sends:
            self._say(message)
        for job in decision.jobs:
            self.step()
            if isinstance(job, d.Exit) and job.rule is None and self._sealing:
                break
            self._start(job)
        self.witness.site_bounds(self)

    def _say(self, message: Message) -> None:
        self.post((Channel.UP_CTL, self.name), message)

    def _start(self, job: d.Job) -> None:
        match job:
            case d.OpenSpool():
                self.spooler.soon(self._open_spool, job.manifest)
            case d.CloseSpool():
                self.spooler.close(job.transfer_id, delete=True)
            case d.Finish():
                self.spooler.soon(self._finish, job.transfer_id)
            case d.StepOn():
                self.later(self.rng.uniform(0.01, 0.5), self._step_on, job)
            case d.Train():
                self._training += 1
                self.witness.trains(self.name, job.base)
                self._train(job.base, self._training)
            case d.CancelTraining():
                if not self._sealing:
                    self._training += 1
            case d.SendChunks():
                self.witness.sends_chunks(self.name, job)
                self.pump.put((Channel.UP_DATA, self.name), job.update_id, job.indices)
            case d.Settle():
                self.spooler.soon(self._settle, job.receipt)
            case d.Exit():
                self._leaving = True
                self.spooler.soon(self._leave, job)

    # -- jobs ---

    def _open_spool(self, manifest: Manifest) -> None:
        try:
            have = self.spooler.open(manifest)
        except NoRoomError:
            self.later(POLL_S, self.spooler.soon, self._open_spool, manifest)
            return
        except (CorruptError, RefusedError):
            self._fetch_again(manifest.transfer_id)
            return
        self._forget_states_but(manifest.transfer_id)
        self.later(0, self.decide, d.SpoolOpened(manifest.transfer_id, have))

    def _finish(self, transfer_id: str) -> None:
        try:
            stored = self.spooler.spooler._finish(transfer_id)
        except CorruptError:
            self._fetch_again(transfer_id)
            return
        self.rots(stored)
        self._forget_states_but(transfer_id)
        if isinstance(stored.manifest.facts, StepFacts):
            self.later(0, self.decide, d.StepReady(transfer_id))
            return
        self.later(0, self.decide, d.StateReady(stored.manifest))

    def _forget_states_but(self, transfer_id: str) -> None:
        self.states.forget_all_but(lambda: {transfer_id, *self.session.states_in_use})

    def _step_on(self, job: d.StepOn) -> None:
        stored = self.states.store.get(self.rng.choice((job.base, *job.steps)).transfer_id)
        if stored is not None:
            self.rots(stored)
        try:
            came = self.states.step_on(job.base, job.steps)
        except NoRoomError:
            self.later(POLL_S, self._step_on, job)
            return
        if isinstance(came, d.StateReady):
            made = self.states.store.get(came.manifest.transfer_id)
            assert made is not None, "a state that was made is in the store"
            self.witness.replicas.check(self.name, came.manifest, content_of(made, self.scenario))
        self.later(0, self.decide, came)

    def _fetch_again(self, transfer_id: str) -> None:
        self.spooler.spooler._close(transfer_id, delete=True)
        self.later(0, self.decide, d.StateBroken(transfer_id))

    def _train(self, base: Manifest, training: int) -> None:
        if training != self._training:
            return
        if self.disk.full:
            self.later(POLL_S, self._train, base, training)
            return
        try:
            stored = stored_part(self.states.store, base.transfer_id)
            self.rots(stored)
            content = content_of(stored, self.scenario)
        except CorruptError:
            self._fetch_again(base.transfer_id)
            return
        self.witness.replicas.check(self.name, base, content)
        self.later(self.site.training_s * self.rng.uniform(0.5, 1.5), self._trained, base, training)

    def _trained(self, base: Manifest, training: int) -> None:
        if training != self._training:
            return
        self.trainings += 1
        update_id = marked(f"{self.rng.getrandbits(80):020x}", self.name)
        bad = self.rng.random() < self.bad_updates
        frames = frames_of(update_id, self.rng.randint(1, 8), BAD if bad else b"\x01")
        facts = UpdateFacts(
            site=self.name,
            base_version=base.state.version,
            base_digest=base.file_digest,
            examples=self.rng.randint(1, 50),
            metrics={},
        )
        left = frames_of(f"{update_id} left", self.rng.randint(1, 2)) if self.scenario.feedback else []
        self.witness.begins_to_seal(update_id, frames, left)
        self._seal(update_id, frames, left, facts)

    def _seal(self, update_id: str, frames: list[bytes], left: list[bytes], facts: UpdateFacts) -> None:
        """As `seal_delta`; that an attempt is repeated under its id does not matter to the outbox."""
        sealing: Any = ToyFrames(frames)
        leaving: Any = ToyFrames(left)
        wall, number = self.wall, StateFacts(version=self.outbox.residuals.next_number)
        self._sealing = True
        try:
            manifest = self.outbox.seal(
                sealing,
                lambda summary: self.guard.witnessed(
                    manifest_of(self.plan, update_id, summary, facts, wall), self.heads.last
                ),
                (leaving, lambda summary: manifest_of(self.plan, update_id, summary, number, wall)) if left else None,
            )
        except NoRoomError:
            self.later(POLL_S, self._seal, update_id, frames, left, facts)
            return
        self._sealing = False
        self.witness.seals(self.name, manifest)
        self.witness.owes(self.name, self.outbox)
        bad = frames[0].startswith(BAD)
        self.told(self.name, "sealed", update_id[:8], "of version", facts.base_version, "bad" if bad else "")
        self.decide(d.Trained(manifest))

    def _settle(self, receipt: Receipt) -> None:
        self.witness.begins_to_settle(self.name, receipt)
        try:
            base_digest = self.outbox.settle(receipt)
        except NoRoomError:
            self._unsettled += 1
            self.later(POLL_S, self._settle_again, receipt)
            return
        if base_digest is not None:
            self.witness.settles(self.name, receipt)
        self.witness.owes(self.name, self.outbox)

    def _settle_again(self, receipt: Receipt) -> None:
        self._unsettled -= 1
        self._settle(receipt)

    def _leave(self, how: d.Exit) -> None:
        if self._unsettled:
            self.later(POLL_S, self._leave, how)
            return
        self.told(self.name, "leaves", how.rule or "the run is complete")
        self.exit = how
        if how.rule is None:
            self.witness.leaves(self.name, self.session.pulls.ready)
        self.leave()

    def _read_update_chunk(self, transfer_id: str, index: int) -> bytes | None:
        found = self.outbox.read_frame(transfer_id, index)
        return None if found is None else self.guard.seal_chunk(found[0], index, found[1])
