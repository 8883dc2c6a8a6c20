"""What a site pulls: the announced state whole, or the steps that lead to it from the one that lies here.

Theory of operation
-------------------
Three states of the federation are told apart, each a whole one with a digest:

    announced   the newest one, as the coordinator says
    held        the newest one that lies here: what steps are added to
    ready       the newest one that may be trained on

The announcement names the ways to the announced state; which one is taken follows from what is held, anew after each
event, so that whatever was lost, killed or restored from a backup in between needs no case of its own. One transfer is
under way at a time. Steps are kept as they come and added up together when the last one is here; a state that is
damaged, or that no steps lead on from, is replaced by one that comes whole.

The way ends at the state that was the newest when it began, so that a site whose link is slower than the versions come
still trains now and then, a little late. When the steps that it needs are announced no more, it trains on the whole
state to which they were to be added, and takes another.

Each frame is compared with its hash as it arrives. Whether the frames make up the state that was published is seen when
they are unpacked, for training, adding steps or an export: going through them for that alone would cost a site a tenth
of what a round costs it.
"""

from __future__ import annotations

from typing import assert_never

from edge_client import decisions as d
from edge_client.patience import Patience
from edge_client.under_way import Pull
from shared.config import LinkSection
from shared.manifest import Manifest
from shared.messages import Announce, Want
from shared.transfer import Receiver

ABANDON_BELOW = 0.5
"""A pull is given up for another one while less than this share of it is here."""


class Pulling:
    """See the module's docstring; `held` is what lies here whole when the process starts."""

    def __init__(self, link: LinkSection, held: Manifest | None) -> None:
        self.announced: Announce | None = None
        self.held = held
        self.ready: Manifest | None = None
        self.pull: Pull | None = None
        self.stepping = ""
        """Digest of the state that steps are being added up to; empty while none are."""
        self._link = link
        self._fetched: set[str] = set()
        """Steps of the way that are here."""
        self._goal = ""
        """Digest of the state at the end of the way."""
        self._came_for_steps = ""
        """Digest of the state that came whole, to be added to and not to be trained on."""

    @property
    def busy(self) -> bool:
        """Whether a transfer is on its way, or steps are being added up."""
        return self.pull is not None or bool(self.stepping)

    @property
    def arrived(self) -> bool:
        """Whether the announced state is ready."""
        announced, ready = self.announced, self.ready
        return announced is not None and ready is not None and ready.file_digest == announced.state_digest

    @property
    def in_use(self) -> set[str]:
        """Ids of the transfers that must stay on the disk."""
        way = way_from(self.held, self.announced) if self.announced else ()
        pulled = self.pull.manifest if self.pull else None
        return {each.transfer_id for each in (self.held, self.ready, pulled, *way) if each is not None}

    def accepts(self, transfer_id: str, index: int) -> bool:
        """Whether a chunk that arrives now is to be written."""
        pull = self.pull
        return (
            pull is not None
            and pull.manifest.transfer_id == transfer_id
            and pull.receiver.open
            and index < pull.manifest.frames
            and index not in pull.receiver.have
        )

    # -- the transfer under way ---

    def link_down(self) -> None:
        """The link is gone; what is here stays."""
        if self.pull is not None and self.pull.receiver.open:
            self.pull.receiver.credit(granted=False)

    def take(self, event: d.PullEvent, now: float, out: d.Decision, *, welcome: bool) -> None:
        """Something came of what was started; `welcome` says whether the coordinator hears us."""
        match event:
            case d.SpoolOpened():
                self._opened(event, now, out, welcome=welcome)
            case d.ChunksStored():
                self._stored(event, now, out, welcome=welcome)
            case d.StateReady():
                self._state_ready(event.manifest)
            case d.StepReady():
                self._step_ready(event.transfer_id)
            case d.StateBroken():
                self._forget(event.transfer_id)
            case d.Unmade():
                self._unmade(event)
            case _:
                assert_never(event)

    def _opened(self, event: d.SpoolOpened, now: float, out: d.Decision, *, welcome: bool) -> None:
        pull = self._pull_of(event.transfer_id)
        if pull is None:
            return
        pull.receiver.opened(event.have)
        if pull.receiver.complete:
            out.jobs.append(d.Finish(event.transfer_id))
        elif welcome:
            self.want(now, out, restart=True)

    def _stored(self, event: d.ChunksStored, now: float, out: d.Decision, *, welcome: bool) -> None:
        pull = self._pull_of(event.transfer_id)
        if pull is None or not pull.receiver.open:
            return
        pull.unacknowledged += pull.receiver.stored(event.indices)
        pull.patience.moved(now)
        if pull.receiver.complete:
            out.jobs.append(d.Finish(event.transfer_id))
            self._say_want(pull, out, restart=False)
        elif welcome and pull.unacknowledged >= max(1, self._link.window // 2):
            self.want(now, out, restart=False)

    def want(self, now: float, out: d.Decision, *, restart: bool) -> None:
        """Tell the coordinator, to whom we are welcome, what is missing; anew with `restart`."""
        pull = self.pull
        if pull is None or not pull.receiver.open:
            return
        pull.receiver.credit(granted=True)
        pull.unacknowledged = 0
        if not (restart and pull.begins_anew(now)):
            pull.patience.moved(now)
        self._say_want(pull, out, restart=restart)

    def _say_want(self, pull: Pull, out: d.Decision, *, restart: bool) -> None:
        have = pull.receiver.have.to_bytes()
        out.sends.append(
            Want(transfer_id=pull.manifest.transfer_id, have=have, window=self._link.window, restart=restart)
        )

    def _pull_of(self, transfer_id: str) -> Pull | None:
        return self.pull if self.pull is not None and self.pull.manifest.transfer_id == transfer_id else None

    # -- what came of it ---

    def _state_ready(self, manifest: Manifest) -> None:
        if self._pull_of(manifest.transfer_id) is not None:
            self.pull = None
        self.held = manifest
        if manifest.file_digest == self.stepping:
            self.ready, self.stepping = manifest, ""
        elif self.announced and leads_on(self.announced, manifest):
            self._came_for_steps = manifest.file_digest
        else:
            self.ready = manifest

    def _step_ready(self, transfer_id: str) -> None:
        if self._pull_of(transfer_id) is not None:
            self.pull = None
        self._fetched.add(transfer_id)

    def _forget(self, transfer_id: str) -> None:
        """Its bytes are gone; what is announced and not here is pulled."""
        if self._pull_of(transfer_id) is not None:
            self.pull = None
        self._fetched.discard(transfer_id)
        if self.held is not None and self.held.transfer_id == transfer_id:
            self.held = None
        if self.ready is not None and self.ready.transfer_id == transfer_id:
            self.ready = None

    def _unmade(self, event: d.Unmade) -> None:
        self.stepping = ""
        for transfer_id in event.broken:
            self._forget(transfer_id)

    # -- what follows from where we stand ---

    def go_on(self, now: float, out: d.Decision) -> None:
        """Fetch the next transfer of the way, or add up what is here."""
        if self.announced is None or self.stepping:
            return
        held = self.held
        if held and held.file_digest == self._came_for_steps and not leads_on(self.announced, held):
            self.ready, self._came_for_steps = held, ""
        if self.arrived:
            return
        way = self._way(self.announced)
        self._fetched &= {each.transfer_id for each in way}
        missing = next((each for each in way if each.transfer_id not in self._fetched), None)
        if missing is None:
            assert self.held is not None, "steps lead on from what is held"
            self.stepping = self._goal
            out.jobs.append(d.StepOn(self.held, way))
            return
        pull = self.pull
        if pull is not None:
            if pull.manifest.transfer_id == missing.transfer_id:
                return
            if len(pull.receiver.have) >= ABANDON_BELOW * pull.manifest.frames or not pull.receiver.open:
                return  # finish it, train on it, be a little late
            pull.receiver.close()
            out.jobs.append(d.CloseSpool(pull.manifest.transfer_id))
        self.pull = Pull(missing, Receiver(missing.frames), Patience(self._link.stall_s, self._link.backoff_cap_s))
        self.pull.patience.moved(now)
        out.jobs.append(d.OpenSpool(missing))

    def _way(self, announce: Announce) -> tuple[Manifest, ...]:
        way = way_from(self.held, announce)
        ends = [each.leads_to for each in way]
        if self._goal not in ends:
            self._goal = ends[-1]
        return way[: ends.index(self._goal) + 1]


def leads_on(announce: Announce, held: Manifest) -> bool:
    """Whether announced steps lead on from a state to the newest one."""
    return any(step.step.base_digest == held.file_digest for step in announce.steps)


def way_from(held: Manifest | None, announce: Announce) -> tuple[Manifest, ...]:
    """Return the transfers that lead from the state that is held to the announced one, in order.

    Steps where they lead on from it, else the state that can be had whole and the steps behind it. One that is held is
    its own way: it lies here.
    """
    if held is not None and held.file_digest == announce.state_digest:
        return (held,)
    if held is not None and leads_on(announce, held):
        first = next(at for at, step in enumerate(announce.steps) if step.step.base_digest == held.file_digest)
        return announce.steps[first:]
    return (announce.manifest, *(step for step in announce.steps if step.version > announce.manifest.version))
