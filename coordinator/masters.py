"""Float32 files beside the journal: the master of each version, and the slots of the server optimizer.

    v00000007.safetensors            master of version 7, float32, names ascending
    v00000007.momentum.safetensors   one file for each slot of the optimizer, the same names and shapes

A version without slot files has slots of zero; version 0 is one. Files are read and written a tensor at a time, by
copying and not by mapping, so that memory stays that of a few tensors. A file appears under its name whole and durable;
one that is there already is replaced, as only the journal says which of two attempts at a version counts.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Self

import numpy as np

from shared import durable
from shared.digest import Hasher, digest, file_digest
from shared.errors import CorruptError, RefusedError
from shared.faultpoint import passing
from shared.tensorfile import F32Array, Shape, TensorSpec, build_header, header_size, parse_header

_NAME = re.compile(r"v(\d{8,})(\.[a-z_]+)?\.safetensors")


def master_path(folder: Path, version: int) -> Path:
    """Where the master of a version lies."""
    return folder / f"v{version:08d}.safetensors"


def slot_path(folder: Path, version: int, slot: str) -> Path:
    """Where one slot of a version's optimizer lies."""
    return folder / f"v{version:08d}.{slot}.safetensors"


def version_of(path: Path) -> int | None:
    """The version whose master or slot a file is, by its name; None for any other file."""
    found = _NAME.fullmatch(path.name)
    return None if found is None else int(found[1])


class TensorFile(Mapping[str, F32Array]):
    """A plain safetensors file of float32 tensors, open for reading; each look-up reads one tensor from the disk.

    RefusedError, as from `parse_header` or with rule 'wrong-dtype', when it is not such a file.
    """

    def __init__(self, path: Path) -> None:
        with ExitStack() as on_error:
            self._file = on_error.enter_context(path.open("rb", buffering=0))
            size = path.stat().st_size
            head = header_size(self._file.read(8), size)
            header = parse_header(os.pread(self._file.fileno(), head, 0), size)
            self._begin = header.size
            self.metadata = header.metadata
            """What the file says of itself."""
            self._specs = {spec.name: spec for spec in header.specs}
            self._check_types()
            on_error.pop_all()

    @property
    def shapes(self) -> dict[str, Shape]:
        """Name and shape of each tensor, in file order."""
        return {name: spec.shape for name, spec in self._specs.items()}

    def __getitem__(self, name: str) -> F32Array:
        spec: TensorSpec = self._specs[name]
        self._file.seek(self._begin + spec.begin)
        values = np.fromfile(self._file, dtype="<f4", count=(spec.end - spec.begin) // 4)
        return values.reshape(spec.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def _check_types(self) -> None:
        for spec in self._specs.values():
            if spec.dtype != "F32":
                raise RefusedError(f"tensor {spec.name} is {spec.dtype}, not F32", rule="wrong-dtype")


def open_own(path: Path, shapes: Mapping[str, Shape]) -> TensorFile:
    """Open a file that we wrote; CorruptError when it is gone, is no such file, or holds other tensors."""
    hint = "restore it from a backup, or recompute it from version 0 and the kept updates"
    try:
        found = TensorFile(path)
    except FileNotFoundError:
        raise CorruptError(f"{path} is gone", hint=hint) from None
    except RefusedError as error:
        raise CorruptError(f"{path} is not what was written: {error.message}", hint=hint) from None
    if found.shapes != dict(shapes):
        found.close()
        raise CorruptError(f"{path} holds other tensors than the sealed plan names", hint=hint)
    return found


class TensorWriter:
    """Takes the tensors of one file in the order of their names; made by `writing`."""

    def __init__(self, fd: int, folder: Path, shapes: Mapping[str, Shape], metadata: Mapping[str, str]) -> None:
        self._fd = fd
        self._folder = folder
        self._hash = Hasher()
        self._offset = 0
        self._expected = iter(sorted(shapes.items()))
        head = build_header([(name, "F32", shape) for name, shape in shapes.items()], metadata)
        size = len(head) + 4 * sum(int(np.prod(shape, dtype=np.int64)) for shape in shapes.values())
        durable.reserve(fd, size, folder)
        self._put(memoryview(head))

    def write(self, name: str, values: F32Array) -> None:
        """Write the next tensor; asserts that it is the next one."""
        assert next(self._expected) == (name, values.shape)
        self._put(np.ascontiguousarray(values, dtype="<f4").reshape(-1).view(np.uint8).data)

    def finish(self) -> None:
        """Make the file durable; asserts that it is complete."""
        assert next(self._expected, None) is None, "tensors are missing"
        with durable.storage_errors(self._folder):
            durable.sync_file(self._fd)

    @property
    def digest(self) -> str:
        """BLAKE3 of what was written, in hex."""
        return self._hash.hexdigest()

    def _put(self, data: memoryview) -> None:
        with durable.storage_errors(self._folder, len(data)):
            durable.write_all(self._fd, data, self._offset)
        self._hash.update(data)
        self._offset += len(data)


@contextmanager
def writing(path: Path, shapes: Mapping[str, Shape], metadata: Mapping[str, str]) -> Iterator[TensorWriter]:
    """Yield a writer of a float32 file that appears under `path`, durable, when the block ends without an error.

    The disk space is taken at once: UnavailableError when there is not so much.
    """
    with durable.temporary_file(path.parent, path.name.partition(".")[2]) as (temporary, fd):
        writer = TensorWriter(fd, path.parent, shapes, metadata)
        yield writer
        writer.finish()
        passing("master.before")
        temporary.replace(path)
    durable.fsync_dir(path.parent)
    passing("master.after")


def slots_digest(digests: Collection[str]) -> str | None:
    """One digest for all slots: BLAKE3 over their files' digests (hex, joined), in the optimizer's order; or None."""
    return digest("".join(digests).encode()).hex() if digests else None


def check_files(folder: Path, version: int, slots: Collection[str], master: str, optimizer: str | None) -> None:
    """Compare a version's files with the digests that the journal recorded; CorruptError names the file.

    For the start of a coordinator: it reads every byte, as a rotten master would spoil every version after it.
    """
    _check(master_path(folder, version), own_digest(master_path(folder, version)) == master)
    if optimizer is not None:
        digests = [own_digest(slot_path(folder, version, slot)) for slot in slots]
        _check(slot_path(folder, version, "*"), slots_digest(digests) == optimizer)


def _check(path: Path, same: object) -> None:
    if not same:
        raise CorruptError(
            f"{path} is not what the journal says was written",
            hint="restore it from a backup, or recompute it from version 0 and the kept updates",
        )


def own_digest(path: Path) -> str:
    """BLAKE3 of a file that we wrote, in hex; CorruptError when it is gone."""
    if not path.exists():
        raise CorruptError(f"{path} is gone", hint="restore it from a backup, or recompute it from version 0")
    return file_digest(path)


def prune_masters(folder: Path, keep: Collection[int]) -> list[str]:
    """Delete masters and slots of all versions but 0 and those in `keep`; return the names deleted.

    Leftovers of a crash go too: call it while nothing is being merged. Version 0 stays for ever: with it and the kept
    updates every version can be computed again. The last one deleted leaves its place to the next version.
    """
    durable.remove_temporaries(folder)
    deleted = []
    for path in sorted(folder.glob("v*.safetensors")):
        version = version_of(path)
        if version is not None and version not in {0, *keep}:
            durable.retire(path)
            deleted.append(path.name)
    if deleted:
        durable.fsync_dir(folder)  # else a power loss could bring them back
    return deleted
