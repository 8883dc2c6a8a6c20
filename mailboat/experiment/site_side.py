"""One site of a federation in one process: the real session, outbox, trainer and codec, in virtual time.

What `edge_client.agent` does with a link, a spooler and a worker process is done here with a line, a bitmap and the
worker itself. A state's bytes are read where the coordinator keeps them, once all chunks of what makes it up have come.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, assert_never

from edge_client import decisions as d
from edge_client.outbox import Outbox
from edge_client.privacy.metered import metered
from edge_client.sealing import seal_delta
from edge_client.session import Identity, Session
from edge_client.training import TrainedUpdate
from mailboat.experiment.clock import Clock, Line
from mailboat.experiment.coordinator_side import CoordinatorSide
from mailboat.experiment.local_worker import LocalWorker
from mailboat.experiment.packets import chunk_bytes, message_bytes
from shared import durable
from shared.config import SiteConfig
from shared.manifest import Manifest, StateFacts, StepFacts, UpdateFacts
from shared.messages import Message
from shared.tensorfile import map_tensors
from shared.topics import Channel
from shared.transfer import Bitmap

HELD_POLL_S = 0.05
WILL_S = 45.0
"""When a broker speaks a site's last will: one and a half times the keepalive."""


class SiteSide:
    """See the module's docstring; `held` is the state that is here from the start."""

    def __init__(
        self,
        clock: Clock,
        coordinator: CoordinatorSide,
        line: Line,
        config: SiteConfig,
        worker: LocalWorker,
        *,
        train_s: float,
        held: Manifest | None = None,
    ) -> None:
        self.clock = clock
        self.coordinator = coordinator
        self.line = line
        self.config = config
        self.train_s = train_s
        self.outbox = Outbox(config.storage)
        worker.own = self.outbox.own.newest
        self.trainer = metered(worker, self.outbox, config, coordinator.federation)
        self.train_cpu_s: list[float] = []
        self.left = False
        self.wants_link = False
        """Whether there is a network; a machine that is off has no link all the same."""
        self.session: Session | None = None
        self._lives = 0
        self._training = 0
        self._held = held
        """The newest state that is here whole, as `edge_client.states` would find it."""
        self._spools = {held.transfer_id: _all_of(held)} if held is not None else {}
        self._scratch = config.storage / "work"
        durable.make_folder(self._scratch)
        coordinator.peers[config.name] = self

    # -- what happens to a machine ---

    def boot(self) -> None:
        """The machine is on, and the site's process starts with what its folder holds."""
        self._lives += 1
        plan = self.coordinator.plan
        identity = Identity(
            site=self.config.name,
            session=f"{self._lives:016x}",
            fingerprint=plan.fingerprint,
            config_sha256=plan.config_sha256,
            frozen_sha256=plan.frozen_sha256,
            software="mailboat experiment",
        )
        self.session = Session(
            identity,
            link=self.config.link,
            outbox=self.outbox.pending(),
            trained=self.outbox.trained(),
            outbox_max=self.config.outbox_max,
            held=self._held,
        )
        self._link()

    def power_off(self) -> None:
        """The machine is off: training is lost, what is sealed and what was pulled stays."""
        self._unlink()
        self.session = None
        self._training += 1

    def set_link(self, *, there: bool) -> None:
        """The network comes or goes."""
        self.wants_link = there
        if there:
            self._link()
        else:
            self._unlink()

    def _link(self) -> None:
        if self.session is not None and self.wants_link and not self.line.connected and not self.left:
            self.line.connect()
            self.coordinator.connected(self.config.name)
            self.decide(d.LinkUp())

    def _unlink(self) -> None:
        if self.session is None or not self.line.connected:
            return
        self.line.break_off()
        self.decide(d.LinkDown())
        session = self.session.identity.session

        def will() -> None:
            away = not self.line.connected or self.session is None or self.session.identity.session != session
            if away:
                self.coordinator.gone(self.config.name, session)

        self.clock.later(WILL_S, will)

    # -- in ---

    def hear(self, message: Message) -> None:
        """A control message of the coordinator."""
        self.decide(d.Received(message))

    def take_chunk(self, transfer_id: str, index: int) -> None:
        """One frame of a state has come."""
        if self.session is not None and self.session.pulls.accepts(transfer_id, index):
            self._spools[transfer_id].add(index)
            self.decide(d.ChunksStored(transfer_id, (index,)))

    def tick(self) -> None:
        """Time passed."""
        self.decide(d.Tick(receiving=self.line.receiving))

    # -- decide ---

    def decide(self, event: d.Event) -> None:
        """As `Agent._decide`."""
        if self.session is None or self.left:
            return
        decision = self.session.handle(event, self.clock.now, self.clock.now)
        for message in decision.sends:
            self._say(message)
        for job in decision.jobs:
            self._start(job)

    def _say(self, message: Message) -> None:
        name, coordinator = self.config.name, self.coordinator
        size = message_bytes(coordinator.name, Channel.UP_CTL, name, message)
        self.line.carry(self.line.up, size, lambda: coordinator.hear(name, message))

    def _soon(self, event: d.Event) -> None:
        life = self._lives
        self.clock.later(0, lambda: self.decide(event) if life == self._lives else None)

    def _start(self, job: d.Job) -> None:
        match job:
            case d.OpenSpool():
                have = self._spools.setdefault(job.manifest.transfer_id, Bitmap(job.manifest.frames))
                self._soon(d.SpoolOpened(job.manifest.transfer_id, have.to_bytes()))
            case d.CloseSpool():
                self._spools.pop(job.transfer_id, None)
            case d.Finish():
                assert self.session is not None
                assert self.session.pulls.pull is not None
                self._fetched(self.session.pulls.pull.manifest)
            case d.StepOn():
                self._stepped(job)
            case d.Train():
                self._training += 1
                training = self._training
                self.clock.later(self.train_s, lambda: self._train(job.base, training))
            case d.CancelTraining():
                self._training += 1
            case d.SendChunks():
                for index in job.indices:
                    self._send_chunk(job.update_id, index)
            case d.Settle():
                self.outbox.settle(job.receipt)
            case d.Exit():
                self.left = True
            case _:
                assert_never(job)

    # -- jobs ---

    def _fetched(self, manifest: Manifest) -> None:
        if isinstance(manifest.facts, StepFacts):
            self._soon(d.StepReady(manifest.transfer_id))
        else:
            self._ready(manifest)

    def _stepped(self, job: d.StepOn) -> None:
        """The state that steps have made, as if it had come whole; that it is the same is shown elsewhere."""
        last = job.steps[-1]
        made = {"transfer_id": last.leads_to[:32], "file_digest": last.leads_to}
        self._ready(job.base.model_copy(update={**made, "facts": StateFacts(version=last.version)}))

    def _ready(self, state: Manifest) -> None:
        self._held = state
        self._spools[state.transfer_id] = _all_of(state)
        self._soon(d.StateReady(state))

    def _send_chunk(self, update_id: str, index: int) -> None:
        found = self.outbox.read_frame(update_id, index)
        if found is None:
            return
        name, coordinator = self.config.name, self.coordinator

        def arrived() -> None:
            coordinator.take_chunk(name, update_id, index)
            self.decide(d.ChunkSent(update_id))

        size = chunk_bytes(coordinator.name, Channel.UP_DATA, name, found[0], index)
        self.line.carry(self.line.up, size, arrived)

    def _train(self, base: Manifest, training: int) -> None:
        """Train at the end of the time that it takes, so that nothing is trained that a power cut would lose."""
        if training != self._training:
            return
        state, delta = (self._scratch / f"{kind}.safetensors" for kind in ("state", "delta"))
        self.coordinator.extract(base.version, state)
        began = time.process_time()
        trained = asyncio.run(
            self._unless_held(self.trainer.train(state, base.state.version, delta, on_progress=_untold))
        )
        self.train_cpu_s.append(time.process_time() - began)
        if trained is not None:
            self.decide(d.Trained(self._seal(base, trained, delta)))

    async def _unless_held(self, training: Coroutine[Any, Any, TrainedUpdate]) -> TrainedUpdate | None:
        """What the trainer gives; None when it says that it holds this training, which is until the run ends."""
        task = asyncio.create_task(training)
        while not task.done() and not self.trainer.standing.held:
            await asyncio.wait([task], timeout=HELD_POLL_S)
        if task.done():
            return task.result()
        task.cancel()
        await asyncio.wait([task])
        return None

    def _seal(self, base: Manifest, trained: TrainedUpdate, delta: Path) -> Manifest:
        facts = UpdateFacts(
            site=self.config.name,
            base_version=base.state.version,
            base_digest=base.file_digest,
            examples=trained.examples,
            metrics=trained.metrics,
        )
        coordinator = self.coordinator
        return seal_delta(
            self.outbox,
            map_tensors(delta),
            facts,
            coordinator.federation,
            coordinator.plan.fingerprint,
            lambda manifest: manifest,
            trained.own,
        )


def _all_of(state: Manifest) -> Bitmap:
    return Bitmap(state.frames, range(state.frames))


def _untold(_share: float, _loss: float | None) -> None:
    """Nobody looks at a training from outside."""
