"""What a check of a folder finds, as people and scripts are told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is not as it must be, and what became or is to become of it."""

    kind: Literal["leftover", "damage"]
    rule: str
    """Name of what was broken, for scripts."""
    where: str
    """File below the storage folder, and the row, frame or field in it."""
    what: str
    repaired: bool
    advice: str
    """What to do; empty when it is repaired."""
