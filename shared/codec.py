"""How a float32 tensor becomes stored tensors, and back.

A codec turns one named tensor into one or more *parts*, each an ordinary tensor of the safetensors file:

    f32    `w` F32                                    exact
    bf16   `w` BF16                                   |error| <= 2^-8 |x|
    int8   `w` I8, `w.scale` BF16, one per 256 values |error| <= 0.502 x (largest magnitude of the block) / 127
    int4   `w` F32, empty, `w.packed` U8, 2 values    |error| <= 0.502 x (largest magnitude of the block) / 7
           a byte, `w.scale` BF16, one per 128 values
    ternary  `w` F32, empty, `w.trit` U8, 4 values   |error| <= 1.004 x (largest magnitude of 512 values);
           a byte, `w.scale` BF16, one per 512       of 16 values five are sent, at one level
           values
    topk2  `w` F32, empty, `w.gap`, `w.leap`,         |error| <= 1.004 x (largest magnitude of 4096 values);
           `w.value` U8, `w.scale` BF16, two per      of 64 values one is sent, the others become zero
           4096 values
    topk2x4  the same                                 the same; of 16 values one is sent

The parts' names, types and shapes follow from the tensor's name and shape alone, so a receiver that knows the plan
knows the one header that it will accept, and a sender can write the header before it has encoded anything. Where values
are packed, the tensor's own name is an empty tensor of shape (0, ...shape), from which its shape can be read back.

A codec is a scheme (`shared/schemes/`) under a name, a row of functions in `_SCHEMES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.config import CodecName
from shared.errors import RefusedError
from shared.schemes import blocks, plain, scheme, sparse, ternary
from shared.schemes.scheme import Scheme
from shared.tensorfile import NUMPY_DTYPES, DType, F32Array, Header, Shape, build_header, tensor_bytes

Codec = CodecName
Group = scheme.Group
PartSpec = scheme.PartSpec
Part = tuple[str, DType, NDArray[Any]]

SPAN = scheme.SPAN
"""Elements worked on at a time; where one begins, a block of every codec does."""

_SCHEMES: Mapping[Codec, Scheme] = MappingProxyType(
    {
        "f32": plain.F32,
        "bf16": plain.BF16,
        "int8": blocks.INT8,
        "int4": blocks.INT4,
        "ternary": ternary.TERNARY,
        "topk2": sparse.TOPK2,
        "topk2x4": sparse.TOPK2X4,
    }
)


def group_size(codec: Codec) -> Group:
    """Width in bytes by which slices of this codec are byte-grouped before zstd: the size of its values."""
    return _SCHEMES[codec].group


def codec_named(name: str) -> Codec:
    """Return the codec of that name; RefusedError(rule='unknown-codec') when this release has none."""
    for codec in _SCHEMES:
        if codec == name:
            return codec
    raise RefusedError(
        f"the codec {name!r} is unknown to this release",
        rule="unknown-codec",
        hint="update this side of the federation",
    )


def part_specs(name: str, shape: Shape, codec: Codec) -> list[PartSpec]:
    """Names, types and shapes of the parts that a tensor becomes; the first carries the tensor's own name."""
    return _SCHEMES[codec].layout(name, shape)


def data_bytes(shapes: Mapping[str, Shape], codec: Codec) -> int:
    """Bytes that tensors of these shapes take in a file of this codec, its header not counted."""
    specs = (spec for tensor in shapes.items() for spec in part_specs(*tensor, codec))
    return sum(tensor_bytes(dtype, shape) for _, dtype, shape in specs)


def tensor_shapes(header: Header, codec: Codec) -> dict[str, Shape]:
    """Name and shape of each tensor that a file of this codec encodes, companions not counted, in file order.

    RefusedError(rule='codec-parts') unless the header holds exactly the parts of those tensors.
    """
    stored = {spec.name: (spec.dtype, spec.shape) for spec in header.specs}
    # No companion has the type of the part that bears the name, whose shape may begin with an empty dimension.
    (_, primary, ahead), *_ = part_specs("", (), codec)
    shapes = {spec.name: spec.shape[len(ahead) :] for spec in header.specs if spec.dtype == primary}
    expected = {name: (dtype, shape) for tensor in shapes.items() for name, dtype, shape in part_specs(*tensor, codec)}
    if expected != stored:
        raise RefusedError(f"the file's tensors are not those that codec {codec} writes", rule="codec-parts")
    return shapes


def encode(name: str, values: F32Array, codec: Codec) -> list[Part]:
    """Encode one float32 tensor of any shape; the error bounds are in the module's docstring.

    RefusedError(rule='non-finite') on NaN, infinity or magnitudes from 2^127 on.
    """
    flat = np.ascontiguousarray(values, dtype="<f4").reshape(-1)
    try:
        arrays = _SCHEMES[codec].encode(flat)
    except scheme.NotFiniteError:
        raise RefusedError(
            f"tensor {name} holds NaN, infinity or values from 2^127 on",
            rule="non-finite",
            hint="training diverged: lower the learning rate or clip gradients",
        ) from None
    specs = part_specs(name, np.shape(values), codec)
    return [(part, dtype, array.reshape(shape)) for (part, dtype, shape), array in zip(specs, arrays, strict=True)]


def decode_tensor(parts: Sequence[NDArray[Any]], codec: Codec, shape: Shape) -> F32Array:
    """Decode the parts of one tensor (arrays in the order of `part_specs`) to float32 of the given shape.

    RefusedError as `decode_add`. The result may hold what a sender put there: NaN and infinity are for the caller.
    """
    out: F32Array = np.empty(shape, dtype=np.float32)
    _SCHEMES[codec].add(_checked(parts, codec, shape), None, out.reshape(-1))
    return out


def decode_add(parts: Sequence[NDArray[Any]], codec: Codec, weight: float, accumulator: F32Array) -> None:
    """Add weight x the decoded tensor to a contiguous float32 accumulator of the tensor's shape, in place.

    The weight is rounded to float32 first. Temporaries: the scales, and some pieces of 512 KiB. RefusedError with rule
    'codec-parts' when the parts do not fit the shape, 'codec-scale' when a scale is not a finite number from 0 to what
    2^127 asks for, 'codec-index' when gaps lead out of their chunk, 'codec-padding' when bits that hold no
    value are not zero; the accumulator is then as it was.
    """
    assert accumulator.flags.c_contiguous, "reshape would copy, and the sum be lost"
    checked = _checked(parts, codec, accumulator.shape)
    _SCHEMES[codec].add(checked, np.float32(weight), accumulator.reshape(-1))


def encode_file(tensors: Mapping[str, F32Array], codec: Codec, metadata: Mapping[str, str]) -> Iterator[memoryview]:
    """Yield the bytes of the safetensors file that holds `tensors`, one encoded tensor in memory at a time.

    RefusedError as `encode` and `build_header` (such as two parts of one name).
    """
    shapes = {name: np.shape(values) for name, values in tensors.items()}
    return encode_each(shapes, tensors.__getitem__, codec, metadata)


def encode_each(
    shapes: Mapping[str, Shape], read: Callable[[str], F32Array], codec: Codec, metadata: Mapping[str, str]
) -> Iterator[memoryview]:
    """As `encode_file`, of tensors that `read(name)` makes when their turn has come, once each."""
    return write_file(shapes, lambda name: encode(name, read(name), codec), codec, metadata)


def write_file(
    shapes: Mapping[str, Shape], encoded: Callable[[str], list[Part]], codec: Codec, metadata: Mapping[str, str]
) -> Iterator[memoryview]:
    """As `encode_each`, of tensors that `encoded(name)` makes and encodes; names ascend."""
    specs: list[PartSpec] = []
    owner: dict[str, str] = {}
    for name, shape in shapes.items():
        parts = part_specs(name, shape, codec)
        specs += parts
        owner.update((part, name) for part, _, _ in parts)
    head = build_header(specs, metadata)
    yield memoryview(head)
    waiting: dict[str, NDArray[Any]] = {}
    # A companion normally follows at once; it waits longer only where some `w-x` sorts between `w` and `w.scale`.
    for stored in sorted(owner):
        if stored not in waiting:
            waiting.update((part, array) for part, _, array in encoded(owner[stored]))
        yield waiting.pop(stored).reshape(-1).view(np.uint8).data


def _checked(parts: Sequence[NDArray[Any]], codec: Codec, shape: Shape) -> list[NDArray[Any]]:
    specs = part_specs("", shape, codec)
    fits = len(parts) == len(specs) and all(
        array.dtype == NUMPY_DTYPES[dtype] and array.shape == extent
        for array, (_, dtype, extent) in zip(parts, specs, strict=True)
    )
    if not fits:
        raise RefusedError(f"stored tensors do not fit the shape {shape} and codec {codec}", rule="codec-parts")
    return [np.ascontiguousarray(array).reshape(-1) for array in parts]
