"""The one timer of a site: ask again when nothing has moved for a while."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Patience:
    """One timer: due after `stall_s` without progress, then ever later, up to `cap_s`, until something moves."""

    stall_s: float
    cap_s: float
    _due: float = 0.0
    _wait: float = 0.0

    def moved(self, now: float) -> None:
        """Something came: start over."""
        self._wait = self.stall_s
        self._due = now + self.stall_s

    def spent(self, now: float) -> bool:
        """Whether it is time to ask again; if so the next wait is twice as long."""
        if now < self._due:
            return False
        self._wait = min(self.cap_s, 2 * self._wait or self.stall_s)
        self._due = now + self._wait
        return True

    def wait(self, now: float, seconds: float) -> None:
        """Told to come back later."""
        self._due = now + seconds
