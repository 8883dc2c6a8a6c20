"""Room on the disk: whether more may be taken, told before the disk is full and not after.

Two bounds: bytes that stay free on the file system whatever happens (other programs, and our own small files, need
them), and bytes that one folder may hold. Whoever finds no room waits and asks again; nothing is thrown away.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from shared.durable import SPARE_PREFIX

MIB = 1 << 20
POLL_S = 2.0
"""How often a full disk is looked at again."""


@dataclass(frozen=True, slots=True)
class Room:
    """The bounds of `folder`: bytes to leave free on its file system, bytes that it may hold (0: any number)."""

    folder: Path
    keep_free: int
    limit: int = 0

    def lacking(self, needed: int, *, kept: int | None = None) -> str | None:
        """Say why `needed` more bytes may not be taken now, of which `kept` (all) stay in the folder; None: they may.

        The sentence names sizes and no path, because it also goes to the other end.
        """
        free = free_bytes(self.folder)
        if free - needed < self.keep_free:
            return f"{_mib(free)} free on the disk; {_mib(needed)} are needed, and {_mib(self.keep_free)} stay free"
        if self.limit:
            held = _held(self.folder.iterdir())
            wanted = needed if kept is None else kept
            if held + wanted > self.limit:
                return f"{_mib(held)} of {_mib(self.limit)} are taken, and {_mib(wanted)} are needed"
        return None


def free_bytes(folder: Path) -> int:
    """Bytes that this user may still take on the file system of `folder`."""
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def _held(paths: Iterable[Path]) -> int:
    total = 0
    for path in paths:
        if path.name.startswith(SPARE_PREFIX):
            continue  # the next file's place
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue  # renamed or removed a moment ago
    return total


def _mib(size: int) -> str:
    return f"{size / MIB:,.1f} MiB"
