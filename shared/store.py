"""Transfers at rest: the frames as they were sent, and the manifest that says what they are.

    <id>.frames          the frames, one behind the other
    <id>.manifest        there is a whole, durable transfer; written or renamed last, so this name is the commit point
    <id>.part.manifest   the frames are still arriving
    .tmp-*, .spare-*     see `shared.durable`

A transfer that is arriving and one that has arrived differ by one rename, so a crash leaves one or the other. Which
frames of an arriving transfer are there is not written down anywhere: each is hashed again when the transfer is
resumed. Frames that no manifest speaks of are litter.

Both ends use this: the coordinator for updates and states, a site for its outbox and the states it pulls. Everything
here blocks on the disk; an event loop calls it from a thread. A folder has one process that writes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Self

from shared import durable
from shared.digest import digest
from shared.errors import CorruptError, RefusedError
from shared.faultpoint import passing
from shared.manifest import Manifest, manifest_from_bytes
from shared.reader import TensorReader
from shared.slices import FileSummary, FrameWriter
from shared.transfer import Bitmap

_ID = re.compile(r"[0-9a-f]{32}")
_NOTHING = bytes(4)
"""How reserved and never written space begins; no zstd frame does."""
_KIND = "frames"


@dataclass(frozen=True, slots=True)
class Stored:
    """A whole transfer; `path` is its file of frames, `offsets` where each frame begins in it."""

    manifest: Manifest
    path: Path
    offsets: tuple[int, ...]

    def read_frame(self, index: int, *, verify: bool = True) -> bytes:
        """Return one frame as it was sent; CorruptError when the disk no longer holds it."""
        with _reading(self.path) as fd:
            return self._read(fd, index, verify=verify)

    @contextmanager
    def open_tensors(self, *, verify: bool = False) -> Iterator[TensorReader]:
        """Yield a reader of the transfer's tensors; errors as `TensorReader`, and CorruptError when the disk failed.

        With `verify`, leaving the block without an error compares the whole file's hash: only then is what was read
        what the manifest promised. The frames' hashes, which each was compared with when it arrived, could say no more;
        they are looked at when anything is refused, since it may be the disk's doing and not the sender's.
        """
        with _reading(self.path) as fd:
            try:
                reader = TensorReader(self.manifest, lambda index: self._read(fd, index, verify=False), verify=verify)
                yield reader
                if verify:
                    reader.verify_file()
            except RefusedError:
                if verify:
                    self._check_frames(fd)
                raise

    def verify(self) -> None:
        """Read what it holds from end to end and compare the file's hash; errors as `open_tensors`."""
        with self.open_tensors(verify=True):
            pass

    def check_frames(self) -> None:
        """Compare each frame with its hash; CorruptError names the first that is not what was written."""
        with _reading(self.path) as fd:
            self._check_frames(fd)

    def plain(self) -> Iterator[memoryview]:
        """Yield the bytes of the plain safetensors file; errors as `open_tensors`, some only at the end."""
        with self.open_tensors(verify=True) as reader:
            for raw in reader.slices():
                yield raw.data

    def _check_frames(self, fd: int) -> None:
        for index in range(self.manifest.frames):
            self._read(fd, index, verify=True)

    def _read(self, fd: int, index: int, *, verify: bool) -> bytes:
        length = self.manifest.frame_lengths[index]
        frame = os.pread(fd, length, self.offsets[index])
        intact = len(frame) == length
        if verify and intact:
            intact = digest(frame) == self.manifest.frame_hash(index)
        if not intact:
            raise CorruptError(
                f"{self.path}: frame {index} is not what was written",
                hint="look for disk errors; a copy at the other end can be sent again",
            )
        return frame


class Partial:
    """A transfer that is arriving; made by `FrameStore.open_partial`, used by one thread at a time.

    `have` holds the frames that are written and have the manifest's hashes. They are durable, and may be promised to
    the sender, after `sync`.
    """

    def __init__(self, store: FrameStore, manifest: Manifest, fd: int, have: Bitmap) -> None:
        self.manifest = manifest
        self.have = have
        self._store = store
        self._fd = fd
        self._closed = False
        self._offsets = frame_offsets(manifest)
        self._unsynced = False

    def write(self, index: int, frame: bytes | memoryview) -> bool:
        """Take one frame; False when it was there already, in which case nothing is looked at or written.

        RefusedError with rule 'frame-index', 'frame-length' or 'frame-hash' when the manifest names no such frame.
        """
        if not 0 <= index < self.manifest.frames:
            raise RefusedError(f"frame {index} of a transfer of {self.manifest.frames}", rule="frame-index")
        if index in self.have:
            return False
        if len(frame) != self.manifest.frame_lengths[index]:
            raise RefusedError(f"frame {index} has another length than its manifest says", rule="frame-length")
        if digest(frame) != self.manifest.frame_hash(index):
            raise RefusedError(f"frame {index} has another hash than its manifest says", rule="frame-hash")
        with durable.storage_errors(self._store.root, len(frame)):
            durable.write_all(self._fd, frame, self._offsets[index])
        self._unsynced = True
        self.have.add(index)
        return True

    def sync(self) -> bytes:
        """Make durable what was written so far, and return its bitmap in the wire's form."""
        have = self.have.to_bytes()
        if self._unsynced:
            passing("chunks-sync.before")
            with durable.storage_errors(self._store.root):
                durable.sync_file(self._fd)
            self._unsynced = False
            passing("chunks-sync.after")
        return have

    def finish(self) -> Stored:
        """Make a complete transfer durable as a whole; asserts that it is complete."""
        assert self.have.full, "frames are missing"
        self.sync()
        self.close()
        return self._store.commit(self.manifest)

    def close(self) -> None:
        """Release the file; what was written can be resumed later."""
        if not self._closed:
            self._closed = True
            os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class FrameStore:
    """A folder of transfers; see the module's docstring.

    With `recycles` the frames of a transfer that is deleted leave their place to the next ones. Not where deleting is
    meant to forget: until then the bytes are still there.
    """

    def __init__(self, root: Path, *, recycles: bool = False) -> None:
        self.root = root
        self._recycles = recycles
        durable.make_folder(root)

    def recover(self) -> list[str]:
        """Remove what a crash left behind, and return the names removed; for the one writer, before anything else."""
        durable.remove_temporaries(self.root)
        removed = []
        for frames in sorted(self.root.glob("*.frames")):
            if not any(frames.with_suffix(suffix).exists() for suffix in (".manifest", ".part.manifest")):
                frames.unlink()
                removed.append(frames.name)
        # A predecessor that was killed may have named files and not synced the names; we build on what we see.
        durable.fsync_dir(self.root)
        return removed

    def ids(self) -> list[str]:
        """Ids of the whole transfers, ascending."""
        return sorted(path.name.removesuffix(".manifest") for path in self.root.glob("*.manifest") if _whole(path))

    def partial_ids(self) -> list[str]:
        """Ids of the transfers that are still arriving, ascending."""
        return sorted(path.name.removesuffix(".part.manifest") for path in self.root.glob("*.part.manifest"))

    def arriving(self) -> Iterator[Manifest]:
        """Yield the manifests of the transfers that are still arriving; one that cannot be read is left out."""
        for path in self.root.glob("*.part.manifest"):
            with suppress(CorruptError):
                yield _load_manifest(path)

    def begun(self, transfer_id: str) -> bool:
        """Whether a transfer is still arriving."""
        return self._path(transfer_id, ".part.manifest").exists()

    def get(self, transfer_id: str) -> Stored | None:
        """Return a whole transfer, or None.

        CorruptError when its manifest does not parse or its frames have another size; their bytes are not looked at.
        """
        path = self._path(transfer_id, ".manifest")
        if not path.exists():
            return None
        manifest = _load_manifest(path)
        stored = self._stored(manifest)
        size = stored.path.stat().st_size if stored.path.exists() else 0
        if manifest.transfer_id != transfer_id or size != manifest.wire_bytes:
            raise CorruptError(
                f"{stored.path} has {size:,} bytes, its manifest says {manifest.wire_bytes:,}",
                hint="restore the folder from a backup, or delete this transfer's files to have it sent again",
            )
        return stored

    def delete(self, transfer_id: str) -> None:
        """Remove a transfer, whole or arriving; nothing happens when it is not there."""
        # Manifest first, and durably: frames without one are litter, one without frames would look like damage.
        passing("delete.before")
        durable.remove(self._path(transfer_id, ".manifest"))
        durable.remove(self._path(transfer_id, ".part.manifest"))
        passing("delete.middle")
        frames = self._path(transfer_id, ".frames")
        if self._recycles:
            with suppress(FileNotFoundError):
                durable.retire(frames)
        else:
            frames.unlink(missing_ok=True)
        passing("delete.after")

    def close(self) -> None:
        """Keep no place for what will not come."""
        durable.remove_spares(self.root)

    def open_partial(self, manifest: Manifest) -> Partial:
        """Begin or resume receiving a transfer that is not whole yet; disk space for all of it is taken at once.

        Resuming reads what is there, compares each frame with its hash and writes it again. UnavailableError
        when the disk has no room; RefusedError(rule='manifest-changed') when this id began to arrive under another
        manifest.
        """
        assert not self._path(manifest.transfer_id, ".manifest").exists(), "this transfer is whole"
        begun = self._path(manifest.transfer_id, ".part.manifest")
        if begun.exists() and _load_manifest(begun) != manifest:
            raise RefusedError(
                f"transfer {manifest.transfer_id} began to arrive under another manifest", rule="manifest-changed"
            )
        if begun.exists():
            return self._resume(manifest)
        return self._begin(manifest, begun)

    def seal(self, frames: FrameWriter, build: Callable[[FileSummary], Manifest]) -> Stored:
        """Store a transfer made here, durably: all frames, then the manifest that `build` makes of their summary.

        One that is there already, the same but for the time it was made, is returned as it is; CorruptError when
        another has its id. UnavailableError when the disk has no room. When `frames` raises, nothing is left behind.
        """
        with durable.temporary_file(self.root, _KIND) as (temporary, fd):
            with closing(iter(frames)) as coming:  # also on a full disk: a thread works ahead of it
                durable.write_chunks(fd, (frame.data for frame in coming), self.root)
            manifest = build(frames.summary)
            existing = self.get(manifest.transfer_id)
            if existing is not None:
                if existing.manifest != manifest.model_copy(update={"created": existing.manifest.created}):
                    raise CorruptError(
                        f"{existing.path} is written once and belongs to another manifest",
                        hint="two transfers were given one id",
                    )
                return existing
            passing("seal.before")
            temporary.rename(self._path(manifest.transfer_id, ".frames"))
        # The frames' name must be safe before the manifest's: POSIX does not order two renames.
        durable.fsync_dir(self.root)
        passing("seal.middle")
        durable.write_once(self._path(manifest.transfer_id, ".manifest"), [manifest.to_bytes()])
        passing("seal.after")
        return self._stored(manifest)

    def commit(self, manifest: Manifest) -> Stored:
        """Declare an arriving transfer whole; for `Partial.finish`, which has synced its frames."""
        begun = self._path(manifest.transfer_id, ".part.manifest")
        passing("transfer-whole.before")
        begun.rename(self._path(manifest.transfer_id, ".manifest"))
        durable.fsync_dir(self.root)
        passing("transfer-whole.after")
        return self._stored(manifest)

    def _begin(self, manifest: Manifest, begun: Path) -> Partial:
        path = self._path(manifest.transfer_id, ".frames")
        with ExitStack() as on_error:
            durable.reuse(path, _KIND)
            fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            on_error.callback(path.unlink)
            on_error.callback(os.close, fd)
            durable.reserve(fd, manifest.wire_bytes, self.root)
            passing("spool-open.middle")
            # Makes the name of the file of frames durable as well: same folder.
            durable.write_once(begun, [manifest.to_bytes()])
            passing("spool-open.after")
            on_error.pop_all()
        return Partial(self, manifest, fd, Bitmap(manifest.frames))

    def _resume(self, manifest: Manifest) -> Partial:
        with ExitStack() as on_error:
            fd = os.open(self._path(manifest.transfer_id, ".frames"), os.O_RDWR | os.O_CREAT, 0o600)
            on_error.callback(os.close, fd)
            durable.reserve(fd, manifest.wire_bytes, self.root)
            have = Bitmap(manifest.frames, _intact_frames(fd, manifest))
            # They were read from memory, perhaps; the process that wrote them may have died before it synced.
            durable.sync_file(fd)
            durable.fsync_dir(self.root)
            on_error.pop_all()
        return Partial(self, manifest, fd, have)

    def _stored(self, manifest: Manifest) -> Stored:
        return Stored(manifest, self._path(manifest.transfer_id, ".frames"), frame_offsets(manifest))

    def _path(self, transfer_id: str, suffix: str) -> Path:
        if not _ID.fullmatch(transfer_id):
            raise RefusedError("a transfer's id is not 32 hexadecimal digits", rule="bad-transfer-id")
        return self.root / f"{transfer_id}{suffix}"


def frame_offsets(manifest: Manifest) -> tuple[int, ...]:
    """Where each frame begins when they stand one behind the other."""
    return tuple(accumulate(manifest.frame_lengths[:-1], initial=0))


def _intact_frames(fd: int, manifest: Manifest) -> Iterator[int]:
    for index, (offset, length) in enumerate(zip(frame_offsets(manifest), manifest.frame_lengths, strict=True)):
        frame = os.pread(fd, length, offset)
        if frame[:4] != _NOTHING and digest(frame) == manifest.frame_hash(index):
            # After a failed sync the kernel may take these bytes for saved, and only a new write is synced again.
            durable.write_all(fd, frame, offset)
            yield index


def _whole(path: Path) -> bool:
    return not path.name.endswith(".part.manifest")


def _load_manifest(path: Path) -> Manifest:
    try:
        return manifest_from_bytes(path.read_bytes())
    except RefusedError as error:
        raise CorruptError(
            f"{path} is not what was written: {error.message}",
            hint="look for disk errors; delete this transfer's files to have it sent again",
        ) from None


@contextmanager
def _reading(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)
