"""The coordinator of a federation in one process: the real core, admission and merge, in virtual time.

What `coordinator.service` does with a broker and a journal is done here with lines and without: nothing is meant to
survive this process, so records change the core and go nowhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Protocol, assert_never

from coordinator import admission, aggregate
from coordinator import decisions as d
from coordinator.core import Core
from coordinator.decisions import Instant
from coordinator.genesis import open_run
from coordinator.masters import prune_masters
from coordinator.means import Kept
from coordinator.records import Rejected, VersionCommitted
from coordinator.validation import write_model
from edge_client.outbox import Outbox
from mailboat.experiment.clock import Clock, Line
from mailboat.experiment.packets import chunk_bytes, message_bytes
from shared.config import AdmissionSection, CoordinatorConfig, FederationConfig
from shared.errors import ConfigError, RefusedError
from shared.messages import Announce, Message, Presence
from shared.plan import SealedPlan
from shared.states import extract_state
from shared.store import FrameStore
from shared.topics import Channel
from shared.transfer import Bitmap

BOOT = "c0" * 8
UNHURRIED = AdmissionSection(updates_per_hour=0)
"""Virtual trainings may take no time at all; what may come in an hour is not the question here."""


class Peer(Protocol):
    """A site, as the coordinator's lines lead to it."""

    @property
    def line(self) -> Line:
        """Its connection."""
        ...

    @property
    def outbox(self) -> Outbox:
        """Where the bytes of its updates are."""
        ...

    def hear(self, message: Message) -> None:
        """A control message has come."""

    def take_chunk(self, transfer_id: str, index: int) -> None:
        """One frame of a state has come."""


class CoordinatorSide:
    """See the module's docstring.

    `committed` is called with each version, 0 first; `loss` gives the loss of the state in a file on the coordinator's
    own notes, where it has any.
    """

    def __init__(
        self,
        clock: Clock,
        folder: Path,
        federation: FederationConfig,
        plan: SealedPlan,
        initial: Path,
        *,
        committed: Callable[[int], None],
        loss: Callable[[Path], float] | None = None,
    ) -> None:
        self.clock = clock
        self.federation = federation
        self.plan = plan
        self.name = federation.federation.name
        self.updates, self.states = FrameStore(folder / "updates"), FrameStore(folder / "states")
        self.masters = folder / "masters"
        self.peers: dict[str, Peer] = {}
        """Sites by name, once they are made."""
        self.rejected: list[Rejected] = []
        config = CoordinatorConfig(federation=folder, storage=folder, admission=UNHURRIED)
        self.core = Core(federation, plan, config=config, boot=BOOT)
        self.core.apply(open_run(folder, federation, plan, initial, created=0.0))
        self._committed = committed
        self._loss = loss
        self._model = folder / "validated.safetensors"
        self._retained: Announce | None = None
        self._spools: dict[str, Bitmap] = {}

    def begin(self) -> None:
        """Connect to the broker, with version 0 made."""
        self._committed(self.core.ledger.version)
        self.decide(d.LinkUp())

    def extract(self, version: int, path: Path) -> None:
        """Write the plain file of a published state, as whoever has fetched what makes it up."""
        extract_state(self.states, self.core.ledger.parts(version), path)

    @property
    def finished(self) -> bool:
        """Whether the last version is published."""
        return self.core.ledger.finished

    # -- in ---

    def connected(self, site: str) -> None:
        """A site is with the broker, which hands it the retained announcement."""
        if self._retained is not None:
            self._post(site, Channel.ANNOUNCE, self._retained)

    def gone(self, site: str, session: str) -> None:
        """The broker speaks a site's last will."""
        self.decide(d.Received(site, Presence(site=site, session=session, online=False)))

    def hear(self, site: str, message: Message) -> None:
        """A site's control message."""
        self.decide(d.Received(site, message))

    def take_chunk(self, site: str, update_id: str, index: int) -> None:
        """One frame of an update has come."""
        if self.core.uploads.accepts(site, update_id, index):
            self._spools[update_id].add(index)
            self.decide(d.ChunksStored(update_id, (index,)))

    def tick(self) -> None:
        """Time passed."""
        self.decide(d.Tick())

    # -- decide ---

    def decide(self, event: d.Event) -> None:
        """As `Service._decide`."""
        decision = self.core.handle(event, Instant(self.clock.now, self.clock.now))
        self.rejected += [record for record in decision.records if isinstance(record, Rejected)]
        if any(isinstance(record, VersionCommitted) for record in decision.records):
            self._committed(self.core.ledger.version)
        for send in decision.sends:
            if isinstance(send.message, Announce) and send.site is None:
                self._retained = send.message
            channel = Channel.ANNOUNCE if send.site is None else Channel.DOWN_CTL
            for site in [send.site] if send.site is not None else list(self.peers):
                self._post(site, channel, send.message)
        for job in decision.jobs:
            self._start(job)

    def _post(self, site: str, channel: Channel, message: Message) -> None:
        peer = self.peers[site]
        size = message_bytes(self.name, channel, site if channel.per_site else None, message)
        peer.line.carry(peer.line.down, size, partial(peer.hear, message))

    def _soon(self, event: d.Event) -> None:
        self.clock.later(0, lambda: self.decide(event))

    def _start(self, job: d.Job) -> None:
        match job:
            case d.OpenSpool():
                have = self._spools.setdefault(job.manifest.transfer_id, Bitmap(job.manifest.frames))
                self._soon(d.SpoolOpened(job.manifest.transfer_id, have.to_bytes()))
            case d.CloseSpool():
                pass  # what has come stays for the next attempt
            case d.Discard():
                self._spools.pop(job.update_id, None)
                self.updates.delete(job.update_id)
            case d.Verify():
                self._verify(job.update_id)
            case d.Validate():
                self._validate(job)
            case d.Merge():
                self._merge(job)
            case d.Serve():
                self._serve(job)
            case d.Stop():
                pass
            case _:
                assert_never(job)

    # -- jobs ---

    def _verify(self, update_id: str) -> None:
        upload = self.core.uploads.get(update_id)
        assert upload is not None, "a complete upload is there until it is verified"
        with self.updates.open_partial(upload.manifest) as partial:
            for index in range(upload.manifest.frames):
                found = self.peers[upload.site].outbox.read_frame(update_id, index)
                assert found is not None, "a site keeps an update until its receipt"
                partial.write(index, found[1])
            stored = partial.finish()
        self._spools.pop(update_id)
        try:
            admitted = admission.verify(stored, self.plan)
        except RefusedError as error:
            self._soon(d.VerifyFailed(update_id, error.rule, error.message))
        else:
            self._soon(d.Verified(update_id, admitted.norm))

    def _validate(self, job: d.Validate) -> None:
        if self._loss is None:
            raise ConfigError(
                f'aggregation.quality = "{self.federation.aggregation.quality}" weighs by a loss on notes of the '
                "coordinator, and it has none here",
                hint="give the cell notes.validation, so many notes",
            )
        write_model(Kept(self.updates, self.states), job, dict(sorted(self.plan.tensors.items())), self._model)
        self._soon(d.Validated(job.update_id, job.norm, self._loss(self._model)))

    def _merge(self, job: d.Merge) -> None:
        result = aggregate.merge(
            job.plan, self.updates, self.states, self.masters, self.plan, self.federation, created=0.0
        )
        prune_masters(self.masters, {job.plan.version})
        self._soon(d.Merged(job.plan, result))

    def _serve(self, job: d.Serve) -> None:
        stored = self.states.get(job.transfer_id)
        assert stored is not None, "a published state is in the store"
        channel = Channel.BULK if job.site is None else Channel.DOWN_DATA
        for site in [job.site] if job.site is not None else list(self.peers):
            peer = self.peers[site]
            for index in job.indices:
                size = chunk_bytes(self.name, channel, job.site, stored.manifest, index)
                peer.line.carry(peer.line.down, size, partial(peer.take_chunk, job.transfer_id, index))

    def last_words(self) -> Mapping[str, Mapping[str, float]]:
        """Each site's metrics on its last update that came whole."""
        said: dict[str, Mapping[str, float]] = {}
        for update_id in self.core.ledger.known:
            stored = self.updates.get(update_id)
            if stored is not None:
                said[stored.manifest.update.site] = stored.manifest.update.metrics
        return said
