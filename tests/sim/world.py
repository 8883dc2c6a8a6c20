"""A small false world: the real cores of coordinator and sites, a virtual clock, a careless broker, one seed.

What is real: `coordinator.core.Core`, `edge_client.session.Session`, and every message's encoding and decoding.
What is false, and honestly so: the broker (drops, doubles and delays what it likes, forgets everything at a restart),
the disks (what was stored before a crash stays stored; journal records are kept in the order of appending), training
(takes a while and always succeeds) and tensors (there are none). Order is kept on one topic, as MQTT keeps it.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from coordinator import decisions as cd
from coordinator.core import Core, Instant
from coordinator.merging import MergeResult
from coordinator.records import Opened, Record
from edge_client import decisions as sd
from edge_client.session import Identity, Session
from shared.config import CoordinatorConfig, FederationConfig, LinkSection
from shared.manifest import Manifest
from shared.messages import Presence, decode, encode
from shared.plan import SealedPlan
from shared.transfer import Bitmap
from tests.factories import digest, make_plan, make_state, make_update

LINK = LinkSection(stall_s=2.0, window=4)
STEP_S = 0.25


@dataclass(frozen=True, slots=True)
class Faults:
    """Chances per message, and per second for crashes; 0 everywhere is a perfect world."""

    drop: float = 0.0
    double: float = 0.0
    delay_s: float = 0.05
    site_crash: float = 0.0
    coordinator_crash: float = 0.0
    link_cut: float = 0.0


@dataclass
class SiteHost:
    """A site's machine: what survives a crash of its process."""

    name: str
    session: Session | None = None
    up: bool = False
    outbox: dict[str, Manifest] = field(default_factory=dict)
    receipts: dict[str, str] = field(default_factory=dict)
    trained: set[str] = field(default_factory=set)
    spool: dict[str, set[int]] = field(default_factory=dict)
    whole: set[str] = field(default_factory=set)
    sealed: list[str] = field(default_factory=list)
    left: sd.Exit | None = None
    born: int = 0


class World:
    """See the module's docstring; `run` steps it, `check` holds what must hold at any time."""

    def __init__(self, federation: FederationConfig, sites: list[str], *, seed: int, faults: Faults) -> None:
        self.rng = random.Random(seed)
        self.federation = federation
        self.plan: SealedPlan = make_plan(federation)
        self.faults = faults
        self.now = 0.0
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._last_on: dict[str, float] = {}
        self.retained: bytes | None = None
        self.journal: list[Record] = []
        self.spools: dict[str, set[int]] = {}
        self.hosts = {name: SiteHost(name) for name in sites}
        self.core: Core | None = None
        self.coordinator_linked = False
        self.calm = False
        self.journal.append(
            Opened(
                self.plan.fingerprint,
                self.plan.config_sha256,
                self.plan.frozen_sha256,
                make_state(self.plan, 0).to_bytes(),
                digest("m0"),
            )
        )
        self._boots = itertools.count(1)
        self.start_coordinator()
        for name in sites:
            self.start_site(name)

    # -- time and wire ---

    def later(self, seconds: float, action: Callable[[], None]) -> None:
        """Do something after virtual seconds."""
        heapq.heappush(self._queue, (self.now + seconds, next(self._order), action))

    def wire(self, topic: str, action: Callable[[], None]) -> None:
        """Carry one message on a topic: perhaps not at all, perhaps twice, never overtaking another on its topic."""
        if not self.calm and self.rng.random() < self.faults.drop:
            return
        for _ in range(2 if not self.calm and self.rng.random() < self.faults.double else 1):
            due = max(self._last_on.get(topic, 0.0), self.now + self.rng.random() * self.faults.delay_s)
            self._last_on[topic] = due
            self.later(due - self.now, action)

    def run(self, seconds: float) -> None:
        """Let virtual time pass, ticking every process."""
        end = self.now + seconds
        while self.now < end and not self.done:
            step = min(end, self.now + STEP_S)
            while self._queue and self._queue[0][0] <= step:
                self.now, _, action = heapq.heappop(self._queue)
                action()
            self.now = step
            self._misbehave()
            self.to_core(cd.Tick())
            for name in self.hosts:
                self.to_site(name, sd.Tick())
            self.check()

    @property
    def done(self) -> bool:
        """Whether every site has left."""
        return all(host.left is not None for host in self.hosts.values())

    def _misbehave(self) -> None:
        if self.calm:
            return
        chance = self.rng.random
        for host in self.hosts.values():
            if host.up and chance() < self.faults.site_crash * STEP_S:
                self.crash_site(host.name)
                self.later(self.rng.uniform(0.5, 20), lambda name=host.name: self.start_site(name))  # type: ignore[misc]
            elif host.up and chance() < self.faults.link_cut * STEP_S:
                self.cut(host.name, self.rng.uniform(0.1, 10))
        if self.core is not None and chance() < self.faults.coordinator_crash * STEP_S:
            self.core = None
            self.later(self.rng.uniform(0.5, 10), self.start_coordinator)

    # -- coordinator ---

    def start_coordinator(self) -> None:
        """Boot from the journal alone."""
        if self.core is not None:
            return
        config = CoordinatorConfig.model_validate({"federation": "f", "storage": "s", "credit_mib": 1})
        config = config.model_copy(update={"link": LINK})
        self.core = Core(self.federation, self.plan, config=config, boot=f"{next(self._boots):016x}")
        for record in self.journal:
            self.core.apply(record)
        self.to_core(cd.LinkUp())

    def to_core(self, event: cd.Event) -> None:
        """Hand an event to the coordinator and carry out what it decides, in the promised order."""
        core = self.core
        if core is None:
            return
        decision = core.handle(event, Instant(self.now, self.now))
        self.journal.extend(decision.records)
        for send in decision.sends:
            data = encode(send.message)
            if send.site is None:
                self.retained = data
                for name in self.hosts:
                    self.wire(f"announce {name}", lambda name=name, data=data: self.deliver(name, data))  # type: ignore[misc]
            else:
                self.wire(f"ctl {send.site}", lambda name=send.site, data=data: self.deliver(name, data))  # type: ignore[misc]
        for job in decision.jobs:
            self._coordinator_job(core, job)

    def _coordinator_job(self, core: Core, job: cd.Job) -> None:
        def answer(event: cd.Event, seconds: float = 0.01) -> None:
            self.later(seconds, lambda: self.to_core(event) if self.core is core else None)

        match job:
            case cd.OpenSpool():
                held = self.spools.setdefault(job.manifest.transfer_id, set())
                have = Bitmap(job.manifest.frames, held).to_bytes()
                answer(cd.SpoolOpened(job.manifest.transfer_id, have))
            case cd.Verify():
                answer(cd.Verified(job.update_id, 1.0))
            case cd.Merge():
                state = make_state(self.plan, job.plan.version)
                answer(cd.Merged(job.plan, MergeResult(state, digest("m"), None)), 0.1)
            case cd.Serve():
                for index in job.indices:
                    for name in [job.site] if job.site else list(self.hosts):
                        self.wire(f"data {name}", lambda n=name, i=index, j=job: self._state_chunk(n, j.transfer_id, i))  # type: ignore[misc]
            case _:
                pass

    def _update_chunk(self, site: str, update_id: str, index: int) -> None:
        core = self.core
        if core is not None and core.uploads.accepts(site, update_id, index):
            self.spools[update_id].add(index)
            stored = cd.ChunksStored(update_id, (index,))
            self.later(0.02, lambda: self.to_core(stored) if self.core is core else None)

    # -- sites ---

    def start_site(self, name: str) -> None:
        """Boot a site from its disk alone, with a new session."""
        host = self.hosts[name]
        if host.up or host.left is not None:
            return
        host.born += 1
        me = Identity(
            site=name,
            session=digest(f"{name} {host.born}")[:16],
            fingerprint=self.plan.fingerprint,
            config_sha256=self.plan.config_sha256,
            frozen_sha256=self.plan.frozen_sha256,
            software="test",
        )
        outbox = sorted(host.outbox.values(), key=lambda manifest: manifest.update.base_version)
        host.session = Session(me, link=LINK, outbox=outbox, trained=host.trained, outbox_max=2)
        host.up = True
        self._connect(host)

    def _connect(self, host: SiteHost) -> None:
        if host.session is None or host.session.connected:
            return
        if self.retained is not None:
            self.wire(f"announce {host.name}", lambda data=self.retained: self.deliver(host.name, data))  # type: ignore[misc]
        self.to_site(host.name, sd.LinkUp())

    def crash_site(self, name: str) -> None:
        """Kill the process; the broker tells of it by the last will."""
        host = self.hosts[name]
        assert host.session is not None
        will = Presence(site=name, session=host.session.identity.session, online=False)
        host.session, host.up = None, False
        self.wire(f"presence {name}", lambda: self.to_core(cd.Received(name, will)))

    def cut(self, name: str, seconds: float) -> None:
        """Cut one site's link for a while."""
        host = self.hosts[name]
        if host.session is None or not host.session.connected:
            return
        session = host.session
        will = Presence(site=name, session=session.identity.session, online=False)
        self.wire(f"presence {name}", lambda: self.to_core(cd.Received(name, will)))
        self.to_site(name, sd.LinkDown())
        self.later(seconds, lambda: self._connect(host) if host.session is session else None)

    def deliver(self, name: str, data: bytes) -> None:
        """A control message or the announcement reaches a site."""
        host = self.hosts[name]
        if host.session is not None and host.session.connected:
            self.to_site(name, sd.Received(decode(data)))

    def _state_chunk(self, name: str, transfer_id: str, index: int) -> None:
        host = self.hosts[name]
        session = host.session
        if session is not None and session.connected and session.accepts(transfer_id, index):
            host.spool.setdefault(transfer_id, set()).add(index)
            stored = sd.ChunksStored(transfer_id, (index,))
            self.later(0.02, lambda: self.to_site(name, stored) if host.session is session else None)

    def to_site(self, name: str, event: sd.Event) -> None:
        """Hand an event to a site and carry out what it decides."""
        host = self.hosts[name]
        session = host.session
        if session is None:
            return
        decision = session.handle(event, self.now, self.now)
        for message in decision.sends:
            data = encode(message)
            self.wire(f"up {name}", lambda data=data: self.to_core(cd.Received(name, decode(data))))  # type: ignore[misc]
        for job in decision.jobs:
            self._site_job(host, session, job)

    def _site_job(self, host: SiteHost, session: Session, job: sd.Job) -> None:
        def answer(event: sd.Event, seconds: float = 0.01) -> None:
            self.later(seconds, lambda: self.to_site(host.name, event) if host.session is session else None)

        match job:
            case sd.OpenSpool():
                held = host.spool.setdefault(job.manifest.transfer_id, set())
                answer(sd.SpoolOpened(job.manifest.transfer_id, Bitmap(job.manifest.frames, held).to_bytes()))
            case sd.CloseSpool():
                host.spool.pop(job.transfer_id, None)
            case sd.Verify():
                assert session.pull is not None
                answer(sd.StateReady(session.pull.manifest))
            case sd.Train():
                self.later(self.rng.uniform(0.5, 4.0), lambda: self._trained(host, session, job.base))
            case sd.SendChunks():
                for index in job.indices:
                    self.wire(f"updata {host.name}", lambda i=index: self._update_chunk(host.name, job.update_id, i))  # type: ignore[misc]
                    answer(sd.ChunkSent(job.update_id), 0.03)
            case sd.Settle():
                if host.outbox.pop(job.receipt.update_id, None) or job.receipt.update_id in host.receipts:
                    host.receipts[job.receipt.update_id] = job.receipt.outcome
            case sd.Exit():
                host.left, host.session, host.up = job, None, False
            case _:
                pass

    def _trained(self, host: SiteHost, session: Session, base: Manifest) -> None:
        if host.session is not session or session.training is not base:
            return
        update = make_update(self.plan, host.name, base, frames=self.rng.randint(1, 12))
        host.outbox[update.transfer_id] = update
        host.trained.add(base.file_sha256)
        host.sealed.append(update.transfer_id)
        self.to_site(host.name, sd.Trained(update))

    # -- what must hold ---

    def check(self) -> None:
        """Promises that hold at any time, whatever the faults."""
        core = self.core
        counted = [
            part.update_id
            for record in self.journal
            if hasattr(record, "contributions")
            for part in record.contributions
        ]
        assert len(counted) == len(set(counted)), "an update was counted twice"
        if core is not None:
            assert core.uploads.reserved <= core.uploads.budget_bytes
            for host in self.hosts.values():
                for update_id in host.receipts:
                    assert update_id in core.ledger.known, "a receipted update is unknown to the coordinator"
            twin = Core(
                self.federation,
                self.plan,
                config=CoordinatorConfig.model_validate({"federation": "f", "storage": "s"}),
                boot=core.boot,
            )
            for record in self.journal:
                twin.apply(record)
            assert (twin.ledger.version, twin.ledger.known, twin.ledger.pending) == (
                core.ledger.version,
                core.ledger.known,
                core.ledger.pending,
            )
