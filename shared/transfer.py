"""Sender and receiver of one transfer: no clock, no files, no asyncio.

Theory of operation
-------------------
The conversation of one transfer, whichever way it runs:

    sender    offers           a site sends Offer; the coordinator's Announce is an offer to everybody
    receiver  wants            Want(have, window): what I hold durably, how many chunks may be in flight
    sender    sends            chunks within the window, lowest missing index first
    receiver  wants again      after each batch of chunks that it has synced to disk
    ...                        until `have` is full; an update then ends with a Receipt

Everything may be lost, doubled or late. Three rules make that harmless:

* The bitmap is the only truth. A chunk counts as delivered when a Want says so, never because the broker said so.
* Chunks of one sender keep their order on their way (one connection, one topic). So when a Want acknowledges a chunk,
  every chunk sent earlier and still missing is lost, and may be sent again at once.
* Nothing else is guessed. When nothing moves any more, the side that owns the timers (the site) starts over: it offers
  again, or wants with `restart`; whatever was in flight is then forgotten, and the next bitmap says what to resend.
  That bounds the waste of any fault by one window.

The tables below are the whole protocol: a (state, input) pair that is absent cannot happen, and raises KeyError.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from enum import Enum, auto
from itertools import islice, takewhile


class Bitmap:
    """A set of chunk indices 0..n-1; on the wire one bit each, lowest index in the lowest bit of the first byte."""

    __slots__ = ("_bits", "_count", "_first_missing", "size")

    def __init__(self, size: int, present: Iterable[int] = ()) -> None:
        self.size = size
        self._bits = bytearray(-(-size // 8))
        self._count = 0
        self._first_missing = 0
        for index in present:
            self.add(index)

    @classmethod
    def from_bytes(cls, size: int, data: bytes) -> Bitmap:
        """Read the wire's form; missing bytes and bits beyond `size` count as absent."""
        read = cls(size)
        present = int.from_bytes(data, "little") & (1 << size) - 1
        read._bits[:] = present.to_bytes(len(read._bits), "little")
        read._count = present.bit_count()
        return read

    def to_bytes(self) -> bytes:
        """Return the wire's form, ceil(size / 8) bytes."""
        return bytes(self._bits)

    def add(self, index: int) -> bool:
        """Add one index; False when it was there."""
        assert 0 <= index < self.size
        if index in self:
            return False
        self._bits[index >> 3] |= 1 << (index & 7)
        self._count += 1
        return True

    def __contains__(self, index: int) -> bool:
        return bool(self._bits[index >> 3] >> (index & 7) & 1)

    def __len__(self) -> int:
        return self._count

    @property
    def full(self) -> bool:
        """Whether nothing is missing."""
        return self._count == self.size

    def missing(self) -> Iterator[int]:
        """Yield absent indices, ascending; amortised over a transfer this does not rescan the full head."""
        while self._first_missing < self.size and self._first_missing in self:
            self._first_missing += 1
        return (i for i in range(self._first_missing, self.size) if i not in self)


# -- sender ---


class SenderState(Enum):
    """Where a sender stands."""

    OFFERING = auto()
    """Offered (or about to); no answer yet."""
    PACED = auto()
    """Told to wait."""
    SENDING = auto()
    """Has a window; also while the last chunks await their acknowledgement."""
    SETTLED = auto()
    """A receipt ended it."""


class SenderInput(Enum):
    """What can happen to a sender."""

    WANT = auto()
    """A Want with a window above 0."""
    PACE = auto()
    """A Want with window 0."""
    RECEIPT = auto()
    RESTART = auto()
    """Link lost, or nothing moved for too long: forget what is in flight and offer again."""


SENDER_TABLE: dict[tuple[SenderState, SenderInput], SenderState] = {
    (SenderState.OFFERING, SenderInput.WANT): SenderState.SENDING,
    (SenderState.OFFERING, SenderInput.PACE): SenderState.PACED,
    (SenderState.OFFERING, SenderInput.RECEIPT): SenderState.SETTLED,
    (SenderState.OFFERING, SenderInput.RESTART): SenderState.OFFERING,
    (SenderState.PACED, SenderInput.WANT): SenderState.SENDING,
    (SenderState.PACED, SenderInput.PACE): SenderState.PACED,
    (SenderState.PACED, SenderInput.RECEIPT): SenderState.SETTLED,
    (SenderState.PACED, SenderInput.RESTART): SenderState.OFFERING,
    (SenderState.SENDING, SenderInput.WANT): SenderState.SENDING,
    (SenderState.SENDING, SenderInput.PACE): SenderState.PACED,
    (SenderState.SENDING, SenderInput.RECEIPT): SenderState.SETTLED,
    (SenderState.SENDING, SenderInput.RESTART): SenderState.OFFERING,
    # Late messages about a finished transfer change nothing.
    (SenderState.SETTLED, SenderInput.WANT): SenderState.SETTLED,
    (SenderState.SETTLED, SenderInput.PACE): SenderState.SETTLED,
    (SenderState.SETTLED, SenderInput.RECEIPT): SenderState.SETTLED,
    (SenderState.SETTLED, SenderInput.RESTART): SenderState.SETTLED,
}


class Sender:
    """Decides which chunks of one transfer may go out now."""

    __slots__ = ("_in_flight", "_in_flight_set", "_window", "have", "state")

    def __init__(self, frames: int) -> None:
        self.state = SenderState.OFFERING
        self.have = Bitmap(frames)
        self._window = 0
        self._in_flight: deque[int] = deque()
        self._in_flight_set: set[int] = set()

    def _step(self, happened: SenderInput) -> None:
        self.state = SENDER_TABLE[self.state, happened]

    def on_want(self, have: bytes, window: int) -> bool:
        """Take the receiver's word; True when it holds a chunk that the previous Want lacked."""
        self._step(SenderInput.WANT if window else SenderInput.PACE)
        if self.state is SenderState.SETTLED:
            return False
        self._window = window
        before = len(self.have)
        latest = Bitmap.from_bytes(self.have.size, have)
        # A receiver that lost its disk holds less than before: the latest bitmap counts, not the union.
        self.have = latest
        self._forget_acknowledged()
        return len(latest) > before

    def _forget_acknowledged(self) -> None:
        last = max((place for place, index in enumerate(self._in_flight) if index in self.have), default=-1)
        # Order is kept on the way: what was sent before an acknowledged chunk is either acknowledged or lost.
        for _ in range(last + 1):
            self._in_flight_set.discard(self._in_flight.popleft())

    def take(self, *, below: int | None = None) -> list[int]:
        """Return the chunks to send now (of those with an index `below` it), lowest first, and count them in flight."""
        chosen = list(islice(self._unsent(self.have.size if below is None else below), self.room))
        self._in_flight.extend(chosen)
        self._in_flight_set.update(chosen)
        return chosen

    def _unsent(self, below: int) -> Iterator[int]:
        missing = takewhile(lambda index: index < below, self.have.missing())
        return (index for index in missing if index not in self._in_flight_set)

    def restart(self) -> None:
        """Forget what is in flight; the owner offers again (or the receiver has wanted with `restart`)."""
        self._step(SenderInput.RESTART)
        self._in_flight.clear()
        self._in_flight_set.clear()

    def settle(self) -> None:
        """A receipt ended this transfer."""
        self._step(SenderInput.RECEIPT)
        self._in_flight.clear()
        self._in_flight_set.clear()

    @property
    def in_flight(self) -> int:
        """Chunks sent and not yet acknowledged by a Want."""
        return len(self._in_flight)

    @property
    def window(self) -> int:
        """The most that may be in flight, as the receiver last said."""
        return self._window

    @property
    def room(self) -> int:
        """Chunks that the window admits now."""
        return max(0, self._window - len(self._in_flight)) if self.state is SenderState.SENDING else 0

    @property
    def unsent(self) -> int:
        """Chunks that the receiver lacks and that are not in flight."""
        return self.have.size - len(self.have) - len(self._in_flight)

    @property
    def next_index(self) -> int | None:
        """The lowest of them."""
        return next(self._unsent(self.have.size), None)


# -- receiver ---


class ReceiverState(Enum):
    """Where a receiver stands."""

    OPENING = auto()
    """The spool is being opened; what an earlier attempt left there is being checked."""
    PACED = auto()
    """Open, but without credit."""
    RECEIVING = auto()
    COMPLETE = auto()
    """All chunks are durable; the whole is being verified."""
    CLOSED = auto()
    """Verified, refused or given up."""


class ReceiverInput(Enum):
    """What can happen to a receiver."""

    OPENED = auto()
    CREDIT = auto()
    NO_CREDIT = auto()
    STORED = auto()
    FILLED = auto()
    """The last missing chunk is durable."""
    CLOSE = auto()


RECEIVER_TABLE: dict[tuple[ReceiverState, ReceiverInput], ReceiverState] = {
    (ReceiverState.OPENING, ReceiverInput.OPENED): ReceiverState.PACED,
    (ReceiverState.OPENING, ReceiverInput.CLOSE): ReceiverState.CLOSED,
    (ReceiverState.PACED, ReceiverInput.CREDIT): ReceiverState.RECEIVING,
    (ReceiverState.PACED, ReceiverInput.NO_CREDIT): ReceiverState.PACED,
    (ReceiverState.PACED, ReceiverInput.STORED): ReceiverState.PACED,  # written before the credit was withdrawn
    (ReceiverState.PACED, ReceiverInput.FILLED): ReceiverState.COMPLETE,
    (ReceiverState.PACED, ReceiverInput.CLOSE): ReceiverState.CLOSED,
    (ReceiverState.RECEIVING, ReceiverInput.CREDIT): ReceiverState.RECEIVING,
    (ReceiverState.RECEIVING, ReceiverInput.NO_CREDIT): ReceiverState.PACED,
    (ReceiverState.RECEIVING, ReceiverInput.STORED): ReceiverState.RECEIVING,
    (ReceiverState.RECEIVING, ReceiverInput.FILLED): ReceiverState.COMPLETE,
    (ReceiverState.RECEIVING, ReceiverInput.CLOSE): ReceiverState.CLOSED,
    (ReceiverState.COMPLETE, ReceiverInput.STORED): ReceiverState.COMPLETE,  # a doubled chunk
    (ReceiverState.COMPLETE, ReceiverInput.CLOSE): ReceiverState.CLOSED,
}


class Receiver:
    """Keeps the bitmap of one transfer and knows when it is complete."""

    __slots__ = ("have", "state")

    def __init__(self, frames: int) -> None:
        self.state = ReceiverState.OPENING
        self.have = Bitmap(frames)

    def _step(self, happened: ReceiverInput) -> None:
        self.state = RECEIVER_TABLE[self.state, happened]

    def opened(self, have: bytes) -> None:
        """The spool is open and holds these verified chunks."""
        self.have = Bitmap.from_bytes(self.have.size, have)
        self._step(ReceiverInput.OPENED)
        if self.have.full:
            self._step(ReceiverInput.FILLED)

    def credit(self, *, granted: bool) -> None:
        """Chunks may, or may no longer, be in flight to us."""
        self._step(ReceiverInput.CREDIT if granted else ReceiverInput.NO_CREDIT)

    def stored(self, indices: Iterable[int]) -> int:
        """These chunks are synced to disk; returns how many of them are new."""
        fresh = sum(self.have.add(index) for index in indices)
        filled = self.have.full and self.state is not ReceiverState.COMPLETE
        self._step(ReceiverInput.FILLED if filled else ReceiverInput.STORED)
        return fresh

    def close(self) -> None:
        """Verified, refused or given up: nothing more is taken."""
        self._step(ReceiverInput.CLOSE)

    @property
    def complete(self) -> bool:
        """Whether all chunks are durable and the whole is being verified."""
        return self.state is ReceiverState.COMPLETE

    @property
    def open(self) -> bool:
        """Whether a chunk that arrives now should be written."""
        return self.state is ReceiverState.PACED or self.state is ReceiverState.RECEIVING
