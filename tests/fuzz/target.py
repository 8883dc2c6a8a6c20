"""What a fuzz target is: sound samples, the mutation that fits them, and what is called with the result."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Mutation = Callable[[bytes, random.Random], bytes]


@dataclass(frozen=True, slots=True)
class Target:
    """One decoder."""

    name: str
    samples: Sequence[bytes]
    mutate: Mutation
    run: Callable[[bytes], object]
    share: int = 10
    """Executions of a hundred that it gets, roughly."""
