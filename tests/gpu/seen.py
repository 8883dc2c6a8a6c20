"""What the tests measured, for the end of the run and for docs/performance.md."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

TOLD = pytest.StashKey[list[str]]()


@dataclass(frozen=True, slots=True)
class Seen:
    """What one test has measured."""

    test: str
    told: list[str]
    beyond: list[str] = field(default_factory=list)
    """What was more than is allowed: the test fails of it at its end, when all else is measured too."""

    def note(self, what: str) -> None:
        """Tell something that may be one way or the other."""
        self.told.append(f"{self.test}: {what}")

    def within(self, what: str, found: float, allowed: float) -> None:
        """Tell a difference, which fails the test when it is larger than what is allowed, or no number."""
        self.note(f"{what}: {found:.2e}, at most {allowed:g}")
        if not found <= allowed:
            self.beyond.append(f"{what}: {found:.3g} is more than {allowed:g}")
