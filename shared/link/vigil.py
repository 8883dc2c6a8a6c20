"""Whether a connection still lives, as a pure function of what moves on it.

A peer can vanish without a word: a cable, a firewall that forgot, a machine that froze. TCP goes on trying for a
quarter of an hour, at ever longer intervals, and MQTT's keepalive notices after a minute. So a connection is looked at
ten times a second. Bytes that move are all the proof it needs, in either direction and however slowly. When none move
the broker is asked to answer (a ping), and when it does not the connection is given up. An answer proves that the
broker lives, not that it will ever acknowledge what it was sent; that is waited for longer, and not for ever either.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

LOOK_S = 0.1
"""How often to look."""
SILENCE_SHARE = 0.3
"""Share of `stall_s` after which a connection on which nothing moves is given up: 1.5 s with the default. What was lost
with it is then asked for on the next one, before anybody's `stall_s` is over."""
SILENCE_MIN_S = 1.0
"""A busy machine is silent for a moment now and then."""


class Verdict(Enum):
    """What to do now."""

    WAIT = auto()
    ASK = auto()
    """Send a ping."""
    MOVED = auto()
    """Bytes have left; whoever counts the time since a ping starts anew."""
    SILENT = auto()
    """Give up: nothing moves."""
    OWING = auto()
    """Give up: the broker lives and does not acknowledge."""


@dataclass(frozen=True, slots=True)
class Signs:
    """What has moved since the connection began; numbers only rise while it lives."""

    heard: int = 0
    """Bytes of messages that have come in."""
    answers: int = 0
    """Pings that were answered."""
    taken: int = 0
    """Bytes that the peer's machine has taken."""
    owed: bool = False
    """A message waits for its acknowledgement."""


@dataclass(slots=True)
class Vigil:
    """Over one connection after the other; `begin` starts each."""

    stall_s: float
    keepalive_s: float
    stalls: int = 0
    """Connections in a row that were given up before anything came in. Each doubles the patience, up to the keepalive,
    so that a link which is merely slow is not cut for ever."""
    _best: Signs = field(default_factory=Signs)
    _silent_s: float = 0.0
    _owing_s: float = 0.0
    _asked: bool = False

    def begin(self) -> None:
        """A connection stands."""
        self._best, self._silent_s, self._owing_s, self._asked = Signs(), 0.0, 0.0, False

    def look(self, signs: Signs, elapsed_s: float) -> Verdict:
        """Decide; `elapsed_s` since the last look.

        Of a long pause between two looks only a part counts: a process or a machine that slept knows nothing.
        """
        elapsed_s = min(elapsed_s, 2 * LOOK_S)
        best, heard, taken = self._best, signs.heard > self._best.heard, signs.taken > self._best.taken
        alive = heard or taken or signs.answers > best.answers
        self._best = Signs(max(signs.heard, best.heard), max(signs.answers, best.answers), max(signs.taken, best.taken))
        self._owing_s = 0.0 if heard or taken or not signs.owed else self._owing_s + elapsed_s
        self._silent_s = 0.0 if alive else self._silent_s + elapsed_s
        if heard:
            self.stalls = 0
        if alive:
            self._asked = False
        return self._verdict(taken)

    def _verdict(self, taken: bool) -> Verdict:  # noqa: FBT001 - private
        if self._silent_s >= self.silence_s:
            self.stalls += 1
            return Verdict.SILENT
        if self._owing_s >= self._patient(self.stall_s):
            self.stalls += 1
            return Verdict.OWING
        if self._silent_s >= self.silence_s / 2 and not self._asked:
            self._asked = True
            return Verdict.ASK
        return Verdict.MOVED if taken else Verdict.WAIT

    @property
    def silence_s(self) -> float:
        """How long nothing may move."""
        return self._patient(max(SILENCE_MIN_S, SILENCE_SHARE * self.stall_s))

    def _patient(self, first_s: float) -> float:
        return min(max(first_s, self.keepalive_s), first_s * 2.0 ** min(self.stalls, 32))
