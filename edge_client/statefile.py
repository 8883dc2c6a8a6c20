"""Tensors in plain safetensors files: states as they travelled, deltas as they were trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import get_args

import numpy as np

from edge_client.model import State
from shared import codec, durable
from shared.config import CodecName
from shared.errors import RefusedError, UnavailableError
from shared.tensorfile import NUMPY_DTYPES, F32Array, Header, Shape, header_size, parse_header


def read_state(path: Path) -> State:
    """Return the tensors of a safetensors file of any codec, decoded to float32.

    RefusedError when the file is malformed or holds what no codec writes; UnavailableError when it cannot be read.
    """
    try:
        data = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise UnavailableError(f"{path} cannot be read: {error.strerror}", hint="start the site again") from error
    size = header_size(data[:8].tobytes(), len(data))
    header = parse_header(data[:size].tobytes(), len(data))
    name, shapes = _recognise(header, path)
    arrays = {
        spec.name: data[size + spec.begin : size + spec.end].view(NUMPY_DTYPES[spec.dtype]).reshape(spec.shape)
        for spec in header.specs
    }
    return {
        tensor: codec.decode_tensor([arrays[part] for part, _, _ in codec.part_specs(tensor, shape, name)], name, shape)
        for tensor, shape in sorted(shapes.items())
    }


def write_tensors(path: Path, tensors: Mapping[str, F32Array]) -> None:
    """Put float32 tensors into a safetensors file, whole or not at all.

    Not synced: what was trained is sealed elsewhere before anything is promised. RefusedError(rule='non-finite') names
    a tensor with NaN or infinity; UnavailableError when the disk does not take the file.
    """
    with durable.temporary_file(path.parent) as (temporary, fd):
        at = 0
        for part in codec.encode_file(tensors, "f32", {}):
            with durable.storage_errors(path.parent, len(part)):
                durable.write_all(fd, part, at)
            at += len(part)
        temporary.replace(path)


def _recognise(header: Header, path: Path) -> tuple[CodecName, dict[str, Shape]]:
    """The one codec that writes such tensors, and their shapes; no two write the same types and companions."""
    for name in get_args(CodecName):
        try:
            return name, codec.tensor_shapes(header, name)
        except RefusedError:
            continue
    raise RefusedError(f"{path} holds tensors that no codec writes", rule="codec-parts", hint="pull the state again")
