"""Small disks: a file system in memory under a storage folder, that can be filled to the brim. For root alone."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

DISK_MIB = 96
FILLER = "filler"
_BITE = 1 << 20


def may_mount() -> bool:
    """Whether this user can mount, which it takes root to do."""
    return os.geteuid() == 0


@contextlib.contextmanager
def small_disks(folders: list[Path], mib: int = DISK_MIB) -> Iterator[None]:
    """While the block runs, each of these folders is a disk of its own; what they hold at the end is kept."""
    with contextlib.ExitStack() as mounted:
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            subprocess.run(["/bin/mount", "-t", "tmpfs", "-o", f"size={mib}m", "chaos", str(folder)], check=True)
            mounted.callback(_unmount, folder)
        yield


def _unmount(folder: Path) -> None:
    copy = folder.with_name(f".{folder.name}-copy")
    shutil.copytree(folder, copy, symlinks=True)
    subprocess.run(["/bin/umount", str(folder)], check=True)
    folder.rmdir()
    copy.rename(folder)


def fill(folder: Path) -> None:
    """Leave no byte free."""
    fd = os.open(folder / FILLER, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    bite = bytes(_BITE)
    try:
        while bite:
            try:
                os.write(fd, bite)
            except OSError:
                bite = bite[: len(bite) // 2]
    finally:
        os.close(fd)


def empty(folder: Path) -> None:
    """Give the space back."""
    (folder / FILLER).unlink(missing_ok=True)
