"""What a process that runs for long asks of its memory: to hand out again what it has, and not to look at it in vain.

Each update that is verified takes a few blocks of half a megabyte and gives them back. glibc returns them to the system
as soon as a megabyte or two lie free, and the next update gets fresh pages, which the kernel has to clear and map one
by one: 380 for each megabyte that arrived, a seventh of the coordinator's processor time.
"""

from __future__ import annotations

import ctypes
import gc
import platform

KEPT_BYTES = 16 * 1024 * 1024
"""What may lie free at the end of a thread's heap before any of it is given back."""
MAPPED_BYTES = 4 * 1024 * 1024
"""Blocks from this size on are mapped and returned each for itself: large tensors, of which a thread would keep some.
Those of half a megabyte are far below it; glibc would adapt it to whatever is freed, up to 32 MiB."""

YOUNG_OBJECTS = 10_000
"""Made since the last collection before the next one; after Python's 700 a crowd of sites causes a hundred a second."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""malloc.h of glibc."""


def settle_in() -> None:
    """Call when all is imported and before any thread starts; other allocators than glibc's are left as they are."""
    gc.freeze()  # modules stay: no collection need look at all of them again
    gc.set_threshold(YOUNG_OBJECTS, *gc.get_threshold()[1:])
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)
        libc.mallopt(_M_MMAP_THRESHOLD, MAPPED_BYTES)
