from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shared import durable
from shared.errors import CorruptError, NoRoomError, RefusedError, UnavailableError


@pytest.fixture
def syncs(monkeypatch: pytest.MonkeyPatch) -> durable.SyncCount:
    """A counter of this test's own syncs."""
    count = durable.SyncCount()
    monkeypatch.setattr(durable, "SYNCS", count)
    return count


def full_disk(*_: object) -> int:
    """What the kernel says on a full disk."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def names(folder: Path) -> list[str]:
    """What is in a folder."""
    return sorted(path.name for path in folder.iterdir())


def test_write_once_writes_the_chunks(tmp_path: Path, syncs: durable.SyncCount) -> None:
    """A file holds the chunks in order and nothing else appears; it costs a sync of the file and one of the folder."""
    durable.write_once(tmp_path / "a", [b"one ", memoryview(b"two "), b"", b"three"])
    assert (tmp_path / "a").read_bytes() == b"one two three"
    assert names(tmp_path) == ["a"]
    assert (syncs.files, syncs.folders) == (1, 1)


def test_files_are_private(tmp_path: Path) -> None:
    """Only the owner may read what is written."""
    durable.write_once(tmp_path / "a", [b"x"])
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o600


def test_write_once_syncs_the_file_before_its_name_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the file is synced its name is not there yet; when the folder is synced it is."""
    seen: list[list[str]] = []
    real = os.fsync

    def record(fd: int) -> None:
        seen.append(names(tmp_path))
        real(fd)

    monkeypatch.setattr(os, "fsync", record)
    durable.write_once(tmp_path / "a", [b"x"])
    before, after = seen
    assert "a" not in before
    assert after == ["a"]


def test_write_once_twice_with_the_same_bytes_is_harmless(tmp_path: Path) -> None:
    """Writing the same bytes again, in other chunks, leaves the file that was there."""
    path = tmp_path / "a"
    durable.write_once(path, [b"one", b"two"])
    inode = path.stat().st_ino
    durable.write_once(path, [b"onetwo"])
    assert path.stat().st_ino == inode
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("other", [b"onetwX", b"onetw", b"onetwoo", b""])
def test_write_once_does_not_replace(tmp_path: Path, other: bytes) -> None:
    """Other bytes under a name that is taken are refused, the name is said, and the old bytes stay."""
    path = tmp_path / "taken"
    durable.write_once(path, [b"onetwo"])
    with pytest.raises(CorruptError, match="taken"):
        durable.write_once(path, [other])
    assert path.read_bytes() == b"onetwo"
    assert names(tmp_path) == ["taken"]


def test_write_once_leaves_nothing_when_the_source_fails(tmp_path: Path) -> None:
    """When the chunks stop with an error, neither file nor temporary remains."""

    def chunks() -> Iterator[bytes]:
        yield b"half"
        raise RuntimeError

    with pytest.raises(RuntimeError):
        durable.write_once(tmp_path / "a", chunks())
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("number", "words"), [(errno.ENOSPC, "full"), (errno.EDQUOT, "quota"), (errno.EROFS, "read-only")]
)
def test_a_disk_that_takes_no_more_is_unavailable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    """Full, over quota and read-only name the folder, the bytes needed and what to do, and leave nothing behind."""

    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(UnavailableError, match=words) as caught:
        durable.write_once(tmp_path / "a", [bytes(1500)])
    assert str(tmp_path) in caught.value.message
    assert "1,500 bytes" in caught.value.message
    assert caught.value.hint
    assert names(tmp_path) == []


def test_other_disk_errors_keep_their_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failing disk is not mistaken for a full one."""

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        durable.write_once(tmp_path / "a", [b"x"])
    assert names(tmp_path) == []


def test_a_real_full_device_is_unavailable() -> None:
    """The kernel's own ENOSPC, from /dev/full, is translated."""
    fd = os.open("/dev/full", os.O_WRONLY)
    try:
        with pytest.raises(UnavailableError, match="full"), durable.storage_errors(Path("/dev"), 5):
            os.write(fd, b"hello")
    finally:
        os.close(fd)


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernel takes only some bytes of a write, the rest follows."""
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, bytes(data)[:3], offset))
    durable.write_once(tmp_path / "a", [b"0123456789"])
    assert (tmp_path / "a").read_bytes() == b"0123456789"


@pytest.mark.parametrize("durably", [True, False])
def test_replacing(tmp_path: Path, syncs: durable.SyncCount, durably: bool) -> None:
    """New bytes take the place of old ones, with two syncs or, where durability is not asked for, none."""
    path = tmp_path / "a"
    path.write_bytes(b"old and longer")
    if durably:
        durable.replace_atomic(path, b"new")
    else:
        durable.write_scratch(path, [b"n", b"ew"])
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["a"]
    assert (syncs.files, syncs.folders) == ((1, 1) if durably else (0, 0))


def test_overwriting(tmp_path: Path, syncs: durable.SyncCount) -> None:
    """The same file on the disk, longer or shorter than before, and no sync; made when it is not there."""
    path = tmp_path / "a"
    durable.overwrite(path, [b"first"])
    before = path.stat().st_ino
    for chunks in ([b"lon", b"ger"], [b"short"], []):
        durable.overwrite(path, chunks)
        assert path.read_bytes() == b"".join(chunks)
    assert path.stat().st_ino == before
    assert (syncs.files, syncs.folders) == (0, 0)


def test_what_was_not_overwritten_whole_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a full disk nor what the bytes come from leaves a mixture."""
    path = tmp_path / "a"

    def failing() -> Iterator[bytes]:
        yield b"ne"
        raise RefusedError("no more", rule="test")

    path.write_bytes(b"old")
    with pytest.raises(RefusedError):
        durable.overwrite(path, failing())
    assert names(tmp_path) == []
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "pwrite", full_disk)
    with pytest.raises(UnavailableError):
        durable.overwrite(path, [b"new"])
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "replace", [durable.replace_atomic, lambda path, data: durable.write_scratch(path, [data])], ids=["durably", "not"]
)
def test_replacing_keeps_the_old_bytes_on_failure(
    replace: Callable[[Path, bytes], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a full disk the old bytes stay whole."""
    path = tmp_path / "a"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "pwrite", full_disk)
    with pytest.raises(UnavailableError):
        replace(path, b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_append_adds_durably_and_leaves_no_half_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, syncs: durable.SyncCount
) -> None:
    """A disk that fills up in mid-write leaves the file as it was, and the next line begins where this one did."""
    path, real = tmp_path / "lines", os.pwrite
    durable.append(path, b"one\n")
    assert (syncs.files, syncs.folders) == (1, 1)

    def fills_up(fd: int, data: bytes, offset: int) -> int:
        if offset > 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, bytes(data)[:1], offset)

    with monkeypatch.context() as disk:
        disk.setattr(os, "pwrite", fills_up)
        with pytest.raises(NoRoomError):
            durable.append(path, b"two\n")
    assert path.read_bytes() == b"one\n"
    durable.append(path, b"three\n")
    assert path.read_bytes() == b"one\nthree\n"
    assert (syncs.files, syncs.folders) == (2, 1)


def test_remove(tmp_path: Path, syncs: durable.SyncCount) -> None:
    """A file is gone durably; removing what is not there does nothing, not even a sync."""
    (tmp_path / "a").touch()
    durable.remove(tmp_path / "a")
    durable.remove(tmp_path / "a")
    assert names(tmp_path) == []
    assert (syncs.files, syncs.folders) == (0, 1)


def test_make_folder(tmp_path: Path, syncs: durable.SyncCount) -> None:
    """Missing parents are made, and each new name is synced where it stands."""
    durable.make_folder(tmp_path / "a" / "b")
    durable.make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    assert syncs.folders == 2


def test_reserve_takes_the_space_at_once(tmp_path: Path) -> None:
    """A reserved file has its length and its blocks; what it held stays."""
    path = tmp_path / "a"
    path.write_bytes(b"held")
    fd = os.open(path, os.O_RDWR)
    try:
        durable.reserve(fd, 1_000_000, tmp_path)
    finally:
        os.close(fd)
    assert path.stat().st_size == 1_000_000
    assert path.stat().st_blocks * 512 >= 1_000_000
    assert path.read_bytes().startswith(b"held\0")


def test_reserve_says_how_much_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without room for all of it, the error says how much was wanted."""
    monkeypatch.setattr(os, "posix_fallocate", full_disk)
    fd = os.open(tmp_path / "a", os.O_RDWR | os.O_CREAT)
    try:
        with pytest.raises(UnavailableError, match="7,000,000 bytes"):
            durable.reserve(fd, 7_000_000, tmp_path)
    finally:
        os.close(fd)


def test_reserve_falls_back_to_length_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that cannot reserve gives a file of the right length all the same; other errors are told."""
    fd = os.open(tmp_path / "a", os.O_RDWR | os.O_CREAT)

    def fail_with(number: int) -> None:
        def fail(*_: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "posix_fallocate", fail)

    try:
        fail_with(errno.EOPNOTSUPP)
        durable.reserve(fd, 4321, tmp_path)
        assert (tmp_path / "a").stat().st_size == 4321
        fail_with(errno.EIO)
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            durable.reserve(fd, 9999, tmp_path)
    finally:
        os.close(fd)


def test_leftovers_are_removed(tmp_path: Path) -> None:
    """Temporary files of a crash are removed and counted, other files are not touched."""
    (tmp_path / f"{durable.TEMPORARY_PREFIX}dead").touch()
    (tmp_path / "kept").touch()
    assert durable.remove_temporaries(tmp_path) == 1
    assert names(tmp_path) == ["kept"]


def test_a_retired_file_leaves_its_place_to_the_next_of_its_kind(tmp_path: Path) -> None:
    """To one of the same kind, once; what is shorter is cut, and what nobody took goes."""
    (tmp_path / "v1.slot.bin").write_bytes(b"old and longer")
    place = (tmp_path / "v1.slot.bin").stat().st_ino
    durable.retire(tmp_path / "v1.slot.bin")
    with durable.temporary_file(tmp_path, "bin") as (_, fd):
        assert os.fstat(fd).st_size == 0
    for expected in (True, False):
        with durable.temporary_file(tmp_path, "slot.bin") as (temporary, fd):
            assert (os.fstat(fd).st_ino == place) is expected
            durable.write_chunks(fd, [b"new"], tmp_path)
            assert temporary.read_bytes() == b"new"
            temporary.replace(tmp_path / "v2.slot.bin")
    durable.retire(tmp_path / "v2.slot.bin")
    durable.remove_spares(tmp_path)
    assert names(tmp_path) == []


def test_a_start_finds_no_spare(tmp_path: Path) -> None:
    """What a killed process had retired is removed with its temporary files."""
    (tmp_path / "a.frames").touch()
    durable.retire(tmp_path / "a.frames")
    durable.remove_temporaries(tmp_path)
    assert names(tmp_path) == []
