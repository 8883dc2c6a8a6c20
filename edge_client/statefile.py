"""Tensors in plain safetensors files: states as they travelled, deltas as they were trained, what stays at a site.

A state is read a tensor at a time, when it is put into the model and when a delta is taken from it: kept beside the
model it would cost a site the bytes of all that is trained once more, for as long as it trains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from shared import codec, durable
from shared.config import CodecName
from shared.errors import RefusedError, UnavailableError
from shared.plan import Blocks, blocks_from
from shared.tensorfile import NUMPY_DTYPES, F32Array, Header, Shape, let_go, map_file

_NONE: Mapping[str, str] = MappingProxyType({})
_FINGERPRINT = "mailboat.fingerprint"


class Tensors(Mapping[str, F32Array]):
    """Tensors by name, each made anew, an array of its own, whenever it is looked up."""

    def __init__(self, shapes: Mapping[str, Shape], read: Callable[[str], F32Array]) -> None:
        self.shapes = shapes
        self._read = read

    def __getitem__(self, name: str) -> F32Array:
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    def beside(self, others: Mapping[str, F32Array]) -> Tensors:
        """These and others, which are told apart by their names."""
        shapes = {**self.shapes, **shapes_of(others)}
        return Tensors(shapes, lambda name: others[name] if name in others else self._read(name))


def shapes_of(tensors: Mapping[str, F32Array]) -> Mapping[str, Shape]:
    """The shape of each tensor; of those of a file none is made for it."""
    return tensors.shapes if isinstance(tensors, Tensors) else {name: each.shape for name, each in tensors.items()}


def read_state(path: Path) -> Tensors:
    """Return the tensors of a safetensors file of any codec, in order of their names; a look-up decodes to float32.

    RefusedError when the file is malformed or holds what no codec writes; UnavailableError when it cannot be read. A
    look-up raises as `codec.decode_tensor`. The file stays mapped, so nobody may change it meanwhile.
    """
    header, data = _read(path)
    name, shapes = _recognise(header, path)
    specs = {spec.name: spec for spec in header.specs}

    def part(of: str) -> npt.NDArray[Any]:
        spec = specs[of]
        return data[spec.begin : spec.end].view(NUMPY_DTYPES[spec.dtype]).reshape(spec.shape)

    def decoded(tensor: str) -> F32Array:
        shape = shapes[tensor]
        values = codec.decode_tensor([part(of) for of, _, _ in codec.part_specs(tensor, shape, name)], name, shape)
        let_go(data)
        return values

    return Tensors(dict(sorted(shapes.items())), decoded)


def read_blocks(path: Path) -> Blocks | None:
    """Return the blocks that a state's header says to train, None when it names none; errors as `read_state`."""
    header, _ = _read(path)
    return blocks_from(header.metadata)


def read_own(path: Path, fingerprint: str) -> Mapping[str, F32Array]:
    """Return the tensors that stay at this site, as `write_own` wrote them; errors as `read_state`.

    RefusedError(rule='other-fingerprint') when they belong to another federation.
    """
    header, _ = _read(path)
    if header.metadata.get(_FINGERPRINT) != fingerprint:
        raise RefusedError(
            f"{path} holds what this site trained for itself in another federation",
            rule="other-fingerprint",
            hint="give each federation a storage folder of its own, or move the file away to begin anew",
        )
    return read_state(path) if header.specs else {}


def write_own(path: Path, tensors: Mapping[str, F32Array], fingerprint: str) -> None:
    """Put the tensors that stay at this site into a file; errors as `write_tensors`."""
    write_tensors(path, tensors, {_FINGERPRINT: fingerprint})


def write_tensors(path: Path, tensors: Mapping[str, F32Array], metadata: Mapping[str, str] = _NONE) -> None:
    """Put float32 tensors, and `metadata` in the header, over a safetensors file, whole or not at all.

    Not synced: what was trained is sealed elsewhere before anything is promised. RefusedError(rule='non-finite') names
    a tensor with NaN or infinity; UnavailableError when the disk does not take the file.
    """
    durable.overwrite(path, codec.encode_file(tensors, "f32", metadata))


def _read(path: Path) -> tuple[Header, npt.NDArray[np.uint8]]:
    """The header, and the data section."""
    try:
        return map_file(path)
    except OSError as error:
        raise UnavailableError(f"{path} cannot be read: {error.strerror}", hint="start the site again") from error


def _recognise(header: Header, path: Path) -> tuple[CodecName, dict[str, Shape]]:
    """The one codec that writes such tensors, and their shapes; no two write the same types and companions."""
    for name in get_args(CodecName):
        try:
            return name, codec.tensor_shapes(header, name)
        except RefusedError:
            continue
    raise RefusedError(f"{path} holds tensors that no codec writes", rule="codec-parts", hint="pull the state again")
