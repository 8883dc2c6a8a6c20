"""Memory that was touched before a run needs it.

A virtual machine gets memory from its host when it is first touched, and gives it back some time after it was freed. On
the machine of these measurements, writing to fresh memory goes at 0.2 to 0.4 GB/s, ten times more slowly than to memory
that was in use a moment ago, so that whoever keeps what arrives pays for the host and not for keeping. Here each round
finds as much free memory that was touched as it may want to keep.
"""

from __future__ import annotations

import mmap
from pathlib import Path

SHARE = 0.6
"""Of the memory that is available, the most that is taken."""


_TOUCHED = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE


class Touched:
    """Blocks of memory that the host has given, until they are let go."""

    def __init__(self, blocks: int, block_bytes: int) -> None:
        wanted, there = blocks * block_bytes, available_bytes()
        if wanted > SHARE * there:
            raise SystemExit(
                f"a run may keep {wanted / 1e9:.1f} GB, and {there / 1e9:.1f} GB of memory are available: take fewer "
                "parameters, sites or rounds, or --untouched"
            )
        self._blocks = [mmap.mmap(-1, block_bytes, flags=_TOUCHED) for _ in range(blocks if block_bytes else 0)]

    def keep(self, blocks: int) -> None:
        """Let go of all blocks but so many."""
        while len(self._blocks) > max(0, blocks):
            self._blocks.pop().close()


def available_bytes() -> int:
    """Memory that the kernel could hand out now."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
