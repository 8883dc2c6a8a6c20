"""Virtual time: a queue of things to do, each at its second, and the lines between the sites and their broker."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass

Action = Callable[[], None]
MBIT = 1e6 / 8
"""Bytes."""


class Clock:
    """Seconds from 0; of things due at one moment the one asked for first happens first."""

    def __init__(self) -> None:
        self.now = 0.0
        self._queue: list[tuple[float, int, Action]] = []
        self._asked = 0

    def at(self, when: float, action: Action) -> None:
        """Do something at that second, or now when it is past."""
        heapq.heappush(self._queue, (max(when, self.now), self._asked, action))
        self._asked += 1

    def later(self, seconds: float, action: Action) -> None:
        """Do something so many seconds from now."""
        self.at(self.now + seconds, action)

    def run(self, until: Callable[[], bool], limit_s: float) -> bool:
        """Do what is due until the condition holds; False when time or things to do ran out before it did."""
        while not until():
            if not self._queue or self._queue[0][0] > limit_s:
                return False
            self.now, _, action = heapq.heappop(self._queue)
            action()
        return True


@dataclass(slots=True)
class Way:
    """One direction of a line: packets leave one after the other."""

    bytes_per_s: float
    """Infinite: everything arrives at once."""
    count: int = 0
    """Bytes that arrived."""
    free_at: float = 0.0


class Line:
    """One site's connection through a broker that keeps nothing for who is away.

    What is under way when the connection breaks is lost: MQTT promises no more than to the next machine.
    """

    def __init__(self, clock: Clock, *, up: float, down: float) -> None:
        self._clock = clock
        self.up, self.down = Way(up), Way(down)
        self.connected = False
        self._life = 0

    @property
    def receiving(self) -> bool:
        """Whether a packet is coming in at this moment."""
        return self.connected and self.down.free_at > self._clock.now

    def connect(self) -> None:
        """From now on packets travel."""
        self.connected = True
        self._life += 1
        self.up.free_at = self.down.free_at = self._clock.now

    def break_off(self) -> None:
        """What is under way is lost."""
        self.connected = False
        self._life += 1
        self.up.free_at = self.down.free_at = self._clock.now

    def carry(self, way: Way, size: int, arrived: Action) -> None:
        """Send a packet of `size` bytes; `arrived` is called if it does. Nothing happens while there is no connection.

        It counts when it arrives.
        """
        if not self.connected:
            return
        life, way.free_at = self._life, max(way.free_at, self._clock.now) + size / way.bytes_per_s

        def arrive() -> None:
            if life == self._life:
                way.count += size
                arrived()

        self._clock.at(way.free_at, arrive)
