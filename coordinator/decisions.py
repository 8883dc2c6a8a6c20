"""What goes into the coordinator's core and what comes out: plain values.

The shell's whole duty, in this order:

    decision = core.handle(event, now)
    await journal.append(decision.records)     # durable first
    for send in decision.sends: publish        # then said
    for job in decision.jobs: start            # then done; its result comes back as an event

If the append fails the process ends: what the core already believes in memory was never said to anybody.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from coordinator.merging import MergePlan, MergeResult
from coordinator.records import Record
from shared.manifest import Manifest
from shared.messages import Message


@dataclass(frozen=True, slots=True)
class Instant:
    """Now, twice: `mono` (monotonic seconds) for decisions, `wall` (unix seconds) for people."""

    mono: float
    wall: float


# -- events ---


@dataclass(frozen=True, slots=True)
class LinkUp:
    """Connected to the broker; subscriptions stand."""


@dataclass(frozen=True, slots=True)
class LinkDown:
    """Connection lost."""


@dataclass(frozen=True, slots=True)
class Received:
    """A valid control message came in on the topic of `site`."""

    site: str
    message: Message


@dataclass(frozen=True, slots=True)
class SpoolOpened:
    """The spool of an update is open; `have` is what an earlier attempt left there, verified."""

    transfer_id: str
    have: bytes


@dataclass(frozen=True, slots=True)
class ChunksStored:
    """These chunks of an update are synced to disk."""

    transfer_id: str
    indices: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Verified:
    """A complete update passed admission; its file is in the store."""

    update_id: str
    norm: float


@dataclass(frozen=True, slots=True)
class Validated:
    """The loss of an update that passed admission is measured; it may be infinite, or no number."""

    update_id: str
    norm: float
    loss: float


@dataclass(frozen=True, slots=True)
class VerifyFailed:
    """A complete update broke a rule."""

    update_id: str
    rule: str
    detail: str


@dataclass(frozen=True, slots=True)
class Postponed:
    """An update cannot be taken now, for a reason of ours (rule and detail); its site keeps it."""

    update_id: str
    rule: str
    detail: str
    retry_s: float


@dataclass(frozen=True, slots=True)
class Merged:
    """The files of a new version are durable."""

    plan: MergePlan
    result: MergeResult


@dataclass(frozen=True, slots=True)
class Ruled:
    """A person has decided about an update in quarantine; one that is not there is left as it is."""

    update_id: str
    release: bool


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed; about four times a second."""


UploadEvent = SpoolOpened | ChunksStored | Verified | Validated | VerifyFailed | Postponed
Event = LinkUp | LinkDown | Received | UploadEvent | Merged | Ruled | Tick

# -- decisions ---


@dataclass(frozen=True, slots=True)
class Send:
    """Publish a control message: to one site, or (site None) the retained announcement."""

    site: str | None
    message: Message


@dataclass(frozen=True, slots=True)
class OpenSpool:
    """Open or resume the spool of an update and answer SpoolOpened."""

    manifest: Manifest


@dataclass(frozen=True, slots=True)
class CloseSpool:
    """Close the file of an upload that went quiet; what it holds stays on disk for the next attempt."""

    transfer_id: str


@dataclass(frozen=True, slots=True)
class Verify:
    """Move a complete spool into the store, check it, and answer Verified or VerifyFailed."""

    update_id: str


@dataclass(frozen=True, slots=True)
class Validate:
    """Measure the loss of a published state with a sound update added, and answer Validated."""

    update_id: str
    norm: float
    base: tuple[str, ...]
    """Transfers that make up the state."""


@dataclass(frozen=True, slots=True)
class Discard:
    """Delete a refused update's bytes."""

    update_id: str


@dataclass(frozen=True, slots=True)
class Merge:
    """Compute the next version and answer Merged."""

    plan: MergePlan


@dataclass(frozen=True, slots=True)
class Serve:
    """Send these chunks of a state: to one site, or (site None) to everybody."""

    transfer_id: str
    site: str | None
    indices: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Stop:
    """The run is complete and nobody is left to serve."""


Job = OpenSpool | CloseSpool | Verify | Validate | Discard | Merge | Serve | Stop


@dataclass(slots=True)
class Decision:
    """Records to make durable, then messages to send, then jobs to start."""

    records: list[Record] = field(default_factory=list)
    sends: list[Send] = field(default_factory=list)
    jobs: list[Job] = field(default_factory=list)

    def to(self, site: str, message: Message) -> None:
        """Add a message to one site."""
        self.sends.append(Send(site, message))
