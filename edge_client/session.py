"""A site's decisions: events in, Decision out; no I/O, no clock, no tensors.

Theory of operation
-------------------
Four things go on at once, and none waits for another without need:

    link     say hello on each connection and to each coordinator that boots anew, until welcome or refused
    pull     fetch what leads to the announced state, unless that is here (`edge_client.pulling`)
    train    train once on each state that arrives; needs no link; pauses when the outbox is full; once more, later,
             when the update was rejected and nothing newer has come
    push     offer the oldest sealed update, send what the coordinator wants, until its receipt is here

The site is the side that comes and goes, so it owns the timers, and there is one: whatever it waits for that has shown
no progress for `stall_s` (doubling up to `cap_s` while nothing answers) it asks for again.

The announcement is believed: a coordinator restored from a backup may announce an older version, and then that one is
pulled and trained. States are therefore told apart by digest, never by number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import assert_never

from edge_client import decisions as d
from edge_client.patience import Patience
from edge_client.pulling import Pulling
from edge_client.under_way import Push
from shared.config import LinkSection
from shared.manifest import Manifest
from shared.messages import Announce, Hello, Message, Offer, Phase, Probe, Receipt, Refused, Wait, Want, Welcome
from shared.transfer import Sender, SenderState

RETRAIN_S, RETRAIN_CAP_S = 30.0, 3600.0
"""A state whose update was rejected is trained on again if it is still the newest after so long; doubling each time."""

IDLE_HELLO_S, ANEW_S = 30.0, 1.0
"""An idle site says hello this often (300 bytes); the same announcement begins a pull anew at most this often."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Who this site is and which federation it thinks it is in."""

    site: str
    session: str
    fingerprint: str
    config_sha256: str
    frozen_sha256: str
    software: str


class Session:
    """See the module's docstring.

    `outbox` are the sealed updates without receipt, oldest first; `trained` the digests of the states that were
    trained on, so that a restart does not train twice; `held` is the newest state that lies here whole.
    """

    def __init__(
        self,
        identity: Identity,
        *,
        link: LinkSection,
        outbox: list[Manifest],
        trained: set[str],
        outbox_max: int,
        held: Manifest | None = None,
    ) -> None:
        self.identity = identity
        self.link = link
        self.outbox = list(outbox)
        self.trained = set(trained)
        self.outbox_max = outbox_max
        self.connected = False
        self.welcome = False
        self.pulls = Pulling(link, held)
        self.training: Manifest | None = None
        self.push: Push | None = None
        self._boot: str | None = None
        self._hello_patience = self._patience()
        self._idle_patience = Patience(IDLE_HELLO_S, IDLE_HELLO_S)
        self._rejected = ""
        """Digest of the state whose update was rejected, or lost, last."""
        self._retrain_patience = Patience(RETRAIN_S, RETRAIN_CAP_S)

    def _patience(self) -> Patience:
        return Patience(self.link.stall_s, self.link.backoff_cap_s)

    @property
    def phase(self) -> Phase:
        """What the site is doing, in one word, for people."""
        if self.training is not None:
            return "training"
        if self.push is not None or self.outbox:
            return "uploading"
        if self.pulls.busy:
            return "pulling"
        if self.announced is not None and self.announced.final:
            return "done"
        return "waiting" if self.welcome else "starting"

    @property
    def states_in_use(self) -> set[str]:
        """Ids of the states and steps that must stay on the disk."""
        return self.pulls.in_use | ({self.training.transfer_id} if self.training else set())

    @property
    def announced(self) -> Announce | None:
        """What the coordinator said last of this federation's newest version."""
        return self.pulls.announced

    def handle(self, event: d.Event, now: float, wall: float) -> d.Decision:
        """Decide; `now` is monotonic seconds, `wall` unix seconds (for the hello only)."""
        out = d.Decision()
        match event:
            case d.LinkUp():
                self.connected = True
                self._greet(now, wall, out)
            case d.LinkDown():
                self._link_down()
            case d.Received():
                self._receive(event.message, now, wall, out)
            case d.SpoolOpened() | d.ChunksStored() | d.StateReady() | d.StepReady() | d.StateBroken() | d.Unmade():
                self._pulled(event, now, out)
            case d.Trained():
                # Sealed in the moment in which the run ended: it is offered like any other, and gets its answer.
                self.training = None
                self.trained.add(event.manifest.update.base_digest)
                self.outbox.append(event.manifest)
            case d.Lost():
                self._train_again(event.base_digest, now)
            case d.ChunkSent():
                self._chunk_sent(event.update_id, now)
            case d.Tick():
                self._tick(event, now, wall, out)
            case _:
                assert_never(event)
        self._go_on(now, out)
        return out

    # -- link ---

    def _greet(self, now: float, wall: float, out: d.Decision) -> None:
        self._hello_patience.moved(now)
        self._say_hello(wall, out)

    def _say_hello(self, wall: float, out: d.Decision) -> None:
        me, heard = self.identity, self.announced
        self.welcome = False
        out.sends.append(
            Hello(
                site=me.site,
                session=me.session,
                fingerprint=me.fingerprint,
                config_sha256=me.config_sha256,
                frozen_sha256=me.frozen_sha256,
                software=me.software,
                clock=wall,
                heard=heard.state_id if heard else None,
                heard_final=heard is not None and heard.final,
            )
        )

    def _link_down(self) -> None:
        self.connected = self.welcome = False
        self._boot = None
        self.push = None
        self.pulls.link_down()

    def _receive(self, message: Message, now: float, wall: float, out: d.Decision) -> None:
        match message:
            case Announce():
                self._announce(message, now, wall, out)
            case Welcome(session=self.identity.session):
                self.welcome = True
                self._boot = message.boot
                self._idle_patience.moved(now)
                self.pulls.want(now, out, restart=True)
            case Probe(session=self.identity.session):
                self._greet(now, wall, out)
            case Refused(session=self.identity.session):
                out.jobs.append(d.Exit(message.rule, message.detail))
            case Want():
                self._wanted(message, now, out)
            case Wait():
                self._wait(message, now)
            case Receipt():
                self._receipt(message, now, out)
            case _:
                pass  # meant for another process of this name, or of a kind that only we send

    def _announce(self, announce: Announce, now: float, wall: float, out: d.Decision) -> None:
        if announce.fingerprint != self.identity.fingerprint:
            return  # perhaps retained from an earlier run; the coordinator's answer to our hello decides
        pull, again = self.pulls.pull, self.announced == announce
        self.pulls.announced = announce
        if self.connected and self._boot not in {None, announce.boot}:
            # A coordinator that has just booted knows nothing of us.
            self.push, self._boot = None, announce.boot
            self._greet(now, wall, out)
        elif again and pull is not None and pull.begins_anew(now, within_s=ANEW_S) and self.welcome:
            self.pulls.want(now, out, restart=True)  # its link was away, and with it what it had sent us

    def _pulled(self, event: d.PullEvent, now: float, out: d.Decision) -> None:
        self.pulls.take(event, now, out, welcome=self.welcome)
        if isinstance(event, d.StateBroken) and self.training and self.training.transfer_id == event.transfer_id:
            self.training = self.pulls.ready = None

    # -- push ---

    def _wanted(self, want: Want, now: float, out: d.Decision) -> None:
        push = self.push
        if push is None or push.manifest.transfer_id != want.transfer_id:
            return
        if want.restart and not push.unsent:
            push.sender.restart()
        if push.sender.on_want(want.have, want.window):
            push.patience.moved(now)
        if push.sender.state is SenderState.PACED:
            push.patience.wait(now, want.retry_s)
        self._send_chunks(push, now, out)

    def _wait(self, wait: Wait, now: float) -> None:
        """The coordinator cannot take the update now; its bytes stay here, and it is offered again when asked to."""
        push = self.push
        if push is not None and push.manifest.transfer_id == wait.transfer_id:
            push.sender.restart()
            push.patience.wait(now, wait.retry_s)

    def _send_chunks(self, push: Push, now: float, out: d.Decision) -> None:
        indices = push.sender.take()
        if indices:
            push.patience.moved(now)
            push.unsent += len(indices)
            out.jobs.append(d.SendChunks(push.manifest.transfer_id, tuple(indices)))

    def _chunk_sent(self, update_id: str, now: float) -> None:
        push = self.push
        if push is not None and push.manifest.transfer_id == update_id and push.unsent:
            push.unsent -= 1
            push.patience.moved(now)

    def _receipt(self, receipt: Receipt, now: float, out: d.Decision) -> None:
        """Keep any receipt that is about an update of ours, also the later word that it was merged."""
        mine = next((update for update in self.outbox if update.transfer_id == receipt.update_id), None)
        if mine is not None and mine.digest == receipt.manifest_sha256:
            self.outbox.remove(mine)
            if self.push is not None and self.push.manifest is mine:
                self.push.sender.settle()
                self.push = None
            if receipt.outcome == "rejected":
                self._train_again(mine.update.base_digest, now)
        elif mine is not None:
            return
        out.jobs.append(d.Settle(receipt))

    def _train_again(self, base_digest: str, now: float) -> None:
        """What was trained on that state does not count: do it once more, later, if nothing newer has come by then."""
        if base_digest != self._rejected:
            self._rejected = base_digest
            self._retrain_patience.moved(now)

    # -- what follows from where we stand ---

    def _go_on(self, now: float, out: d.Decision) -> None:
        self.pulls.go_on(now, out)
        self._next_training(out)
        self._next_push(now, out)
        if self.announced is not None and self.announced.final:
            if self.training is not None:
                self.training = None
                out.jobs.append(d.CancelTraining())
            if not self.outbox and self.pulls.arrived:
                out.jobs.append(d.Exit())

    def _next_training(self, out: d.Decision) -> None:
        ready = self.pulls.ready
        if ready is None or self.training is not None or len(self.outbox) >= self.outbox_max:
            return
        if ready.file_digest in self.trained or (self.announced is not None and self.announced.final):
            return
        self.training = ready
        out.jobs.append(d.Train(ready))

    def _next_push(self, now: float, out: d.Decision) -> None:
        if self.push is not None or not self.outbox or not self.welcome:
            return
        oldest = self.outbox[0]
        self.push = Push(oldest, Sender(oldest.frames), self._patience())
        self.push.patience.moved(now)
        out.sends.append(Offer(manifest=oldest))

    def _tick(self, tick: d.Tick, now: float, wall: float, out: d.Decision) -> None:
        if not self.connected:
            return
        if not self.welcome:
            if self._hello_patience.spent(now):
                self._say_hello(wall, out)
            return
        # While chunks wait for a slow link there is progress to come; a dead link shows as LinkDown.
        if self.push is not None and not self.push.unsent and self.push.patience.spent(now):
            self.push.sender.restart()
            out.sends.append(Offer(manifest=self.push.manifest))
        pull = self.pulls.pull
        if pull is not None and tick.receiving:
            pull.patience.moved(now)
        elif pull is not None and pull.patience.spent(now):
            self.pulls.want(now, out, restart=True)
        if self._stuck_with_rejected() and self._retrain_patience.spent(now):
            self.trained.discard(self._rejected)
        # With nothing to do but wait for an announcement, make sure that none was lost.
        if self.phase != "waiting":
            self._idle_patience.moved(now)
        elif self._idle_patience.spent(now):
            self._greet(now, wall, out)

    def _stuck_with_rejected(self) -> bool:
        """Whether our update of the newest state was rejected: if everybody's was, nobody else makes a next version."""
        ready = self.pulls.ready
        if ready is None or not self.pulls.arrived:
            return False
        return ready.file_digest == self._rejected and ready.file_digest in self.trained
