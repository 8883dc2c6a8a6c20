"""Files that survive power loss: the only place in the project that syncs.

What POSIX gives, and no more: the bytes of a file are safe after fsync of the file, its name after fsync of the folder,
and a rename is seen whole or not at all. Hence each file is written under a temporary name beside its place, synced,
renamed, and the folder synced. A folder has one writing process; leftovers of a crash are removed when it starts.

A large file that is deleted where another of its kind follows may leave its place to that one (`retire`): writing over
pages and blocks that are there costs a fraction of what the kernel and the file system take for fresh ones.

    .tmp-*     a file being written
    .spare-*   a file that was given up, whose place the next one of its kind takes

After a failed fsync nobody knows what is on the disk, and a second fsync may well report success (Rebello et al., Can
Applications Recover from fsync Failures?, ATC 2020): errors are raised, never retried here.
"""

from __future__ import annotations

import errno
import os
import secrets
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from shared.errors import CorruptError, NoRoomError, UnavailableError

TEMPORARY_PREFIX = ".tmp-"
SPARE_PREFIX = ".spare-"
_COMPARE_BYTES = 1 << 20
_STORAGE_ERRORS = {
    errno.ENOSPC: ("the disk is full", "free some space, then start again; nothing finished was lost"),
    errno.EDQUOT: ("the disk quota is used up", "raise the quota or free some space, then start again"),
    errno.EROFS: ("the file system is read-only", "mount it writable, or look for disk errors in the system's log"),
}


@dataclass(slots=True)
class SyncCount:
    """Syncs of this process so far: the slowest thing there is, so tests and benchmarks count them."""

    files: int = 0
    folders: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def add(self, *, files: int = 0, folders: int = 0) -> None:
        """Count; safe from any thread."""
        with self._lock:
            self.files += files
            self.folders += folders


SYNCS = SyncCount()


class storage_errors:  # noqa: N801 - reads as what it is used as, a function
    """Turns 'no space' and 'over quota' into NoRoomError, 'read-only' into UnavailableError; a context manager.

    `needed` is the bytes wanted, if known.
    """

    __slots__ = ("_folder", "_needed")

    def __init__(self, folder: Path, needed: int = 0) -> None:
        self._folder = folder
        self._needed = needed

    def __enter__(self) -> None:
        """Stands around each write and sync, hence no generator."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        told = storage_failure(error, str(self._folder), self._needed) if isinstance(error, OSError) else None
        if told is not None:
            raise told from error


def storage_failure(error: OSError, where: str, needed: int = 0) -> UnavailableError | None:
    """Return what `storage_errors` raises for `error`; None when it is not about room or a read-only disk."""
    if error.errno not in _STORAGE_ERRORS:
        return None
    reason, hint = _STORAGE_ERRORS[error.errno]
    amount = f"; at least {needed:,} bytes were needed" if needed else ""
    family = UnavailableError if error.errno == errno.EROFS else NoRoomError
    return family(f"{where}: {reason}{amount}", hint=hint)


def sync_file(fd: int) -> None:
    """Return when the bytes of an open file are on the disk."""
    os.fsync(fd)
    SYNCS.add(files=1)


def fsync_dir(folder: Path) -> None:
    """Return when the names in a folder are on the disk."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    SYNCS.add(folders=1)


def make_folder(folder: Path) -> None:
    """Create a folder and its parents, durably; nothing happens when it is there."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    with storage_errors(folder.parent, 4096):
        folder.mkdir(exist_ok=True)
    fsync_dir(folder.parent)


def reserve(fd: int, size: int, folder: Path) -> None:
    """Make an open file `size` bytes long and take the disk space now; UnavailableError when there is not so much.

    On a file system or platform that cannot reserve, the file only gets its length.
    """
    allocate = getattr(os, "posix_fallocate", None)
    with storage_errors(folder, size):
        if allocate is not None:
            try:
                allocate(fd, 0, size)
            except OSError as error:
                if error.errno not in {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}:
                    raise
        os.ftruncate(fd, size)


@contextmanager
def temporary_file(folder: Path, kind: str = "") -> Iterator[tuple[Path, int]]:
    """Yield path and descriptor of a new file in `folder`; removed at the end unless it was renamed by then.

    Of a `kind` that was retired there it holds, until it is cut, the old bytes.
    """
    path = folder / f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}"
    with storage_errors(folder, 4096):
        if kind:
            reuse(path, kind)
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        yield path, fd
    finally:
        os.close(fd)
        path.unlink(missing_ok=True)


def write_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data` at `offset`; the kernel may take it in several bites."""
    rest = memoryview(data)
    while rest:
        written = os.pwrite(fd, rest, offset)
        rest = rest[written:]
        offset += written


def write_chunks(fd: int, chunks: Iterable[bytes | memoryview], folder: Path, *, synced: bool = True) -> int:
    """Make an open file hold these chunks, one after the other; sync it if `synced`, and return their size."""
    size = 0
    for chunk in chunks:
        with storage_errors(folder, size + len(chunk)):
            write_all(fd, chunk, size)
        size += len(chunk)
    os.ftruncate(fd, size)
    if synced:
        with storage_errors(folder, size):
            sync_file(fd)
    return size


def write_once(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Create a file durably; the same bytes may be written again, others may not.

    CorruptError when the file is there with other content; UnavailableError when the disk does not take it. Nothing
    appears under `path` unless all chunks were written, also when `chunks` raises.
    """
    with temporary_file(path.parent) as (temporary, fd):
        size = write_chunks(fd, chunks, path.parent)
        if path.exists():
            if not _same_content(fd, size, path):
                raise CorruptError(
                    f"{path} is written once and exists with other content", hint="move it away and look who wrote it"
                )
        else:
            temporary.rename(path)
    fsync_dir(path.parent)


def overwrite(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Write chunks over whatever is at `path`, in the place that it has on the disk; neither durable nor atomic.

    For a large file that is made again and again, and read by nobody meanwhile: finding fresh pages and blocks for it
    costs several times what copying the bytes does. When this raises, `chunks` too, there is no file.
    """
    with storage_errors(path.parent, 4096):
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        write_chunks(fd, chunks, path.parent, synced=False)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)


def write_scratch(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """As `replace_atomic`, but not durable: after a power loss there may be the old file, or none, or a torn one.

    For what others read meanwhile, and can be made again.
    """
    with temporary_file(path.parent) as (temporary, fd):
        write_chunks(fd, chunks, path.parent, synced=False)
        temporary.replace(path)


def replace_atomic(path: Path, data: bytes) -> None:
    """Put `data` in the place of whatever is at `path`, durably: a reader sees the old or the new bytes, no mixture."""
    with temporary_file(path.parent) as (temporary, fd):
        write_chunks(fd, [data], path.parent)
        temporary.replace(path)
    fsync_dir(path.parent)


def append(path: Path, data: bytes) -> None:
    """Put `data` at the end of a file, durably, and make the file when missing; one process writes it.

    When the disk does not take it all the file stays as it was, so that what is appended later begins where this did;
    errors as `storage_errors`. A crash may leave the beginning of `data`.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        size = os.lseek(fd, 0, os.SEEK_END)
        try:
            with storage_errors(path.parent, len(data)):
                write_all(fd, data, size)
                sync_file(fd)
        except (OSError, UnavailableError):
            os.ftruncate(fd, size)
            raise
    finally:
        os.close(fd)
    if not size:
        fsync_dir(path.parent)


def remove(path: Path) -> None:
    """Delete a file durably; nothing happens when it is not there."""
    if path.exists():
        path.unlink()
        fsync_dir(path.parent)


def remove_temporaries(folder: Path) -> int:
    """Delete what crashes left under temporary names, and return how many; for the folder's only writer, at start."""
    leftovers = temporaries(folder)
    for leftover in leftovers:
        leftover.unlink()
    return len(leftovers)


def temporaries(folder: Path) -> list[Path]:
    """What stands in a folder under temporary names, sorted."""
    return sorted(path for prefix in (SPARE_PREFIX, TEMPORARY_PREFIX) for path in folder.glob(f"{prefix}*"))


def retire(path: Path) -> None:
    """Give up a file and leave its place to the next of its kind, which is what follows the first dot of its name.

    As a deletion, it may be undone by a power loss until the folder is synced. FileNotFoundError when it is not there.
    """
    path.replace(_spare(path.parent, path.name.partition(".")[2]))


def reuse(path: Path, kind: str) -> None:
    """Put a file of this kind that was retired, if there is one, in the place of `path`, to be written over.

    Not one that has another name besides, as copies by hard links have.
    """
    spare = _spare(path.parent, kind)
    with suppress(FileNotFoundError):
        if spare.stat().st_nlink == 1:
            spare.replace(path)


def remove_spares(folder: Path) -> None:
    """Delete what was retired and is not needed any more."""
    for spare in list(folder.glob(f"{SPARE_PREFIX}*")):
        spare.unlink(missing_ok=True)  # or taken a moment ago


def _spare(folder: Path, kind: str) -> Path:
    return folder / f"{SPARE_PREFIX}{kind}"


def _same_content(fd: int, size: int, path: Path) -> bool:
    if path.stat().st_size != size:
        return False
    with path.open("rb") as existing:
        return all(
            existing.read(_COMPARE_BYTES) == os.pread(fd, _COMPARE_BYTES, offset)
            for offset in range(0, size, _COMPARE_BYTES)
        )
