"""Virtual time: one queue of what is to happen, in an order that depends on nothing but the seed."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from typing import Any


class Clock:
    """Seconds since the world began; things due at one moment happen in the order in which they were asked for."""

    def __init__(self) -> None:
        self.now = 0.0
        self._queue: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = itertools.count()

    def at(self, when: float, action: Callable[..., None], *args: Any) -> None:
        """Do something at a moment, or now if that has passed."""
        heapq.heappush(self._queue, (max(self.now, when), next(self._order), action, args))

    def later(self, seconds: float, action: Callable[..., None], *args: Any) -> None:
        """Do something after a while."""
        when = self.now + seconds if seconds > 0 else self.now
        heapq.heappush(self._queue, (when, next(self._order), action, args))

    def run(self, until: float, done: Callable[[], bool]) -> None:
        """Let time pass until a moment, or until `done`."""
        queue = self._queue
        while queue and queue[0][0] <= until and not done():
            self.now, _, action, args = heapq.heappop(queue)
            action(*args)
        if not done():
            self.now = until
