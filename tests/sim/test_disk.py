"""The disk in memory against the real one, call by call; and what only a false one can show: what a crash leaves."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.sim.disk import Disk, KilledError, SimOs


def _real(tmp_path: Path) -> tuple[Any, Any]:
    return os, tmp_path / "root"


def _false(_tmp_path: Path) -> tuple[Any, Any]:
    return SimOs(), Disk(random.Random(1)).path("root")


@pytest.fixture(params=[_real, _false], ids=["real", "false"])
def system(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Any]:
    """The calls, and a folder that is there."""
    make: Callable[[Path], tuple[Any, Any]] = request.param
    calls, root = make(tmp_path)
    root.mkdir(exist_ok=True)
    return calls, root


def _create(calls: Any, path: Any, data: bytes) -> None:
    fd = calls.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    assert calls.pwrite(fd, data, 0) == len(data)
    calls.fsync(fd)
    calls.close(fd)


def _names(root: Any) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_bytes_are_read_as_they_were_written(system: tuple[Any, Any]) -> None:
    """Holes are zero, reading ends at the end, a longer file is zero, a shorter one is cut."""
    calls, root = system
    path = root / "a.frames"
    fd = calls.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    calls.pwrite(fd, b"xyz", 4)
    assert (calls.pread(fd, 99, 0), calls.pread(fd, 2, 5), calls.pread(fd, 2, 7)) == (b"\0\0\0\0xyz", b"yz", b"")
    calls.posix_fallocate(fd, 0, 9)
    calls.posix_fallocate(fd, 0, 3)
    assert path.stat().st_size == 9
    calls.ftruncate(fd, 5)
    calls.close(fd)
    assert path.read_bytes() == b"\0\0\0\0x"
    with path.open("rb") as file:
        assert file.read() == path.read_bytes()
    calls.close(calls.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600))
    assert path.read_bytes() == b""


def test_names_come_and_go(system: tuple[Any, Any]) -> None:
    """Renaming replaces, an open file outlives its name, patterns and suffixes mean what they mean."""
    calls, root = system
    for name in ("b.frames", "a.manifest", "a.part.manifest", ".tmp-1"):
        _create(calls, root / name, name.encode())
    assert sorted(path.name for path in root.glob("*.manifest")) == ["a.manifest", "a.part.manifest"]
    assert sorted(path.name for path in root.glob(".tmp-*")) == [".tmp-1"]
    assert sorted(path.name for path in root.glob("[a-b].*s")) == ["b.frames"]
    (root / ".tmp-1").replace(root / "a.manifest")
    (root / "a.part.manifest").rename(root / "c.manifest")
    assert (root / "a.manifest").read_bytes() == b".tmp-1"
    fd = calls.open(root / "b.frames", os.O_RDONLY)
    (root / "b.frames").unlink()
    (root / "b.frames").unlink(missing_ok=True)
    assert calls.pread(fd, 9, 0) == b"b.frames"
    calls.close(fd)
    assert _names(root) == ["a.manifest", "c.manifest"]
    assert (root / "x.frames").with_suffix(".part.manifest").name == "x.part.manifest"
    assert ((root / "x.frames").stem, (root / "x.frames").parent.name) == ("x", "root")
    assert (root.exists(), root.is_dir(), (root / "a.manifest").is_dir()) == (True, True, False)
    assert [path.name for path in sorted([root / "b", root / "a"])] == ["a", "b"]


def test_what_is_not_there_is_an_error(system: tuple[Any, Any]) -> None:
    """The same errors, and a name that is taken is taken."""
    calls, root = system
    missing, taken = root / "missing", root / "taken"
    _create(calls, taken, b"")
    for act in (missing.unlink, missing.read_bytes, missing.stat, lambda: calls.open(missing, os.O_RDWR)):
        with pytest.raises(FileNotFoundError):
            act()
    with pytest.raises(FileExistsError):
        _create(calls, taken, b"")


def _disk(seed: int) -> tuple[Disk, SimOs, Any]:
    disk = Disk(random.Random(seed))
    root = disk.path("root")
    root.mkdir(exist_ok=True)
    return disk, SimOs(), root


def _sync_folder(calls: SimOs, root: Any) -> None:
    calls.fsync(calls.open(root, os.O_RDONLY | os.O_DIRECTORY))


def test_a_power_loss_keeps_what_was_synced_and_any_part_of_the_rest() -> None:
    """Synced bytes under a synced name are always there; the others sometimes, and sometimes torn."""
    left: set[bytes | None] = set()
    for seed in range(60):
        disk, calls, root = _disk(seed)
        _create(calls, root / "safe", b"safe")
        _sync_folder(calls, root)
        fd = calls.open(root / "safe", os.O_RDWR)
        calls.pwrite(fd, b"more", 4)
        _create(calls, root / "nameless", b"data")
        disk.power_loss()
        assert (root / "safe").read_bytes()[:4] == b"safe"
        left.add((root / "safe").read_bytes())
        left.add((root / "nameless").read_bytes() if (root / "nameless").exists() else None)
    assert left == {b"safe", b"safemo", b"safemore", None, b"data"}


@pytest.mark.parametrize("forgets", [True, False])
def test_after_a_failed_sync_a_second_one_saves_nothing(forgets: bool) -> None:
    """The bytes are gone at once, or with the power: the second sync reports success either way."""
    disk, calls, root = _disk(1)
    disk.forgets_on_error = forgets
    fd = calls.open(root / "a", os.O_RDWR | os.O_CREAT)
    _sync_folder(calls, root)
    calls.pwrite(fd, b"lost", 0)
    disk.sync_fails = 1.0
    with pytest.raises(OSError, match="Input/output") as failed:
        calls.fsync(fd)
    assert failed.value.errno == errno.EIO
    disk.sync_fails = 0.0
    calls.fsync(fd)
    assert (root / "a").read_bytes() == (b"" if forgets else b"lost")
    disk.power_loss()
    assert (root / "a").read_bytes() == b""


def test_a_full_disk_takes_nothing_new_and_keeps_what_it_has() -> None:
    """Space that was reserved can be written."""
    disk, calls, root = _disk(1)
    fd = calls.open(root / "a", os.O_RDWR | os.O_CREAT)
    calls.posix_fallocate(fd, 0, 8)
    disk.full = True
    calls.pwrite(fd, b"reserved", 0)
    for act in (
        lambda: calls.pwrite(fd, b"more", 8),
        lambda: calls.posix_fallocate(fd, 0, 9),
        lambda: calls.open(root / "b", os.O_RDWR | os.O_CREAT),
    ):
        with pytest.raises(OSError, match="No space") as full:
            act()
        assert full.value.errno == errno.ENOSPC
    assert (root / "a").read_bytes() == b"reserved"


def test_a_dead_process_changes_nothing() -> None:
    """Not even while its blocks are being left."""
    disk, calls, root = _disk(1)
    _create(calls, root / "a", b"a")
    disk.alive = False
    for act in ((root / "a").unlink, lambda: (root / "a").rename(root / "b"), lambda: _create(calls, root / "c", b"")):
        with pytest.raises(KilledError):
            act()
    assert _names(root) == ["a"]
