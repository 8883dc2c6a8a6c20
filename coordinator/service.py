"""The coordinator's shell: all the I/O, none of the decisions.

Four things run side by side: the link is read, the decisions are carried out one after the other (journal, then sends,
then jobs), chunks are written (spooler) and read (pump), and the live status is written now and then. Whatever takes
long (opening, verifying, merging) is a task of its own whose result comes back as an event.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Coroutine, Sequence
from pathlib import Path
from typing import Any, assert_never

import structlog

from coordinator import aggregate
from coordinator import decisions as d
from coordinator.arrivals import Arrivals, sender
from coordinator.batching import commits, decided
from coordinator.core import Core
from coordinator.decisions import Instant
from coordinator.disk import Disk, check_newest, discard_rejected, discard_uncommitted
from coordinator.earshot import Earshot
from coordinator.genesis import open_run
from coordinator.journal import Journal
from coordinator.masters import prune_masters
from coordinator.means import Kept
from coordinator.quarantine import forget_ruling, rulings
from coordinator.records import Record, told
from coordinator.renewals import Renewals
from coordinator.rows import Restored
from coordinator.status import live_status
from coordinator.validation import Validation, Validator, check_validator
from shared import durable
from shared.audit import AuditLog
from shared.config import CoordinatorConfig, FederationConfig
from shared.errors import CorruptError, NoRoomError, RefusedError
from shared.faultpoint import passing
from shared.ids import new_session_id
from shared.link import Link, LinkOptions
from shared.mailroom import Mailroom
from shared.messages import Announce, Chunk, Message, Presence, Refused
from shared.plan import SealedPlan
from shared.pump import Pump
from shared.spooler import Spooler
from shared.store import FrameStore
from shared.tasks import first_error
from shared.threads import in_thread
from shared.topics import Channel, subscriptions, topic
from shared.trust.choose import coordinator_guard
from shared.trust.guard import Changes, TurnedAwayError

TICK_S = 0.25
STATUS_S = 0.5
STATUS_MAX_S = 2.0
STATUS_SHARE = 0.01
"""Of a processor, for writing the status: that of a thousand sites takes some 10 ms, and is written each second."""
COMPACT_ROWS = 10_000
"""Rows after which the journal is summed up: a restart replays fewer than these, in about half a second."""

log = structlog.get_logger("coordinator")


async def run_coordinator(
    config: CoordinatorConfig,
    federation: FederationConfig,
    plan: SealedPlan,
    initial: Path,
    validator: Validator | None = None,
) -> None:
    """Coordinate one federation until the run is complete and nobody is left (`exit_when_done`), or for ever.

    `initial` is the plain float32 safetensors file of version 0, read only when the journal is empty; `validator`
    measures losses where the federation weighs by them. Cancelling ends it in good order. Raises ConfigError,
    UnavailableError (another coordinator, disk full, broker) or CorruptError.
    """
    check_validator(federation, validator)
    storage = config.storage
    durable.make_folder(storage)
    journal = Journal(storage / "journal.sqlite")
    try:
        if not journal.length:
            journal.append([open_run(storage, federation, plan, initial)])
        restored = journal.restore()
        pruned = max((segment.last for segment in journal.pruned()), default=0)
        mark = restored.mark if restored else None
        audit = AuditLog(storage / "audit.jsonl", journal.rows, mark=mark, pruned=pruned)
        await Service(config, federation, plan, journal, audit, validator).run(restored)
    finally:
        journal.close()


class Service:
    """One process's run; see the module's docstring."""

    def __init__(
        self,
        config: CoordinatorConfig,
        federation: FederationConfig,
        plan: SealedPlan,
        journal: Journal,
        audit: AuditLog,
        validator: Validator | None,
    ) -> None:
        self.config = config
        self.federation = federation
        self.plan = plan
        self.name = federation.federation.name
        self.journal = journal
        self.audit = audit
        self.updates = FrameStore(config.storage / "updates")
        self.states = FrameStore(config.storage / "states")
        self.masters = config.storage / "masters"
        self.boot = new_session_id()
        self.link = Link(
            LinkOptions(
                broker=config.broker,
                link=config.link,
                client_id=f"{self.name}-coordinator-{self.boot[:8]}",
                subscriptions=tuple(subscriptions(self.name, "coordinator")),
            )
        )
        self.guard = coordinator_guard(federation, config.trust, fingerprint=plan.fingerprint, storage=config.storage)
        self.core = Core(federation, plan, config=config, boot=self.boot, attest=self.guard.attest)
        self.mail = Mailroom(self.link, self.guard, self.name, self, log)
        self.renewals = Renewals(config, federation, self.core.sites, self.mail.post)
        self.earshot = Earshot(self.link, self.name, self.guard.members, self.core.intake, self._away)
        self.pump = Pump(self._read_state_chunk, self.link.publish, lambda _id, _index: None)
        self.disk = Disk(config, self.updates.root)
        kept = Kept(self.updates, self.states)
        self.validation = Validation(validator, kept, plan.tensors, config.storage, self.disk)
        self.spooler = Spooler(
            self.updates,
            open_chunk=self.guard.open_chunk,
            stored=self._chunks_stored,
            refused=self._chunk_refused,
            room=self.disk.room,
            sender=sender,
        )
        self._compact_at = journal.length - journal.loose + COMPACT_ROWS
        self.arrivals = Arrivals(self.spooler, self.disk, plan, no_room_s=config.link.backoff_cap_s)
        self._events: asyncio.Queue[d.Event] = asyncio.Queue()
        self._tasks: asyncio.TaskGroup

    async def run(self, restored: Restored | None = None) -> None:
        """Recover, from the journal's newest snapshot where there is one, then serve until Stop."""
        for store in (self.updates, self.states):
            store.recover()
        if restored is not None:
            self.core.ledger = restored.ledger
        for record in self.journal.replay(restored.row if restored else None):
            self.core.apply(record)
        discard_rejected(self.updates, self.core.ledger)
        discard_uncommitted(self.states, self.core.ledger)
        await in_thread(check_newest, self.masters, self.core.ledger, self.federation)
        if not self.core.ledger.head_is_signed:  # killed between the two
            await self._sign_head()
        await self._compact()
        ledger = self.core.ledger
        log.info("recovered", version=ledger.version, pending=len(ledger.pending), updates=len(ledger.known))
        try:
            with first_error(), self.arrivals:
                await self._serve()
        finally:
            durable.remove_spares(self.masters)
        self.guard.save()
        self._save_status()

    async def _serve(self) -> None:
        async with self.link, self.spooler, asyncio.TaskGroup() as self._tasks:
            links = (self.mail.read(), self.mail.watch(), self.earshot.run(), self.renewals.run())
            work = (*links, self.pump.run(), self.spooler.run(), self._tick(), self._write_status())
            helpers = [self._tasks.create_task(each) for each in work]
            await self._decide()
            for helper in helpers:
                helper.cancel()

    async def _compact(self) -> None:
        """Sum up the journal when a restart would have many rows to replay; the ledger stands still meanwhile."""
        if self.journal.length < self._compact_at:
            return
        self._compact_at = self.journal.length + COMPACT_ROWS
        started = time.monotonic()
        try:
            moved = await in_thread(self.journal.compact, self.core.ledger, self.audit.mark, time.time())
        except NoRoomError as error:
            log.warning("did not sum up the journal", reason=error.message)
            return
        log.info("summed up the journal", rows=moved, s=round(time.monotonic() - started, 3))

    # -- in ---

    def link_up(self) -> None:
        """See Desk."""
        self._events.put_nowait(d.LinkUp())

    def link_down(self) -> None:
        """See Desk."""
        self.pump.clear()
        self._events.put_nowait(d.LinkDown())

    def take_message(self, site: str | None, message: Message) -> None:
        """See Desk."""
        if site is not None and not self.renewals.takes(site, message):
            self._events.put_nowait(d.Received(site, message))

    def hears(self, site: str | None, size: int) -> bool:
        """See Desk."""
        return site is None or self.earshot.hears(site, size)

    def take_chunk(self, site: str | None, chunk: Chunk) -> None:
        """See Desk."""
        if site is not None and self.core.uploads.accepts(site, chunk.transfer_id, chunk.index):
            self.spooler.put(chunk)
        else:
            self.earshot.unwanted(site, len(chunk.frame))

    async def caught_up(self) -> None:
        """See Desk."""
        await self.spooler.caught_up()

    def refused(self, site: str | None, error: RefusedError, size: int) -> None:
        """See Desk."""
        self.earshot.unwanted(site, size)
        if isinstance(error, TurnedAwayError):
            self._tasks.create_task(self._send(d.Send(site, error.answer)))

    def trust_changed(self, changes: Changes) -> None:
        """See Desk; a site that lost its membership is told so, and is away from here on."""
        for name, why in changes.lost:
            log.warning("a site lost its membership", site=name, rule=why.rule, reason=why.message)
            session = self.core.sites[name].session
            if session is not None:
                answer = Refused(session=session, rule=why.rule, detail=why.message)
                self._tasks.create_task(self._send(d.Send(name, answer)))
                self._away(name)
        if changes.rekeyed and self.link.connected:
            self._tasks.create_task(self._send(d.Send(None, self.core.announcement())))

    def _away(self, name: str) -> None:
        if (session := self.core.sites[name].session) is not None:
            self._events.put_nowait(d.Received(name, Presence(site=name, session=session, online=False)))

    def _chunks_stored(self, transfer_id: str, indices: tuple[int, ...]) -> None:
        self._events.put_nowait(d.ChunksStored(transfer_id, indices))

    def _chunk_refused(self, chunk: Chunk, rule: str) -> None:
        upload = self.core.uploads.get(chunk.transfer_id)
        self.earshot.chunk_refused(None if upload is None else upload.site, chunk, rule)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._events.put_nowait(d.Tick())
            for ruling in rulings(self.config.storage):
                self._events.put_nowait(ruling)

    # -- decide ---

    async def _decide(self) -> None:
        while True:
            found = decided(self._handle, await self._events.get(), self._events)
            records = [record for _event, decision in found for record in decision.records]
            if records:
                await self._write_down(records)
                if commits(records):
                    found[-1][1].sends[:0] = await self._sign_head()
                await self._compact()
            for event, decision in found:
                if isinstance(event, d.Ruled):
                    forget_ruling(self.config.storage, event)
                for send in decision.sends:
                    self._tasks.create_task(self._send(send))
                for job in decision.jobs:
                    if isinstance(job, d.Stop):
                        log.info("complete", version=self.core.ledger.version)
                        return
                    self._start(job)

    def _handle(self, event: d.Event) -> d.Decision:
        return self.core.handle(event, Instant(time.monotonic(), time.time()))

    async def _write_down(self, facts: Sequence[Record]) -> None:
        if not await self.disk.given_room(self._append, facts):
            await self.disk.given_room(self.audit.follow)
        passing("audit.after")
        for fact in facts:
            log.info(fact.kind, **told(fact))

    def _append(self, facts: Sequence[Record]) -> bool:
        """In a thread; False when the journal has the facts and the disk no room for their lines of the audit trail."""
        for fact in facts:
            passing(f"journal-{fact.kind}.before")
        rows = self.journal.append(facts)
        for fact in facts:
            passing(f"journal-{fact.kind}.after")
        try:
            self.audit.follow(rows)
        except NoRoomError:
            return False
        return True

    async def _sign_head(self) -> list[d.Send]:
        """Sign the chain's head (nothing without trust), write that down, and return the word to the sites."""
        signed = self.guard.sign_head(self.core.ledger.version, self.journal.length, self.journal.head.hex())
        if signed is None:
            return []
        decision = self.core.signed(*signed, time.time())
        await self._write_down(decision.records)
        return decision.sends

    async def _send(self, send: d.Send) -> None:
        channel = Channel.ANNOUNCE if send.site is None else Channel.DOWN_CTL
        await self.mail.post(send.message, channel, send.site)
        match send.message:
            case Announce() as announce:
                log.info("announced", version=announce.version, final=announce.final)
            case Refused() as refused:
                log.warning("refused a site", site=send.site, rule=refused.rule)
            case _:
                pass

    def _start(self, job: d.Job) -> None:
        work: Coroutine[Any, Any, None]
        match job:
            case d.OpenSpool():
                work = self._answer(self.arrivals.open(job.manifest))
            case d.CloseSpool():
                work = self.spooler.close(job.transfer_id)
            case d.Discard():
                work = self.spooler.close(job.update_id, delete=True)
            case d.Verify():
                work = self._answer(self.arrivals.verify(job.update_id))
            case d.Validate():
                work = self._answer(self.validation.measure(job))
            case d.Merge():
                work = self._merge(job)
            case d.Serve():
                channel = Channel.BULK if job.site is None else Channel.DOWN_DATA
                self.pump.put(topic(self.name, channel, job.site), job.transfer_id, job.indices)
                return
            case d.Stop():
                return
            case _:
                assert_never(job)
        self._tasks.create_task(work)

    # -- jobs ---

    async def _answer(self, work: Awaitable[d.UploadEvent]) -> None:
        self._events.put_nowait(await work)

    async def _merge(self, job: d.Merge) -> None:
        started = time.monotonic()
        result = await self.disk.given_room(
            aggregate.merge, job.plan, self.updates, self.states, self.masters, self.plan, self.federation
        )
        # The one before stays until the new one is in the journal; where replays begin, there it stays for ever.
        keep = {self.core.ledger.pruned, job.plan.base_version, job.plan.version}
        await in_thread(prune_masters, self.masters, keep)
        passing("prune.after")
        took = round(time.monotonic() - started, 3)
        log.info("merged", version=job.plan.version, updates=len(job.plan.contributions), s=took)
        self._events.put_nowait(d.Merged(job.plan, result))

    def _read_state_chunk(self, transfer_id: str, index: int) -> bytes:
        stored = self.states.get(transfer_id)
        if stored is None:
            raise CorruptError(f"{self.states.root}: state {transfer_id} is gone", hint="restore it from a backup")
        return self.guard.seal_chunk(stored.manifest, index, stored.read_frame(index))

    async def _write_status(self) -> None:
        while True:
            began = time.thread_time()  # not how long it waited for its turn on a busy machine
            with contextlib.suppress(NoRoomError):  # told by `held`, which is seen again when there is room
                self._save_status()
            took_s = time.thread_time() - began
            await asyncio.sleep(min(max(STATUS_S, took_s / STATUS_SHARE), STATUS_MAX_S))
            await self.disk.look()

    def _save_status(self) -> None:
        status = live_status(
            self.core,
            connected=self.link.connected,
            bytes_up=self.link.counters.bytes_received,
            bytes_down=self.link.counters.bytes_sent,
            at=time.time(),
            held=self.disk.held or self.validation.held,
            renewals=self.renewals.offers.waiting,
        )
        text = status.model_dump_json(indent=1).encode()
        durable.write_scratch(self.config.storage / "status.json", [text])
