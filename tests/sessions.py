"""A site's session on a bench: events in by hand, decisions out, time as the test says."""

from __future__ import annotations

from typing import Any, TypeVar

from edge_client import decisions as d
from edge_client.session import Identity, Session
from shared.config import LinkSection
from shared.manifest import Manifest
from shared.messages import Announce, Message, Receipt, Want, Welcome
from shared.transfer import Bitmap
from tests.factories import digest, make_federation, make_plan, make_state, make_step, make_update

STALL_S, CAP_S = 5.0, 15.0
BOOT, REBOOT, SESSION = "b" * 16, "c" * 16, "a" * 16
M = TypeVar("M", bound=Message)
J = TypeVar("J", bound=d.Job)


class SessionBench:
    """The session of site `north`, just started; window 4."""

    def __init__(
        self,
        *,
        outbox: list[Manifest] | None = None,
        trained: set[str] | None = None,
        outbox_max: int = 2,
        held: Manifest | None = None,
    ) -> None:
        self.plan = make_plan(make_federation())
        self.now = 100.0
        identity = Identity(
            site="north",
            session=SESSION,
            fingerprint=self.plan.fingerprint,
            config_sha256=self.plan.config_sha256,
            frozen_sha256=self.plan.frozen_sha256,
            software="test",
        )
        self.session = Session(
            identity,
            link=LinkSection(stall_s=STALL_S, backoff_cap_s=CAP_S, window=4),
            outbox=outbox or [],
            trained=trained or set(),
            outbox_max=outbox_max,
            held=held,
        )

    def handle(self, event: d.Event) -> d.Decision:
        """One event now."""
        return self.session.handle(event, self.now, 1e9 + self.now)

    def receive(self, message: Message) -> d.Decision:
        """A message for this site, or the announcement."""
        return self.handle(d.Received(message))

    def tick(self, seconds: float = 0.0) -> d.Decision:
        """Let time pass, then tick."""
        self.now += seconds
        return self.handle(d.Tick())

    def ticks(self, seconds: float) -> list[tuple[float, Message]]:
        """What is sent within the next seconds, and when, counted from now."""
        start, sent = self.now, []
        while self.now < start + seconds:
            sent += [(self.now - start, message) for message in self.tick(0.25).sends]
        return sent

    def state(self, version: int = 0, **changes: Any) -> Manifest:
        """A state that the coordinator may publish."""
        return make_state(self.plan, version, **changes)

    def step(self, version: int, **changes: Any) -> Manifest:
        """The step that makes that state out of the one before."""
        return make_step(self.plan, version, **changes)

    def update(self, version: int = 0, **changes: Any) -> Manifest:
        """An update of this site, trained on a version."""
        return make_update(self.plan, "north", self.state(version), **changes)

    def announce(self, state: Manifest | None = None, *, boot: str = BOOT, **changes: Any) -> d.Decision:
        """The coordinator's announcement arrives."""
        fields: dict[str, Any] = {
            "boot": boot,
            "fingerprint": self.plan.fingerprint,
            "config_sha256": self.plan.config_sha256,
            "frozen_sha256": self.plan.frozen_sha256,
            "manifest": state or self.state(),
            "final": False,
            "target": 3,
            **changes,
        }
        return self.receive(Announce(**fields))

    def announce_steps(self, whole: int, *steps: int, **changes: Any) -> d.Decision:
        """An announcement of the state of version `whole` and of the steps to these versions."""
        return self.announce(self.state(whole), steps=tuple(self.step(version) for version in steps), **changes)

    def welcome(self, boot: str = BOOT) -> d.Decision:
        """The coordinator's welcome arrives."""
        return self.receive(Welcome(session=SESSION, boot=boot, clock=0.0))

    def connect(self) -> d.Decision:
        """The link comes up and the site is welcome; the decision is that of the welcome."""
        self.handle(d.LinkUp())
        return self.welcome()

    def want(self, update: Manifest, *held: int, window: int = 4, **changes: Any) -> d.Decision:
        """The coordinator wants chunks of an update."""
        have = Bitmap(update.frames, held).to_bytes()
        return self.receive(Want(transfer_id=update.transfer_id, have=have, window=window, **changes))

    def receipt(self, update: Manifest, **changes: Any) -> Receipt:
        """The coordinator's receipt for an update."""
        fields = {"update_id": update.transfer_id, "manifest_sha256": update.digest, "outcome": "accepted", **changes}
        return Receipt.model_validate(fields)

    def opened(self, state: Manifest, *held: int) -> d.Decision:
        """The spool of a state is open and holds these chunks."""
        return self.handle(d.SpoolOpened(state.transfer_id, Bitmap(state.frames, held).to_bytes()))

    def pulled(self, state: Manifest) -> d.Decision:
        """A state is here, verified; the decision is that of its arrival."""
        return self.handle(d.StateReady(state))


def jobs(decision: d.Decision, kind: type[J]) -> list[J]:
    """The jobs of one kind that a decision starts."""
    return [job for job in decision.jobs if isinstance(job, kind)]


def sent(decision: d.Decision, kind: type[M]) -> list[M]:
    """The messages of one kind that a decision sends."""
    return [message for message in decision.sends if isinstance(message, kind)]


def other_digest() -> str:
    """A digest of nothing here."""
    return digest("something else")
