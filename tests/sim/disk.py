# ruff: noqa: D102 - most methods here are those of pathlib.Path and of os, and mean the same
"""A machine's disk in memory, under the real `shared.store`, `shared.durable` and `edge_client.outbox`.

`Disk.path` stands for a `pathlib.Path`, `installed` puts this module's calls in the place of `os` in those modules.
What POSIX promises is kept and no more: the bytes of a file are safe after its fsync, a name after the fsync of its
folder. A power loss keeps any part of the rest: some writes and not others, the last one torn, some names and not
others. After a failed fsync the bytes in question are not safe and count as written, as on ext4, or are gone from
memory too, as on btrfs (Rebello et al., ATC 2020). `test_disk.py` compares all of this with the real thing.
"""

from __future__ import annotations

import errno
import fnmatch
import io
import itertools
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from shared import durable, store


class KilledError(BaseException):
    """The process ended here, without another step."""


@dataclass(eq=False, slots=True)
class Inode:
    """A file's bytes as processes see them, as they are on the platter, and the writes between the two."""

    data: bytearray = field(default_factory=bytearray)
    safe: bytearray = field(default_factory=bytearray)
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)
    """(offset, bytes), or (size, None) for a change of length."""

    def spoil(self, at: int) -> None:
        """One byte is another one, in memory and on the platter."""
        for held in (self.data, self.safe):
            if at < len(held):
                held[at] ^= 0x5A


def _apply(target: bytearray, offset: int, data: bytes | None) -> None:
    end = offset if data is None else offset + len(data)
    if len(target) < end:
        target.extend(bytes(end - len(target)))
    if data is None:
        del target[offset:]
    else:
        target[offset:end] = data


@dataclass(eq=False, slots=True)
class Folder:
    """The same for names; a pending (name, None) takes the name away."""

    names: dict[str, Inode] = field(default_factory=dict)
    safe: dict[str, Inode] = field(default_factory=dict)
    pending: list[list[tuple[str, Inode | None]]] = field(default_factory=list)
    """Each item is one change, seen whole or not at all."""
    changes: int = 0
    """How often `names` became others."""

    def change(self, *changes: tuple[str, Inode | None]) -> None:
        """Change names, now and some time later on the platter."""
        self.pending.append(list(changes))
        self.changes += 1
        _rename(self.names, list(changes))


def _rename(names: dict[str, Inode], changes: list[tuple[str, Inode | None]]) -> None:
    for name, inode in changes:
        if inode is None:
            names.pop(name, None)
        else:
            names[name] = inode


class Disk:
    """All folders of one machine; `step` is called before each change and may raise KilledError."""

    def __init__(self, rng: random.Random, step: Callable[[], None] = lambda: None) -> None:
        self.rng = rng
        self.step = step
        self.alive = True
        self.faults: Counter[str] = Counter()
        """What befell, how often."""
        self.full = False
        """No file can be made or grow."""
        self.sync_fails = 0.0
        """Chance of a sync to fail."""
        self.write_fails = 0.0
        """Chance of a write to fail, half of it done."""
        self.read_fails = 0.0
        self.forgets_on_error = False
        """Whether a failed sync takes the bytes out of memory as well."""
        self.folders: dict[str, Folder] = {"": Folder()}

    def path(self, name: str = "") -> Any:
        """A path of this disk, in the place of a pathlib.Path."""
        return SimPath(self, "", name)

    def change(self) -> None:
        """To be called before any change: the process may die here, or be dead already."""
        if not self.alive:
            raise KilledError
        self.step()

    def room(self) -> None:
        """Raise ENOSPC when there is none."""
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")

    def _fail(self, what: str) -> None:
        self.faults[f"{what} failed"] += 1
        raise OSError(errno.EIO, "Input/output error")

    def reads(self) -> None:
        """To be called before each read."""
        if self.read_fails and self.rng.random() < self.read_fails:
            self._fail("read")

    def write(self, inode: Inode, offset: int, data: bytes) -> None:
        """Write into memory; on the platter it is some time later."""
        broken = bool(self.write_fails) and self.rng.random() < self.write_fails
        written = data[: len(data) // 2] if broken else data
        inode.pending.append((offset, written))
        _apply(inode.data, offset, written)
        if broken:
            self._fail("write")

    def sync(self, what: Inode | Folder) -> None:
        """Make a file's bytes safe, or a folder's names."""
        self.change()
        if self.rng.random() < self.sync_fails:
            if isinstance(what, Inode):
                what.pending.clear()
                if self.forgets_on_error:
                    what.data = bytearray(what.safe)
            self._fail("sync")
        if isinstance(what, Inode):
            for offset, data in what.pending:
                _apply(what.safe, offset, data)
        else:
            what.safe = dict(what.names)
        what.pending.clear()

    def power_loss(self) -> None:
        """Keep what was synced, and of the rest what chance leaves."""
        self.faults["power lost"] += 1
        for folder in self.folders.values():
            for changes in self._some(folder.pending):
                _rename(folder.safe, changes)
            folder.names, folder.pending = dict(folder.safe), []
            folder.changes += 1
            for inode in folder.names.values():
                self._lose(inode)

    def _lose(self, inode: Inode) -> None:
        for offset, data in self._some(inode.pending):
            torn = data is not None and self.rng.random() < 0.2
            _apply(inode.safe, offset, data[: len(data) // 2] if data is not None and torn else data)
        inode.data, inode.pending = bytearray(inode.safe), []

    def _some(self, pending: list[Any]) -> list[Any]:
        share = self.rng.choice((0.0, 0.5, 1.0))
        return [each for each in pending if self.rng.random() < share]

    @property
    def bytes_used(self) -> int:
        """Bytes of all files."""
        return sum(len(inode.data) for folder in self.folders.values() for inode in folder.names.values())


class SimPath:
    """As much of pathlib.Path as the code under test uses."""

    __slots__ = ("above", "disk", "name", "where")

    def __init__(self, disk: Disk, above: str, name: str) -> None:
        self.disk = disk
        self.above = above
        self.name = name
        self.where = f"{above}/{name}" if above else name

    def __truediv__(self, name: str) -> SimPath:
        return SimPath(self.disk, self.where, name)

    def __str__(self) -> str:
        return self.where

    def __lt__(self, other: SimPath) -> bool:
        return self.where < other.where

    @property
    def parent(self) -> SimPath:
        above, _, name = self.above.rpartition("/")
        return SimPath(self.disk, above, name)

    @property
    def stem(self) -> str:
        return self.name.rpartition(".")[0]

    def with_suffix(self, suffix: str) -> SimPath:
        return self.parent / (self.stem + suffix)

    @property
    def folder(self) -> Folder:
        return self.disk.folders[self.above]

    def inode(self) -> Inode:
        try:
            return self.folder.names[self.name]
        except KeyError:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", self.where) from None

    def exists(self) -> bool:
        return self.name in self.folder.names or self.is_dir()

    def is_dir(self) -> bool:
        return self.where in self.disk.folders

    def mkdir(self, *, exist_ok: bool) -> None:
        # Made once per life of a machine, before anything is at stake: not lost in our power losses.
        self.disk.change()
        assert exist_ok
        self.disk.folders.setdefault(self.where, Folder())

    def iterdir(self) -> Iterator[SimPath]:
        return iter([self / name for name in self.disk.folders[self.where].names])

    def glob(self, pattern: str) -> Iterator[SimPath]:
        """Yield nothing where there is no such folder, as a real path does."""
        there = self.disk.folders.get(self.where, Folder()).names
        return iter([self / name for name in fnmatch.filter(there, pattern)])

    def unlink(self, *, missing_ok: bool = False) -> None:
        self.disk.change()
        if self.name in self.folder.names:
            self.folder.change((self.name, None))
        elif not missing_ok:
            self.inode()

    def rename(self, target: SimPath) -> None:
        self.disk.change()
        assert target.folder is self.folder, "nothing here moves between folders"
        self.folder.change((self.name, None), (target.name, self.inode()))

    replace = rename

    def read_bytes(self) -> bytes:
        self.disk.reads()
        return bytes(self.inode().data)

    def stat(self) -> SimpleNamespace:
        return SimpleNamespace(st_size=len(self.inode().data), st_nlink=1)

    def open(self, mode: str) -> io.BytesIO:
        assert mode == "rb"
        return io.BytesIO(self.inode().data)


class SimOs:
    """As much of `os` as the code under test uses; one for a whole world, whatever the machine."""

    O_RDONLY, O_RDWR, O_CREAT, O_EXCL, O_TRUNC = os.O_RDONLY, os.O_RDWR, os.O_CREAT, os.O_EXCL, os.O_TRUNC
    O_DIRECTORY, SEEK_END = os.O_DIRECTORY, os.SEEK_END

    def __init__(self) -> None:
        self._open: dict[int, tuple[Disk, Inode | Folder]] = {}
        self._next = itertools.count(3)

    def open(self, path: SimPath, flags: int, _mode: int = 0) -> int:
        disk, fd = path.disk, next(self._next)
        if flags & os.O_DIRECTORY:
            self._open[fd] = disk, disk.folders[path.where]
            return fd
        folder = path.folder
        inode = folder.names.get(path.name)
        if inode is None:
            if not flags & os.O_CREAT:
                path.inode()
            disk.change()
            disk.room()
            inode = Inode()
            folder.change((path.name, inode))
        elif flags & os.O_EXCL:
            raise FileExistsError(errno.EEXIST, "File exists", path.where)
        self._open[fd] = disk, inode
        if flags & os.O_TRUNC and inode.data:
            self.ftruncate(fd, 0)
        return fd

    def close(self, fd: int) -> None:
        del self._open[fd]

    def lseek(self, fd: int, offset: int, whence: int) -> int:
        assert (offset, whence) == (0, os.SEEK_END)
        return len(self._file(fd)[1].data)

    def _file(self, fd: int) -> tuple[Disk, Inode]:
        disk, inode = self._open[fd]
        assert isinstance(inode, Inode)
        return disk, inode

    def pread(self, fd: int, size: int, offset: int) -> bytes:
        disk, inode = self._file(fd)
        disk.reads()
        return bytes(inode.data[offset : offset + size])

    def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        disk, inode = self._file(fd)
        disk.change()
        if offset + len(data) > len(inode.data):
            disk.room()
        disk.write(inode, offset, bytes(data))
        return len(data)

    def ftruncate(self, fd: int, size: int) -> None:
        disk, inode = self._file(fd)
        if size == len(inode.data):
            return
        disk.change()
        inode.pending.append((size, None))
        _apply(inode.data, size, None)

    def posix_fallocate(self, fd: int, offset: int, size: int) -> None:
        disk, inode = self._file(fd)
        if offset + size > len(inode.data):
            disk.room()
            self.ftruncate(fd, offset + size)

    def fsync(self, fd: int) -> None:
        disk, what = self._open[fd]
        disk.sync(what)


@contextmanager
def installed(rng: random.Random) -> Iterator[None]:
    """Let `shared.store` and `shared.durable` work on these disks; temporary names come from `rng`."""
    stores: Any = store
    durables: Any = durable
    before = stores.os, durables.os, durables.secrets
    stores.os = durables.os = SimOs()
    durables.secrets = SimpleNamespace(token_hex=lambda size: f"{rng.getrandbits(8 * size):0{2 * size}x}")
    try:
        yield
    finally:
        stores.os, durables.os, durables.secrets = before
