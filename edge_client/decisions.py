"""What goes into a site's session and what comes out: plain values.

The shell publishes the sends and starts the jobs; a job's result comes back as an event. What must survive a crash
(a sealed update, a receipt) is made durable by the job before its event is raised.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from shared.manifest import Manifest
from shared.messages import Message, Receipt

# -- events ---


@dataclass(frozen=True, slots=True)
class LinkUp:
    """Connected to the broker; subscriptions stand."""


@dataclass(frozen=True, slots=True)
class LinkDown:
    """Connection lost."""


@dataclass(frozen=True, slots=True)
class Received:
    """A valid control message for this site, or the announcement."""

    message: Message


@dataclass(frozen=True, slots=True)
class SpoolOpened:
    """The spool of a state is open; `have` is what an earlier attempt left there, verified."""

    transfer_id: str
    have: bytes


@dataclass(frozen=True, slots=True)
class ChunksStored:
    """These chunks of a state are on disk."""

    transfer_id: str
    indices: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StateReady:
    """A state is complete, each frame as its manifest says (also: was already here, or was made by steps)."""

    manifest: Manifest


@dataclass(frozen=True, slots=True)
class StepReady:
    """A step is complete, each frame as its manifest says (also: was already here when we started)."""

    transfer_id: str


@dataclass(frozen=True, slots=True)
class StateBroken:
    """A state or step that was pulled, or began to be, is not what its manifest says; its bytes are gone."""

    transfer_id: str


@dataclass(frozen=True, slots=True)
class Unmade:
    """No state came of steps; those of these transfers that were to blame are gone."""

    broken: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Trained:
    """A local update is sealed in the outbox, durably."""

    manifest: Manifest


@dataclass(frozen=True, slots=True)
class Lost:
    """The coordinator lost an accepted update of ours that was trained on the state of this digest."""

    base_digest: str


@dataclass(frozen=True, slots=True)
class ChunkSent:
    """The broker has one chunk of an update that we were told to send."""

    update_id: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed; about four times a second."""

    receiving: bool = False
    """More of a message that is not here whole has come in since the last one."""


PullEvent = SpoolOpened | ChunksStored | StateReady | StepReady | StateBroken | Unmade
Event = LinkUp | LinkDown | Received | PullEvent | Trained | Lost | ChunkSent | Tick

# -- decisions ---


@dataclass(frozen=True, slots=True)
class OpenSpool:
    """Open or resume the spool of a state or step and answer SpoolOpened, or StateBroken."""

    manifest: Manifest


@dataclass(frozen=True, slots=True)
class CloseSpool:
    """Give up a state or step that is not wanted any more; delete its bytes."""

    transfer_id: str


@dataclass(frozen=True, slots=True)
class Finish:
    """Move a complete transfer into the store, and answer StateReady, StepReady or StateBroken."""

    transfer_id: str


@dataclass(frozen=True, slots=True)
class StepOn:
    """Make the state that these steps lead to, one after the other, durably, and answer StateReady or Unmade."""

    base: Manifest
    steps: tuple[Manifest, ...]


@dataclass(frozen=True, slots=True)
class Train:
    """Train on this state, seal the update, and answer Trained; StateBroken when it is not what was published."""

    base: Manifest


@dataclass(frozen=True, slots=True)
class CancelTraining:
    """The run is complete: what is being trained could not count any more."""


@dataclass(frozen=True, slots=True)
class SendChunks:
    """Publish these chunks of a sealed update, in this order."""

    update_id: str
    indices: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Settle:
    """Keep the receipt, delete the update's bytes."""

    receipt: Receipt


@dataclass(frozen=True, slots=True)
class Exit:
    """Leave: the run is complete (rule None), or the coordinator refused us."""

    rule: str | None = None
    detail: str = ""


Job = OpenSpool | CloseSpool | Finish | StepOn | Train | CancelTraining | SendChunks | Settle | Exit


@dataclass(slots=True)
class Decision:
    """Messages to publish, then jobs to start."""

    sends: list[Message] = field(default_factory=list)
    jobs: list[Job] = field(default_factory=list)
