"""A record of what a crash would leave of one flat folder, at each step of an operation.

Before each call that changes the folder or syncs it, four images are taken. The names are those of now, or those at the
last sync of the folder; the bytes of a file are those of now, or those at its own last sync. Names and bytes of now are
what a killed process leaves; the other three are power losses, of disks that write names late, bytes late, or both.
What is not modelled: a file of which some unsynced blocks arrived and others did not, and names of one folder that
arrive in another order than they were given.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

Files = dict[str, bytes]


@dataclass(frozen=True)
class Image:
    """A folder after a crash, what had been promised by then, and the call that the crash came before."""

    files: tuple[tuple[str, bytes], ...]
    promise: str
    before: str

    def restore(self, folder: Path) -> Path:
        """Write the image to a folder."""
        folder.mkdir()
        for name, data in self.files:
            (folder / name).write_bytes(data)
        return folder


class ForgetfulDisk:
    """Watches one folder from when it is made; `promise` is set by the test whenever something becomes a promise."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.promise = ""
        self.images: dict[Image, None] = {}
        self._durable_names: dict[str, int] = {}
        self._durable_bytes: dict[int, bytes] = {}
        self._bytes: dict[int, bytes] = {}
        self._held: list[int] = []  # open descriptors, so that no inode number is given out twice
        self._look()
        self._durable_names = self._names()
        self._durable_bytes = dict(self._bytes)
        for owner, name in ((os, "pwrite"), (os, "ftruncate"), (os, "posix_fallocate"), (Path, "rename")):
            monkeypatch.setattr(owner, name, self._watched(name, getattr(owner, name)))
        for name in ("replace", "unlink"):
            monkeypatch.setattr(Path, name, self._watched(name, getattr(Path, name)))
        monkeypatch.setattr(os, "fsync", self._watched("fsync", self._fsync(os.fsync)))

    def close(self) -> None:
        """Take a last image, and let go of the files."""
        self._snapshot("the end")
        for fd in self._held:
            os.close(fd)

    def _watched(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            self._snapshot(name)
            return real(*args, **options)

        return call

    def _fsync(self, real: Callable[[int], None]) -> Callable[[int], None]:
        def fsync(fd: int) -> None:
            real(fd)
            inode = os.fstat(fd).st_ino
            if inode == self.root.stat().st_ino:
                self._durable_names = self._names()
            else:
                self._look()
                self._durable_bytes[inode] = self._bytes[inode]

        return fsync

    def _names(self) -> dict[str, int]:
        return {path.name: path.stat().st_ino for path in self.root.iterdir()}

    def _look(self) -> None:
        for path in self.root.iterdir():
            inode = path.stat().st_ino
            if inode not in self._bytes:
                self._held.append(os.open(path, os.O_RDONLY))
            self._bytes[inode] = path.read_bytes()

    def _snapshot(self, before: str) -> None:
        self._look()
        for names in (self._names(), self._durable_names):
            for content in (self._bytes, self._durable_bytes):
                files = tuple(sorted((name, content.get(inode, b"")) for name, inode in names.items()))
                self.images[Image(files, self.promise, before)] = None
