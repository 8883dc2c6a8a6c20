"""Memory that the benchmarks touch beforehand."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.peers.pages import Touched, available_bytes

BLOCK = 1 << 24


def _anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def test_blocks_are_held_until_they_are_let_go() -> None:
    """They are in memory from the beginning, and leave it one by one; less than none is none."""
    before = _anonymous_bytes()
    touched = Touched(8, BLOCK)
    held = []
    for blocks in (8, 2, 5, -1):
        touched.keep(blocks)
        held.append(round((_anonymous_bytes() - before) / BLOCK))
    assert held == [8, 2, 2, 0]


def test_more_than_there_is_is_not_taken() -> None:
    """An error says what to do, before the kernel ends somebody's process."""
    with pytest.raises(SystemExit, match=r"GB of memory are available: take fewer"):
        Touched(2, available_bytes())
    Touched(1000, 0).keep(0)
