"""Whether a connection still lives, as a pure function of what moves on it.

A peer can vanish without a word: a cable, a firewall that forgot, a machine that froze. TCP goes on trying for a
quarter of an hour, at ever longer intervals, and MQTT's keepalive notices after a minute. So a connection is looked at
ten times a second. Bytes that move are all the proof it needs, in either direction and however slowly. When none move
the broker is asked to answer (a ping), and when it does not the connection is given up. An answer proves that the
broker lives, not that it will ever acknowledge what it was sent; that is waited for longer, and not for ever either.

Before a slow line may stand something that takes whatever it is sent (a proxy, a tunnel): then nothing moves until a
message has come through, however long that takes, and a ping waits behind it. Nobody can tell this from a dead line at
once, so the patience doubles until it is enough. It stays so while only short messages are acknowledged at once, as
TCP keeps a doubled timeout until it has measured a new round trip (Karn and Partridge, SIGCOMM 1987).
"""

from __future__ import annotations

from collections import deque
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
    """Bytes have left or were acknowledged; whoever counts the time since a ping starts anew."""
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
    acked: int = 0
    """Bytes up to the end of the last message that was acknowledged; counted as `taken` is."""
    owed: int = 0
    """Bytes from there to the end of the oldest message that waits for its acknowledgement, else 0; rises and falls."""


@dataclass(slots=True)
class Vigil:
    """Over one connection after the other; `begin` starts each."""

    stall_s: float
    keepalive_s: float
    stalls: int = 0
    """Connections given up since the link last showed that it carries what they owed. Each doubles the patience, up to
    the keepalive, so that a link which is merely slow is not cut for ever."""
    _choked: int = 0
    """The most that one of them owed."""
    _taken: deque[tuple[float, int]] = field(default_factory=deque)
    """When, and `taken` then: the first is one undoubled patience old, unless the connection is younger."""
    _age_s: float = 0.0
    _best: Signs = field(default_factory=Signs)
    _silent_s: float = 0.0
    _owing_s: float = 0.0
    _asked: bool = False

    def begin(self) -> None:
        """A connection stands."""
        self._best, self._silent_s, self._owing_s, self._asked = Signs(), 0.0, 0.0, False
        self._age_s, self._taken = 0.0, deque([(0.0, 0)])

    def look(self, signs: Signs, elapsed_s: float) -> Verdict:
        """Decide; `elapsed_s` since the last look.

        Of a long pause between two looks only a part counts: a process or a machine that slept knows nothing.
        """
        self._age_s += elapsed_s
        elapsed_s, best = min(elapsed_s, 2 * LOOK_S), self._best
        heard, taken, acked = signs.heard > best.heard, signs.taken > best.taken, signs.acked > best.acked
        alive = heard or taken or signs.answers > best.answers
        self._owing_s = 0.0 if heard or taken or not signs.owed else self._owing_s + elapsed_s
        self._silent_s = 0.0 if alive else self._silent_s + elapsed_s
        at_once = self._at_once(signs.acked)
        if heard and 2 * at_once >= self._choked:
            self.stalls = self._choked = 0
        if alive:
            self._asked = False
        self._best = Signs(
            heard=max(signs.heard, best.heard),
            answers=max(signs.answers, best.answers),
            taken=max(signs.taken, best.taken),
            acked=max(signs.acked, best.acked),
        )
        self._taken.append((self._age_s, self._best.taken))
        return self._verdict(signs.owed, moved=taken or acked)

    def _at_once(self, acked: int) -> int:
        """Bytes acknowledged since the last look, unless taken so long ago that an undoubled patience is too short."""
        while len(self._taken) > 1 and self._taken[1][0] <= self._age_s - self._first_s:
            self._taken.popleft()
        return acked - self._best.acked if acked > self._taken[0][1] else 0

    def _verdict(self, owed: int, *, moved: bool) -> Verdict:
        if self._silent_s >= self.silence_s:
            return self._given_up(Verdict.SILENT, owed)
        if self._owing_s >= self._patient(self.stall_s):
            return self._given_up(Verdict.OWING, owed)
        if self._silent_s >= self.silence_s / 2 and not self._asked:
            self._asked = True
            return Verdict.ASK
        return Verdict.MOVED if moved else Verdict.WAIT

    def _given_up(self, verdict: Verdict, owed: int) -> Verdict:
        self.stalls, self._choked = self.stalls + 1, max(self._choked, owed)
        return verdict

    @property
    def silence_s(self) -> float:
        """How long nothing may move."""
        return self._patient(self._first_s)

    @property
    def _first_s(self) -> float:
        return max(SILENCE_MIN_S, SILENCE_SHARE * self.stall_s)

    def _patient(self, first_s: float) -> float:
        return min(max(first_s, self.keepalive_s), first_s * 2.0 ** min(self.stalls, 32))
