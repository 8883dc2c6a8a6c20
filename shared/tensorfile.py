"""The safetensors format, built and parsed strictly.

    8 bytes   little-endian length n of the header
    n bytes   JSON {name: {dtype, shape, data_offsets: [begin, end]}, "__metadata__": {str: str}}, padded by spaces
    the rest  the tensors' bytes, little-endian, C order; offsets count from here, without holes or overlaps

Source: the README of huggingface/safetensors. What the format leaves open is fixed here, so that equal tensors give
equal bytes and a digest means something: names ascend (a companion such as `w.scale` then lies beside its `w`, and both
stream in one pass), the JSON is minimal, its length a multiple of 8. Reading accepts any order, as safetensors' own
writer puts wider types first, but not one byte that no tensor claims. A tensor may thus begin at an odd offset;
safe_open of safetensors 0.4.5 to 0.8 was seen to read such files, for numpy and for torch.

bfloat16 has no numpy type: its bits live in uint16 arrays, converted by `f32_to_bf16` and `bf16_to_f32`.
"""

from __future__ import annotations

import json
import mmap
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NoReturn, cast, get_args

import numpy as np
from numpy.typing import NDArray

from shared.errors import RefusedError

DType = Literal["BOOL", "U8", "I8", "U16", "I16", "F16", "BF16", "U32", "I32", "F32", "U64", "I64", "F64"]
Shape = tuple[int, ...]
F32Array = NDArray[np.float32]

NUMPY_DTYPES: Mapping[DType, np.dtype[Any]] = MappingProxyType(
    {
        "BOOL": np.dtype("?"),
        "U8": np.dtype("u1"),
        "I8": np.dtype("i1"),
        "U16": np.dtype("<u2"),
        "I16": np.dtype("<i2"),
        "F16": np.dtype("<f2"),
        "BF16": np.dtype("<u2"),
        "U32": np.dtype("<u4"),
        "I32": np.dtype("<i4"),
        "F32": np.dtype("<f4"),
        "U64": np.dtype("<u8"),
        "I64": np.dtype("<i8"),
        "F64": np.dtype("<f8"),
    }
)

HEADER_BYTES_MAX = 16 * 1024 * 1024
"""Length of the JSON: 150,000 tensors. The largest public checkpoints have 50,000; the format's own limit is 100 MB."""

RANK_MAX = 8
"""No layer in use has more than 5 dimensions."""

FILE_BYTES_MAX = 1 << 48
"""Bounds each product of a shape long before it could leave 64 bits in another reader."""

_LENGTH = struct.Struct("<Q")
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,256}")
_ENTRY_KEYS = frozenset({"dtype", "shape", "data_offsets"})
_BF16_BLOCK = 1 << 17
"""Elements converted at a time: temporaries stay in the cache."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Where one tensor lies: `begin` and `end` are byte offsets into the data section, `shape` counts elements."""

    name: str
    dtype: DType
    shape: Shape
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """A parsed header: tensors in the order of their bytes, and `size`, the offset of the data section in the file."""

    specs: tuple[TensorSpec, ...]
    metadata: Mapping[str, str]
    size: int

    @property
    def file_size(self) -> int:
        """Bytes of the whole file; the tensors cover the data section exactly."""
        return self.size + (self.specs[-1].end if self.specs else 0)


def tensor_bytes(dtype: DType, shape: Shape) -> int:
    """Bytes of a tensor in memory and in the file."""
    size = NUMPY_DTYPES[dtype].itemsize
    for extent in shape:
        size *= extent
    return size


def build_header(tensors: Sequence[tuple[str, DType, Shape]], metadata: Mapping[str, str]) -> bytes:
    """Return length and header of a file holding `tensors`; their bytes then follow in ascending order of name.

    RefusedError, as from `parse_header`, when a name, type or shape is outside the limits or a name comes twice.
    """
    entries: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    begin = 0
    for name, dtype, shape in sorted(tensors, key=lambda tensor: tensor[0]):
        if name in entries:
            _refuse("header-duplicate", f"two tensors are named {name!r}")
        end = begin + tensor_bytes(dtype, shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = _LENGTH.pack(len(text)) + text
    # Pair assertion: what cannot be read back is found here, not by the receiver.
    parse_header(head, len(head) + begin)
    return head


def header_size(prefix: bytes, file_size: int) -> int:
    """Return the offset of the data section, told from the first 8 bytes of a file of `file_size` bytes.

    RefusedError with rule 'header-truncated' or 'header-size'; a caller may then read that many bytes without fear.
    """
    if len(prefix) < _LENGTH.size:
        _refuse("header-truncated", "the file ends within its first 8 bytes")
    (length,) = _LENGTH.unpack_from(prefix)
    if not 2 <= length <= HEADER_BYTES_MAX:
        _refuse("header-size", f"a header of {length} bytes; 2 to {HEADER_BYTES_MAX} are allowed")
    size = _LENGTH.size + int(length)
    if size > file_size:
        _refuse("header-truncated", f"a header of {length} bytes in a file of {file_size}")
    return size


def parse_header(head: bytes, file_size: int) -> Header:
    """Parse and check the header of a file of `file_size` bytes; `head` holds at least the length and the header.

    RefusedError names the broken rule: header-truncated, header-size, header-json, header-duplicate, header-metadata,
    tensor-name, tensor-entry, tensor-dtype, tensor-shape, tensor-offsets, tensor-size, tensor-overlap, tensor-hole,
    file-size.
    """
    size = header_size(head, file_size)
    if len(head) < size:
        _refuse("header-truncated", f"{len(head)} bytes at hand of a header of {size}")
    entries = _load_json(head[_LENGTH.size : size])
    metadata = _parse_metadata(entries.pop("__metadata__", {}))
    specs = sorted(
        (_parse_entry(name, entry) for name, entry in entries.items()),
        key=lambda spec: (spec.begin, spec.end, spec.name),
    )
    position = 0
    for spec in specs:
        if spec.begin < position:
            _refuse("tensor-overlap", f"tensor {spec.name} begins within the one before it")
        if spec.begin > position:
            _refuse("tensor-hole", f"{spec.begin - position} bytes before tensor {spec.name} belong to none")
        position = spec.end
    if size + position != file_size:
        _refuse("file-size", f"header and tensors make {size + position} bytes, the file has {file_size}")
    return Header(tuple(specs), MappingProxyType(metadata), size)


def map_file(path: Path) -> tuple[Header, NDArray[np.uint8]]:
    """Return a file's header and its data section, mapped: memory is what is looked at, for as long as it is needed.

    RefusedError as `header_size` and `parse_header`; OSError when it cannot be opened. For files that nobody changes.
    """
    size = path.stat().st_size
    data = np.memmap(path, np.uint8, "r") if size else np.empty(0, np.uint8)
    begin = header_size(data[:8].tobytes(), size)
    return parse_header(data[:begin].tobytes(), size), data[begin:]


def let_go(data: NDArray[np.uint8]) -> None:
    """Take the pages of a file's `map_file` out of this process's memory; whatever is looked at again comes back."""
    owner: object = data
    while isinstance(owner, np.ndarray):
        owner = owner.base
    if isinstance(owner, mmap.mmap):  # an empty file has none
        owner.madvise(mmap.MADV_DONTNEED)


def map_tensors(path: Path) -> dict[str, F32Array]:
    """Return the tensors of a file of float32 ones, read-only and mapped, in file order; errors as `map_file`.

    RefusedError(rule='wrong-dtype') when one is of another type.
    """
    header, data = map_file(path)
    for spec in header.specs:
        if spec.dtype != "F32":
            _refuse("wrong-dtype", f"tensor {spec.name} is {spec.dtype}, not F32")
    return {spec.name: data[spec.begin : spec.end].view("<f4").reshape(spec.shape) for spec in header.specs}


def _load_json(text: bytes) -> dict[str, Any]:
    if not text.startswith(b"{"):
        _refuse("header-json", "the header does not begin with a brace")
    try:
        value = json.loads(text.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        # A ValueError is bad UTF-8, bad JSON, or an integer of more digits than Python converts.
        raise RefusedError("the header is not valid JSON", rule="header-json") from None
    return cast("dict[str, Any]", value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        _refuse("header-duplicate", "a key comes twice in the header")
    return value


def _no_constant(_name: str) -> NoReturn:
    _refuse("header-json", "the header holds NaN or Infinity")


def _parse_metadata(value: object) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        _refuse("header-metadata", "__metadata__ is not a map of strings to strings")
    return value


def _parse_entry(name: str, entry: object) -> TensorSpec:
    if not _NAME.fullmatch(name):
        # The name is a peer's choice and may be anything: it is not repeated.
        _refuse("tensor-name", "a tensor's name is empty, longer than 256, or has other characters than A-Za-z0-9_.-")
    if not isinstance(entry, dict) or entry.keys() != _ENTRY_KEYS:
        _refuse("tensor-entry", f"tensor {name} is not described by exactly dtype, shape and data_offsets")
    dtype = entry["dtype"]
    if not isinstance(dtype, str) or dtype not in get_args(DType):
        _refuse("tensor-dtype", f"tensor {name} has an unknown dtype")
    shape = _parse_shape(name, entry["shape"])
    match entry["data_offsets"]:
        case [begin, end] if type(begin) is int and type(end) is int and 0 <= begin <= end <= FILE_BYTES_MAX:
            pass
        case _:
            _refuse("tensor-offsets", f"tensor {name} has data_offsets that are not an ascending pair")
    spec = TensorSpec(name, cast("DType", dtype), shape, begin, end)
    if tensor_bytes(spec.dtype, shape) != end - begin:
        _refuse("tensor-size", f"tensor {name} has data_offsets that do not fit its dtype and shape")
    return spec


def _parse_shape(name: str, value: object) -> Shape:
    if not isinstance(value, list) or len(value) > RANK_MAX:
        _refuse("tensor-shape", f"tensor {name} has no shape of at most {RANK_MAX} dimensions")
    # A zero may stand beside huge extents, so extents are bounded one by one as well as their product.
    product = 1
    for extent in value:
        if type(extent) is not int or not 0 <= extent <= FILE_BYTES_MAX:
            _refuse("tensor-shape", f"tensor {name} has a dimension that is not a count")
        product *= extent
        if product > FILE_BYTES_MAX:
            _refuse("tensor-shape", f"tensor {name} has a shape of too many elements")
    return tuple(value)


def _refuse(rule: str, message: str) -> NoReturn:
    raise RefusedError(
        message, rule=rule, hint="the file was not written by this release, or was changed; send it again"
    )


# -- bfloat16 ---


def f32_to_bf16(values: F32Array) -> NDArray[np.uint16]:
    """Round float32 to bfloat16 bits, to nearest and ties to even; same shape.

    NaN stays NaN (made quiet, sign and upper payload kept); magnitudes from 2^127 x (2 - 2^-8) on become infinite, as
    IEEE 754 asks. Error of a finite result: at most 2^-8 of the value, half a unit in the last of 8 significant bits.
    """
    flat = np.ascontiguousarray(values, dtype="<f4").reshape(-1)
    out = np.empty(flat.size, dtype="<u2")
    scratch = np.empty(min(flat.size, _BF16_BLOCK), dtype=np.uint32)
    for start in range(0, flat.size, _BF16_BLOCK):
        bits = flat[start : start + _BF16_BLOCK].view("<u4")
        work = scratch[: bits.size]
        np.right_shift(bits, 16, out=work)
        np.bitwise_and(work, 1, out=work)
        np.add(work, 0x7FFF, out=work)
        np.add(work, bits, out=work)
        np.right_shift(work, 16, out=work)
        block = out[start : start + bits.size]
        block[...] = work
        # max() hands on a NaN, and is the quickest way to learn that there is none.
        if np.isnan(flat[start : start + bits.size].max()):
            nan = np.isnan(flat[start : start + bits.size])
            block[nan] = (bits[nan] >> 16) | 0x40
    return out.reshape(np.shape(values))


def bf16_to_f32(bits: NDArray[np.uint16], out: F32Array | None = None) -> F32Array:
    """Widen bfloat16 bits (uint16) to float32, exactly; same shape. Written to `out` where one is given."""
    wide: F32Array = np.empty(np.shape(bits), dtype="<f4") if out is None else out
    np.left_shift(bits, 16, out=wide.view("<u4"), dtype="<u4", casting="unsafe")
    return wide
