"""Where kept hidden states lie: in memory, or in a site's folder, where a restart finds them again.

    prefix/<slot>-<key>-<sha256>.safetensors   one tensor `hidden` of shape (tokens, width), batch after batch

A slot is one of a site's data sets (`training`, `held-out`) and has one file at most. The key is a digest of all that
the states follow from; a file of another key is deleted before anything is computed, so that nothing outlives the notes
it was made of. The SHA-256 is that of the file, looked at once when it is opened: what the disk has spoilt is computed
anew. Hidden states tell about as much as the notes: the file is readable by its owner alone, and never sent.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import re
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Protocol, get_args

import structlog
import torch

from shared import durable
from shared.config import StateDType
from shared.errors import UnavailableError
from shared.room import MIB, Room
from shared.tensorfile import DType, build_header

TENSOR = "hidden"

Slot = Literal["training", "held-out"]
SLOTS: tuple[Slot, ...] = get_args(Slot)
"""In the order in which they are filled."""

DTYPES: Mapping[StateDType, torch.dtype] = MappingProxyType(
    {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
)
_STORED: Mapping[StateDType, DType] = MappingProxyType({"f32": "F32", "bf16": "BF16", "f16": "F16"})
_NAME = re.compile(r"([a-z-]+)-([0-9a-f]{64})-([0-9a-f]{64})\.safetensors")

Rows = Callable[[int, int], torch.Tensor]
"""The kept states of the tokens from one number up to another: (tokens, width), in the type that they are kept in."""

log = structlog.get_logger("worker")


class NotKeptError(Exception):
    """States are not kept, for the reason that it says; training runs the whole model instead."""


@dataclass(frozen=True, slots=True)
class HiddenSpec:
    """Hidden states that are to be kept: what they follow from, as a digest, and their extent."""

    key: str
    tokens: int
    width: int
    dtype: StateDType

    @property
    def size(self) -> int:
        """Bytes."""
        return self.tokens * self.width * DTYPES[self.dtype].itemsize


@dataclass(frozen=True, slots=True, order=True)
class Entry:
    """One file of kept states: what its name says, and where it lies."""

    slot: str
    key: str
    sha256: str
    path: Path

    @property
    def intact(self) -> bool:
        """Whether the bytes are those that were written; they are not where they cannot be read."""
        try:
            with self.path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest() == self.sha256
        except OSError:
            return False


class Keep(Protocol):
    """Somewhere to keep the hidden states of one data set."""

    @property
    def dtype(self) -> StateDType:
        """The type to keep them in."""

    def find(self, spec: HiddenSpec) -> Rows | None:
        """Return states that were kept earlier; None where there are none, or they are damaged.

        NotKeptError when they may be kept no longer.
        """

    def check(self, spec: HiddenSpec) -> None:
        """Raise NotKeptError when there is no room for these states; called before they are computed."""

    def put(self, spec: HiddenSpec, batches: Iterator[torch.Tensor]) -> Rows:
        """Keep what `batches` yields, each (tokens, width), one after the other; NotKeptError when that fails."""

    def clear(self) -> None:
        """Forget what was kept here."""


@dataclass(frozen=True, slots=True)
class InMemory:
    """States that end with the process, of at most so many bytes."""

    limit: int
    dtype: StateDType = "f32"

    def find(self, spec: HiddenSpec) -> Rows | None:
        """See Keep."""
        return None

    def check(self, spec: HiddenSpec) -> None:
        """See Keep."""
        if spec.size > self.limit:
            raise NotKeptError(f"the states would take {spec.size >> 20} MiB, more than {self.limit >> 20} MiB")

    def put(self, spec: HiddenSpec, batches: Iterator[torch.Tensor]) -> Rows:
        """See Keep."""
        kept, at = torch.empty((spec.tokens, spec.width), dtype=DTYPES[spec.dtype]), 0
        for batch in batches:
            kept[at : at + len(batch)] = batch
            at += len(batch)
        return lambda begin, end: kept[begin:end]

    def clear(self) -> None:
        """See Keep."""


NOWHERE = InMemory(0)
"""For notes that are looked at once."""


class OnDisk:
    """One slot of a site's folder. All slots together take at most `limit` bytes; `keep_free` stay free on the disk."""

    def __init__(self, folder: Path, slot: Slot, *, dtype: StateDType, limit: int, keep_free: int) -> None:
        self.dtype: StateDType = dtype
        self._folder = folder
        self._slot = slot
        self._limit = limit
        self._room = Room(folder, keep_free)
        durable.make_folder(folder)
        folder.chmod(0o700)
        durable.remove_temporaries(folder)

    def find(self, spec: HiddenSpec) -> Rows | None:
        """See Keep; files of other keys are deleted, and damaged ones, which the log tells."""
        found = None
        for entry in self._entries(self._slot):
            if entry.key == spec.key and entry.intact:
                found = entry
                continue
            if entry.key == spec.key:
                log.warning("prefix-damaged", notes=self._slot, consequence="it is computed anew")
            _forget(entry)
        if found is None:
            return None
        self._check_limit(0)
        log.info("prefix-found", notes=self._slot, **_told(spec))
        return _Mapped(found.path, spec)

    def check(self, spec: HiddenSpec) -> None:
        """See Keep. The files of later slots go: most likely they are of other notes, too, and need the room."""
        for slot in SLOTS[SLOTS.index(self._slot) + 1 :]:
            for entry in self._entries(slot):
                _forget(entry)
        self._check_limit(_file_size(spec))
        why = self._room.lacking(_file_size(spec))
        if why is not None:
            raise NotKeptError(f"there is no room for the states: {why}")
        log.info("prefix-computing", notes=self._slot, **_told(spec))

    def _entries(self, slot: Slot) -> list[Entry]:
        return [entry for entry in entries(self._folder) if entry.slot == slot]

    def _check_limit(self, more: int) -> None:
        needed = more + sum(entry.path.stat().st_size for entry in entries(self._folder))
        if needed > self._limit:
            raise NotKeptError(
                f"the states would take {needed >> 20} MiB, more than prefix.limit_mib = {self._limit >> 20}"
            )

    def put(self, spec: HiddenSpec, batches: Iterator[torch.Tensor]) -> Rows:
        """See Keep; the file has its name once all of it is on the disk."""
        folder, digest = self._folder, hashlib.sha256()

        def chunks() -> Iterator[bytes | memoryview]:
            for chunk in _chunks(spec, batches):
                digest.update(chunk)
                yield chunk

        try:
            with durable.temporary_file(folder) as (temporary, fd):
                durable.reserve(fd, _file_size(spec), folder)
                durable.write_chunks(fd, chunks(), folder)
                path = folder / f"{self._slot}-{spec.key}-{digest.hexdigest()}.safetensors"
                temporary.rename(path)
            durable.fsync_dir(folder)
        except UnavailableError as error:
            raise NotKeptError(error.message) from error
        return _Mapped(path, spec)

    def clear(self) -> None:
        """See Keep."""
        for entry in self._entries(self._slot):
            _forget(entry)


class _Mapped:
    """Rows of a file, mapped when they are asked for and unmapped when nobody holds them any more.

    So what is resident does not grow with the notes. The mappings are private: the file cannot be written through them.
    """

    def __init__(self, path: Path, spec: HiddenSpec) -> None:
        self._fd = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._fd)
        self._spec = spec
        self._start = len(_header(spec))

    def __call__(self, begin: int, end: int) -> torch.Tensor:
        width, dtype = self._spec.width, DTYPES[self._spec.dtype]
        first, last = (self._start + row * width * dtype.itemsize for row in (begin, end))
        page = first - first % mmap.ALLOCATIONGRANULARITY
        mapped = mmap.mmap(self._fd, last - page, access=mmap.ACCESS_COPY, offset=page)
        flat = torch.frombuffer(mapped, dtype=dtype, count=(end - begin) * width, offset=first - page)
        return flat.view(-1, width)


def entries(folder: Path) -> list[Entry]:
    """Return the files of kept states in a folder, sorted."""
    found = ((path, _NAME.fullmatch(path.name)) for path in folder.glob("*.safetensors"))
    return sorted(Entry(name[1], name[2], name[3], path) for path, name in found if name)


def _header(spec: HiddenSpec) -> bytes:
    return build_header([(TENSOR, _STORED[spec.dtype], (spec.tokens, spec.width))], {})


def _file_size(spec: HiddenSpec) -> int:
    return len(_header(spec)) + spec.size


def _chunks(spec: HiddenSpec, batches: Iterator[torch.Tensor]) -> Iterator[bytes | memoryview]:
    yield _header(spec)
    for batch in batches:
        yield batch.contiguous().view(torch.uint8).flatten().numpy().data


def _forget(entry: Entry) -> None:
    entry.path.unlink(missing_ok=True)
    durable.fsync_dir(entry.path.parent)


def _told(spec: HiddenSpec) -> dict[str, Any]:
    return {"mib": round(spec.size / MIB, 1), "tokens": spec.tokens, "dtype": spec.dtype}
