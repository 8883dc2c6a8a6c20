"""Memory that was touched before a run needs it.

A virtual machine gets memory from its host when it is first touched, and gives it back some time after it was freed. On
the machine of these measurements, writing to fresh memory goes at 0.2 to 0.4 GB/s, ten times more slowly than to memory
that was in use a moment ago, so that whoever keeps what arrives pays for the host and not for keeping. Here each round
finds as much free memory that was touched as it may want to keep.
"""

from __future__ import annotations

import mmap
import resource


class Touched:
    """Blocks of memory that the host has given; one is let go at a time."""

    def __init__(self, blocks: int, block_bytes: int) -> None:
        self._blocks = [_touched(block_bytes) for _ in range(blocks if block_bytes else 0)]

    def keep(self, blocks: int) -> None:
        """Let go of all blocks but so many."""
        while len(self._blocks) > max(0, blocks):
            self._blocks.pop().close()


def _touched(size: int) -> mmap.mmap:
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)
    for at in range(0, size, resource.getpagesize()):
        block[at] = 1
    return block
