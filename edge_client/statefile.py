"""Tensors in plain safetensors files: states as they travelled, deltas as they were trained, what stays at a site."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import get_args

import numpy as np
import numpy.typing as npt

from edge_client.model import State
from shared import codec, durable
from shared.config import CodecName
from shared.errors import RefusedError, UnavailableError
from shared.plan import Blocks, blocks_from
from shared.tensorfile import NUMPY_DTYPES, F32Array, Header, Shape, map_file

_NONE: Mapping[str, str] = MappingProxyType({})
_FINGERPRINT = "mailboat.fingerprint"


def read_state(path: Path) -> State:
    """Return the tensors of a safetensors file of any codec, decoded to float32.

    RefusedError when the file is malformed or holds what no codec writes; UnavailableError when it cannot be read.
    """
    header, data = _read(path)
    name, shapes = _recognise(header, path)
    arrays = {
        spec.name: data[spec.begin : spec.end].view(NUMPY_DTYPES[spec.dtype]).reshape(spec.shape)
        for spec in header.specs
    }
    return {
        tensor: codec.decode_tensor([arrays[part] for part, _, _ in codec.part_specs(tensor, shape, name)], name, shape)
        for tensor, shape in sorted(shapes.items())
    }


def read_blocks(path: Path) -> Blocks | None:
    """Return the blocks that a state's header says to train, None when it names none; errors as `read_state`."""
    header, _ = _read(path)
    return blocks_from(header.metadata)


def read_own(path: Path, fingerprint: str) -> State:
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
