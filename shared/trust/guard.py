"""What a link's two ends put between themselves and the wire: messages and chunks, open or sealed.

A guard is told the channel and the site of a message, never trusts what the broker says beyond that, and raises
RefusedError with a named rule for whatever may not pass. `OpenGuard` is a federation without trust; the sealed ones are
in sealed.py. Chunks are sealed and opened from the threads that read and write them, everything else on the loop.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from shared.errors import RefusedError
from shared.manifest import Manifest
from shared.messages import Chunk, Head, Message, Refused, chunk_header, decode, encode
from shared.topics import Channel


class TurnedAwayError(RefusedError):
    """An authentic hello of somebody who may not take part; `answer` tells that process why."""

    def __init__(self, why: RefusedError, session: str) -> None:
        super().__init__(why.message, rule=why.rule)
        self.answer = Refused(session=session, rule=why.rule, detail=why.message)


class StaleKeyError(RefusedError):
    """Sealed under a federation key that we do not have: say hello, and the coordinator hands it over."""


@dataclass(frozen=True, slots=True)
class Changes:
    """What became different when the kit's files were read again."""

    lost: tuple[tuple[str, RefusedError], ...] = ()
    """Members that may no longer speak, by name, and why."""
    rekeyed: bool = False
    """A new federation key is in force: announce again."""


class Guard(Protocol):
    """See the module's docstring; `now` is unix seconds throughout."""

    def seal(self, message: Message, channel: Channel, site: str | None, now: float) -> bytes:
        """Return a control message as it travels; RefusedError when its receiver is not, or no longer, a member."""

    def open(self, data: bytes, channel: Channel, site: str | None, now: float) -> Message:
        """Return a control message that may be believed to come from where its topic says.

        RefusedError otherwise, UnknownMessageError for a type of a newer release, RepeatedError for a second delivery,
        TurnedAwayError for a hello that deserves an answer, StaleKeyError when a hello of ours would help.
        """

    def seal_chunk(self, manifest: Manifest, index: int, frame: bytes) -> bytes:
        """Return the data packet of one frame."""

    def open_chunk(self, manifest: Manifest, chunk: Chunk) -> bytes | memoryview:
        """Return the frame of a chunk; RefusedError(rule='bad-seal') when it is not the one of this manifest."""

    def refresh(self, now: float) -> Changes:
        """Look whether memberships changed or ran out; cheap when nothing did, a few times a second at most."""

    def save(self) -> None:
        """Write down what a restart must not forget."""


class CoordinatorsGuard(Guard, Protocol):
    """What the coordinator's guard does besides."""

    def members(self) -> frozenset[str] | None:
        """Names on the roster, also of those who may not speak now; None without trust."""

    def sign_head(self, version: int, seq: int, head: str) -> tuple[Head, bytes] | None:
        """Return the signed head of the chain, and the membership under whose key; None without trust."""

    def attest(self, manifest: Manifest) -> bytes | None:
        """Return the membership under whose key an update was signed; None without trust.

        RefusedError with rule 'no-witness' or 'bad-witness' when it was not.
        """


class SitesGuard(Guard, Protocol):
    """What a site's guard does besides."""

    def check_head(self, head: Head) -> None:
        """RefusedError(rule='bad-head') unless the coordinator has signed it."""

    def witnessed(self, manifest: Manifest, head: Head | None) -> Manifest:
        """Return the manifest of an update, signed with the last head seen; unchanged without trust."""


class OpenGuard:
    """A federation without trust: nothing is signed, nothing is hidden, the broker's access list is all there is."""

    def seal(self, message: Message, channel: Channel, site: str | None, now: float) -> bytes:
        """Encode."""
        return encode(message)

    def open(self, data: bytes, channel: Channel, site: str | None, now: float) -> Message:
        """Decode."""
        return decode(data)

    def seal_chunk(self, manifest: Manifest, index: int, frame: bytes) -> bytes:
        """Put the header before the frame."""
        return chunk_header(manifest.transfer_id, index, len(frame)) + frame

    def open_chunk(self, manifest: Manifest, chunk: Chunk) -> memoryview:
        """The frame, as it came."""
        return chunk.frame

    def members(self) -> None:
        """Anybody may be one."""

    def sign_head(self, version: int, seq: int, head: str) -> None:
        """There is no key."""

    def check_head(self, head: Head) -> None:
        """Nobody signs one."""
        raise RefusedError("a signed head in a federation without trust", rule="bad-head")

    def witnessed(self, manifest: Manifest, head: Head | None) -> Manifest:
        """As it is."""
        return manifest

    def attest(self, manifest: Manifest) -> None:
        """Nobody signs; a signature that nobody can check is refused."""
        if manifest.witness is not None:
            raise RefusedError("a signed update in a federation without trust", rule="bad-witness")

    def refresh(self, now: float) -> Changes:
        """Nothing can change."""
        return Changes()

    def save(self) -> None:
        """Nothing is remembered."""
