"""Token buckets: how often something may happen, with a burst at the beginning."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Bucket:
    """Tokens that refill at `rate` for each second up to `size`."""

    size: float
    rate: float
    level: float = field(init=False)
    at: float | None = None
    """Monotonic seconds of the last look."""

    def __post_init__(self) -> None:
        self.level = self.size

    def wait(self, amount: float, now: float) -> float:
        """Seconds until `amount` could be taken; what is more than the bucket holds counts as all of it."""
        self._refill(now)
        return max(0.0, (min(amount, self.size) - self.level) / self.rate)

    def take(self, amount: float, now: float) -> None:
        """Take it; what is more than there is leaves the bucket empty."""
        self._refill(now)
        self.level = max(0.0, self.level - amount)

    def _refill(self, now: float) -> None:
        if self.at is not None:
            self.level = min(self.size, self.level + self.rate * max(0.0, now - self.at))
        self.at = now
