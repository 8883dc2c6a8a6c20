"""A site's shell: all the I/O, none of the decisions.

The link is read, decisions are carried out one after the other, chunks are written (spooler) and read (pump), and the
worker process trains. Jobs that take long are tasks of their own whose result comes back as an event. What must
survive (a sealed update, a receipt) is on disk before its event is raised.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Coroutine
from typing import Any, assert_never

import structlog

from edge_client import decisions as d
from edge_client.disk import Disk
from edge_client.heads import Heads
from edge_client.outbox import Outbox
from edge_client.refusals import turned_away
from edge_client.renewal import Renewals
from edge_client.sealing import seal_delta
from edge_client.session import Identity, Session
from edge_client.states import States
from edge_client.training import TrainedUpdate, Trainer
from edge_client.work_files import WorkFiles
from shared.config import FederationConfig, SiteConfig
from shared.errors import CorruptError, RefusedError
from shared.faultpoint import passing
from shared.link import Link, LinkOptions, Publication
from shared.logs import beside
from shared.mailroom import Mailroom
from shared.manifest import Manifest, StepFacts, UpdateFacts
from shared.messages import LOST, Chunk, Head, Message, Presence, Receipt, Renewal, Status, Wait
from shared.pump import Pump, SettledError
from shared.spooler import Spooler
from shared.tasks import first_error
from shared.tensorfile import map_tensors
from shared.threads import in_thread
from shared.topics import Channel, subscriptions, topic
from shared.trust.choose import site_guard
from shared.trust.guard import Changes, StaleKeyError

TICK_S = 0.25
STATUS_S = 1.0

log = structlog.get_logger("site")


class Agent:
    """One process's run; see the module's docstring."""

    def __init__(
        self,
        config: SiteConfig,
        federation: FederationConfig,
        identity: Identity,
        outbox: Outbox,
        worker: Trainer,
    ) -> None:
        self.config = config
        self.federation = federation
        self.identity = identity
        self.outbox = outbox
        self.worker = worker
        self.name = federation.federation.name
        self.heads = Heads(config.storage)
        self.renewals = Renewals(config, federation, identity.session)
        self.states = States(config.storage / "states", federation, identity.fingerprint)
        self.work = WorkFiles(config.storage / "work")
        self.session = Session(
            identity,
            link=config.link,
            outbox=outbox.pending(),
            trained=outbox.trained(),
            outbox_max=config.outbox_max,
            held=self.states.held(),
        )
        self.guard = site_guard(
            federation, config.trust, site=config.name, fingerprint=identity.fingerprint, storage=config.storage
        )
        here, away = (self._presence(online=online) for online in (True, False))
        self.link = Link(
            LinkOptions(
                broker=config.broker,
                link=config.link,
                client_id=f"{self.name}-{config.name}-{identity.session[:8]}",
                subscriptions=tuple(subscriptions(self.name, "site", config.name)),
                will=away,
                hello=(here,),
            )
        )
        self.mail = Mailroom(self.link, self.guard, self.name, self, log)
        self.pump = Pump(self._read_update_chunk, self.link.publish, self._chunk_sent)
        self.spooler = Spooler(
            self.states.store,
            open_chunk=self.guard.open_chunk,
            stored=self._chunks_stored,
            refused=self._chunk_refused,
        )
        self.disk = Disk(config, outbox.store.root, self.states.store.root)
        self._events: asyncio.Queue[d.Event] = asyncio.Queue()
        self._tasks: asyncio.TaskGroup
        self._training: asyncio.Task[None] | None = None
        self._at_work = asyncio.Lock()
        self._sealing = False
        self._progress = 0.0
        self._metrics: dict[str, float] = {}
        self._asked_for_keys = -math.inf

    def _presence(self, *, online: bool) -> Publication:
        said = Presence(site=self.config.name, session=self.identity.session, online=online)
        sealed = self.guard.seal(said, Channel.PRESENCE, self.config.name, time.time())
        return Publication(topic(self.name, Channel.PRESENCE, self.config.name), sealed, retain=True)

    async def run(self) -> None:
        """Take part until the session says Exit; RefusedError when it says why."""
        self.states.store.recover()
        self.work.clear()
        try:
            with first_error():
                leave = await self._take_part()
        finally:
            self.work.clear()
            for store in (self.states.store, self.outbox.store):
                store.close()
        self.guard.save()
        if leave.rule is not None:
            raise turned_away(self.config.name, leave.rule, leave.detail)
        log.info("complete")

    async def _take_part(self) -> d.Exit:
        async with self.link, self.spooler, asyncio.TaskGroup() as self._tasks:
            helpers = [
                self._tasks.create_task(work)
                for work in (
                    self.mail.read(),
                    self.mail.watch(),
                    self._tick(),
                    self._report(),
                    self.pump.run(),
                    self.spooler.run(),
                )
            ]
            leave = await self._decide()
            await self._say(self._status())
            if self._training is not None:
                self._training.cancel()
            for helper in helpers:
                helper.cancel()
        return leave

    # -- in ---

    def link_up(self) -> None:
        """See Desk."""
        self._events.put_nowait(d.LinkUp())

    def link_down(self) -> None:
        """See Desk."""
        self.pump.clear()
        self._events.put_nowait(d.LinkDown())

    def take_message(self, _site: str | None, message: Message) -> None:
        """See Desk."""
        if isinstance(message, Wait):
            log.warning("asked to wait", update=message.transfer_id, rule=message.rule, reason=message.detail)
        if isinstance(message, Head):
            self.heads.take(message, self.guard.check_head)
        elif isinstance(message, Renewal):
            self._tasks.create_task(self.renewals.take(message, self._say))
        else:
            self._events.put_nowait(d.Received(message))

    def hears(self, _site: str | None, _size: int) -> bool:
        """See Desk."""
        return True

    def take_chunk(self, _site: str | None, chunk: Chunk) -> None:
        """See Desk."""
        if self.session.pulls.accepts(chunk.transfer_id, chunk.index):
            self.spooler.put(chunk)

    async def caught_up(self) -> None:
        """See Desk."""
        await self.spooler.caught_up()

    def refused(self, _site: str | None, error: RefusedError, _size: int) -> None:
        """See Desk."""
        if isinstance(error, StaleKeyError):
            self._ask_for_keys()

    def trust_changed(self, _changes: Changes) -> None:
        """See Desk; a changed membership of the coordinator matters to the guard alone."""

    def _ask_for_keys(self) -> None:
        """Begin the conversation anew: the coordinator drew another federation key, and its welcome brings it.

        Before the first welcome a hello is on its way anyhow.
        """
        now = time.monotonic()
        patient = now - self._asked_for_keys < self.config.link.stall_s
        if self.link.connected and self.session.welcome and not patient:
            self._asked_for_keys = now
            self.link_down()
            self.link_up()

    def _chunks_stored(self, transfer_id: str, indices: tuple[int, ...]) -> None:
        self._events.put_nowait(d.ChunksStored(transfer_id, indices))

    def _chunk_refused(self, chunk: Chunk, rule: str) -> None:
        log.warning("refused a chunk", state=chunk.transfer_id, rule=rule)
        if rule == "bad-seal":
            self._ask_for_keys()

    def _chunk_sent(self, transfer_id: str, _index: int) -> None:
        self._events.put_nowait(d.ChunkSent(transfer_id))

    async def _tick(self) -> None:
        receiving = 0
        while True:
            await asyncio.sleep(TICK_S)
            before, receiving = receiving, self.link.receiving
            self._events.put_nowait(d.Tick(receiving=receiving > before))

    # -- decide ---

    async def _decide(self) -> d.Exit:
        while True:
            event = await self._events.get()
            decision = self.session.handle(event, time.monotonic(), time.time())
            self._sealing = self._sealing and not isinstance(event, d.Trained)
            for message in decision.sends:
                self._tasks.create_task(self._say(message))
            for job in decision.jobs:
                if isinstance(job, d.Exit):
                    if job.rule is None and self._sealing:
                        break  # not without an answer to the update that is being sealed; the next tick says so again
                    return job
                self._start(job)

    def _start(self, job: d.Job) -> None:
        work: Coroutine[Any, Any, None]
        match job:
            case d.OpenSpool():
                work = self._open_spool(job.manifest)
            case d.CloseSpool():
                work = self.spooler.close(job.transfer_id, delete=True)
            case d.Finish():
                work = self._finish(job.transfer_id)
            case d.StepOn():
                work = self._step_on(job)
            case d.Train():
                self._training = self._tasks.create_task(self._train(job.base))
                return
            case d.CancelTraining():
                if self._training is not None and not self._sealing:
                    self._training.cancel()
                return
            case d.SendChunks():
                destination = topic(self.name, Channel.UP_DATA, self.config.name)
                self.pump.put(destination, job.update_id, job.indices)
                return
            case d.Settle():
                work = self._settle(job.receipt)
            case d.Exit():
                return
            case _:
                assert_never(job)
        self._tasks.create_task(work)

    async def _say(self, message: Message) -> None:
        await self.mail.post(message, Channel.UP_CTL, self.config.name)

    # -- jobs ---

    async def _open_spool(self, manifest: Manifest) -> None:
        try:
            have = await self.disk.given_room(self.spooler.open, manifest)
        except (CorruptError, RefusedError) as error:  # refused: it lies here in other frames, made by steps perhaps
            await self._fetch_again(manifest.transfer_id, error)
            return
        # What earlier lives of this process began to pull would otherwise stay until one pull is complete.
        await self._forget_states_but(manifest.transfer_id)
        self._events.put_nowait(d.SpoolOpened(manifest.transfer_id, have))

    async def _finish(self, transfer_id: str) -> None:
        try:
            stored = await self.spooler.finish(transfer_id)
        except CorruptError as error:
            await self._fetch_again(transfer_id, error)
            return
        pulled, step = stored.manifest, isinstance(stored.manifest.facts, StepFacts)
        log.info("pulled a step" if step else "pulled", version=pulled.version)
        await self._forget_states_but(transfer_id)
        self._events.put_nowait(d.StepReady(transfer_id) if step else d.StateReady(pulled))

    async def _step_on(self, job: d.StepOn) -> None:
        # What it was made of goes when the next pull begins: the session has not let go of it yet.
        self._events.put_nowait(await self.disk.given_room(in_thread, self.states.step_on, job.base, job.steps))

    async def _fetch_again(self, transfer_id: str, error: RefusedError | CorruptError) -> None:
        """A state is not what was announced: it came so, or the disk has spoilt it since."""
        rule = getattr(error, "rule", "damaged-at-rest")
        log.warning("refused a state", state=transfer_id, rule=rule, reason=error.message)
        await self.spooler.close(transfer_id, delete=True)
        self._events.put_nowait(d.StateBroken(transfer_id))

    async def _forget_states_but(self, transfer_id: str) -> None:
        await in_thread(self.states.forget_all_but, lambda: {transfer_id, *self.session.states_in_use})

    async def _train(self, base: Manifest) -> None:
        async with self._at_work:  # whoever was cancelled has still to let go of the files
            await self._train_on(base)

    async def _train_on(self, base: Manifest) -> None:
        number = base.state.version
        self._progress = 0.0
        log.info("training", version=number)
        try:
            await self.disk.until_room(base, self.federation.codec, self.work.size)
            try:
                await self.disk.given_room(in_thread, self.states.extract, base, self.work.state)
            except (CorruptError, RefusedError) as error:
                await self._fetch_again(base.transfer_id, error)
                return
            trained = await self.worker.train(self.work.state, number, self.work.delta, on_progress=self._on_progress)
            passing("train.after")
            self._metrics = trained.metrics
            self._sealing = True
            manifest = await self.disk.given_room(in_thread, self._seal, base, trained)
        finally:
            self.work.tidy()
        told = {"update": manifest.transfer_id, "version": number, "bytes": manifest.wire_bytes}
        log.info("sealed", **beside(told, self._metrics))
        self._events.put_nowait(d.Trained(manifest))

    def _on_progress(self, share: float, loss: float | None) -> None:
        self._progress = share
        if loss is not None:
            self._metrics = {**self._metrics, "loss": loss}

    def _seal(self, base: Manifest, trained: TrainedUpdate) -> Manifest:
        return seal_delta(
            self.outbox,
            map_tensors(self.work.delta),
            UpdateFacts(
                site=self.config.name,
                base_version=base.state.version,
                base_digest=base.file_digest,
                examples=trained.examples,
                metrics=self._metrics,
            ),
            self.federation,
            self.identity.fingerprint,
            lambda manifest: self.guard.witnessed(manifest, self.heads.last),
            trained.own,
        )

    async def _settle(self, receipt: Receipt) -> None:
        if (base_digest := await self.disk.given_room(in_thread, self.outbox.settle, receipt)) is None:
            return
        if receipt.rule == LOST:
            self._events.put_nowait(d.Lost(base_digest))
        told = {"version": receipt.version, "weight": receipt.weight, "rule": receipt.rule}
        log.info(receipt.outcome, update=receipt.update_id, **{key: value for key, value in told.items() if value})

    def _read_update_chunk(self, transfer_id: str, index: int) -> bytes:
        found = self.outbox.read_frame(transfer_id, index)
        if found is None:  # settled while it was queued: what we would send is not needed any more
            raise SettledError
        manifest, frame = found
        return self.guard.seal_chunk(manifest, index, frame)

    # -- status ---

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(STATUS_S)
            if self.link.connected:
                await self._say(self._status())

    def _status(self) -> Status:
        session, counters, standing = self.session, self.link.counters, self.worker.standing
        at = session.training or session.pulls.ready
        return Status(
            site=self.config.name,
            session=self.identity.session,
            phase="held" if self.disk.held or standing.held else session.phase,
            version=at.state.version if at else None,
            progress=self._progress if session.training else 0.0,
            metrics={**self._metrics, **standing.metrics},
            bytes_up=counters.bytes_sent,
            bytes_down=counters.bytes_received,
            outbox=len(session.outbox),
            reconnects=counters.reconnects,
        )
