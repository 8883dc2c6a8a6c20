"""How a float32 tensor becomes stored tensors, and back.

A codec turns one named tensor into one or more *parts*, each an ordinary tensor of the safetensors file:

    f32    `w` F32                                    exact
    bf16   `w` BF16                                   |error| <= 2^-8 |x|
    int8   `w` I8, `w.scale` F32, one per 256 values  |error| <= 0.502 x (largest magnitude of the block) / 127

The parts' names, types and shapes follow from the tensor's name and shape alone, so a receiver that knows the plan
knows the one header that it will accept, and a sender can write the header before it has encoded anything. A codec is a
row of functions in `_SCHEMES`; one with more companions (packed nibbles, indices) is one more row.

All work is done in blocks that fit the cache. Each element goes through the same float32 operations in the same order
on every machine, so that a merge replayed elsewhere gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from shared.config import CodecName
from shared.errors import RefusedError
from shared.tensorfile import (
    NUMPY_DTYPES,
    DType,
    F32Array,
    Header,
    Shape,
    bf16_to_f32,
    build_header,
    f32_to_bf16,
    tensor_bytes,
)

Codec = CodecName
Group = Literal[1, 2, 4]
"""Bytes of one element, by which a slice is grouped."""

PartSpec = tuple[str, DType, Shape]
Part = tuple[str, DType, NDArray[Any]]

INT8_BLOCK = 256
"""Values that share a scale: 1.6 % more bytes, and one outlier spoils few neighbours."""

MAGNITUDE_MAX = np.float32(2.0**127)
"""Larger input is refused like infinity: no codec's rounding can then overflow. Sound weights stay under 2^20."""

INT8_FLUSH = np.float32(2.0**-100)
"""A block of only smaller magnitudes becomes zero: neither its scale nor its inverse then leaves the normal range."""

_SCALE_MAX = np.float32(MAGNITUDE_MAX / 127)
SPAN = 1 << 17
"""Elements worked on at a time: a 512 KiB temporary stays in the second-level cache. A multiple of INT8_BLOCK."""


@dataclass(frozen=True, slots=True)
class _Scheme:
    """One codec. Arrays are flat, in the order of `layout`, which gives the part of the tensor's own name first.

    `add(parts, weight, out)` adds weight x decoded to `out`, or, with weight None, writes decoded to it.
    """

    group: Group
    layout: Callable[[str, Shape], list[PartSpec]]
    encode: Callable[[F32Array], list[NDArray[Any]]]
    add: Callable[[Sequence[NDArray[Any]], np.float32 | None, F32Array], None]


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
    (_, primary, _), *_ = part_specs("", (), codec)
    shapes = {spec.name: spec.shape for spec in header.specs if spec.dtype == primary}
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
    except _NotFiniteError:
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

    The weight is rounded to float32 first. No temporary is larger than 512 KiB. RefusedError with rule 'codec-parts'
    when the parts do not fit the shape, 'codec-scale' when a scale is not a finite number from 0 to 2^127 / 127.
    """
    assert accumulator.flags.c_contiguous, "reshape would copy, and the sum be lost"
    checked = _checked(parts, codec, accumulator.shape)
    _SCHEMES[codec].add(checked, np.float32(weight), accumulator.reshape(-1))


def encode_file(tensors: Mapping[str, F32Array], codec: Codec, metadata: Mapping[str, str]) -> Iterator[memoryview]:
    """Yield the bytes of the safetensors file that holds `tensors`, one part in memory at a time.

    RefusedError as `encode` and `build_header` (such as two parts of one name).
    """
    shapes = {name: np.shape(values) for name, values in tensors.items()}
    return write_file(shapes, codec, metadata, lambda name: encode(name, tensors[name], codec))


def write_file(
    shapes: Mapping[str, Shape], codec: Codec, metadata: Mapping[str, str], encoded: Callable[[str], list[Part]]
) -> Iterator[memoryview]:
    """Yield the bytes of the safetensors file that holds tensors of these shapes, one part in memory at a time.

    `encoded(name)` returns the parts of one tensor as `encode` does; it is called once for each, in order of names.
    RefusedError as `encoded` and `build_header` (such as two parts of one name).
    """
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


# -- the schemes ---


class _NotFiniteError(Exception):
    """Input that no codec takes; `encode` knows the tensor's name and says it."""


def _checked(parts: Sequence[NDArray[Any]], codec: Codec, shape: Shape) -> list[NDArray[Any]]:
    specs = part_specs("", shape, codec)
    fits = len(parts) == len(specs) and all(
        array.dtype == NUMPY_DTYPES[dtype] and array.shape == extent
        for array, (_, dtype, extent) in zip(parts, specs, strict=True)
    )
    if not fits:
        raise RefusedError(f"stored tensors do not fit the shape {shape} and codec {codec}", rule="codec-parts")
    return [np.ascontiguousarray(array).reshape(-1) for array in parts]


def _spans(size: int) -> Iterator[slice]:
    return (slice(start, min(start + SPAN, size)) for start in range(0, size, SPAN))


def _check_finite(flat: F32Array) -> None:
    scratch = np.empty(min(flat.size, SPAN), dtype=np.float32)
    for span in _spans(flat.size):
        values = flat[span]
        # max() hands on a NaN, and a NaN is not below anything.
        if not np.abs(values, out=scratch[: values.size]).max() < MAGNITUDE_MAX:
            raise _NotFiniteError


def _f32_encode(flat: F32Array) -> list[NDArray[Any]]:
    _check_finite(flat)
    return [flat]


def _f32_add(parts: Sequence[NDArray[Any]], weight: np.float32 | None, out: F32Array) -> None:
    (values,) = parts
    if weight is None:
        out[...] = values
        return
    scratch = np.empty(min(out.size, SPAN), dtype=np.float32)
    for span in _spans(out.size):
        product = np.multiply(values[span], weight, out=scratch[: span.stop - span.start])
        np.add(out[span], product, out=out[span])


def _bf16_encode(flat: F32Array) -> list[NDArray[Any]]:
    _check_finite(flat)
    return [f32_to_bf16(flat)]


def _bf16_add(parts: Sequence[NDArray[Any]], weight: np.float32 | None, out: F32Array) -> None:
    (bits,) = parts
    scratch = np.empty(min(out.size, SPAN), dtype=np.float32)
    for span in _spans(out.size):
        into = out[span] if weight is None else scratch[: span.stop - span.start]
        bf16_to_f32(bits[span], out=into)
        if weight is not None:
            np.add(out[span], np.multiply(into, weight, out=into), out=out[span])


def _int8_layout(name: str, shape: Shape) -> list[PartSpec]:
    count = 1
    for extent in shape:
        count *= extent
    return [(name, "I8", shape), (f"{name}.scale", "F32", (-(-count // INT8_BLOCK),))]


def _int8_spans(size: int) -> Iterator[tuple[slice, slice, int]]:
    """Spans of whole blocks, then the short last block: (elements, their scales, values a block)."""
    whole = size - size % INT8_BLOCK
    for span in _spans(whole):
        yield span, slice(span.start // INT8_BLOCK, span.stop // INT8_BLOCK), INT8_BLOCK
    if whole < size:
        yield slice(whole, size), slice(whole // INT8_BLOCK, whole // INT8_BLOCK + 1), size - whole


def _int8_encode(flat: F32Array) -> list[NDArray[Any]]:
    """Symmetric linear quantisation by blocks: scale = max|x| / 127, q = round-to-even(x / scale).

    Scaling by blocks as in Dettmers et al., 8-bit Optimizers via Block-wise Quantization (arXiv 2110.02861), with
    linear instead of dynamic levels. Rounding q costs half a scale, the float32 roundings of scale and quotient under
    2^-14 of one; hence |error| <= 0.502 scale. Blocks whose magnitudes are all under INT8_FLUSH become zero.
    """
    levels = np.empty(flat.size, dtype="i1")
    scales = np.empty(-(-flat.size // INT8_BLOCK), dtype="<f4")
    scratch = np.empty(min(flat.size, SPAN), dtype=np.float32)
    for elements, blocks, width in _int8_spans(flat.size):
        values = flat[elements].reshape(-1, width)
        quotient = scratch[: values.size].reshape(values.shape)
        top = np.maximum(values.max(axis=1), -values.min(axis=1))
        if not (top < MAGNITUDE_MAX).all():
            raise _NotFiniteError
        top[top < INT8_FLUSH] = 0
        inverse = np.divide(np.float32(127), top, out=np.zeros_like(top), where=top > 0)
        np.rint(np.multiply(values, inverse[:, None], out=quotient), out=quotient)
        levels[elements] = quotient.reshape(-1)
        scales[blocks] = top / np.float32(127)
    return [levels, scales]


def _int8_add(parts: Sequence[NDArray[Any]], weight: np.float32 | None, out: F32Array) -> None:
    levels, scales = parts
    # Written so that a NaN fails it.
    if not ((scales >= 0) & (scales <= _SCALE_MAX)).all():
        raise RefusedError("a scale is negative, NaN or out of range", rule="codec-scale")
    factors = scales if weight is None else scales * weight
    scratch = np.empty(min(out.size, SPAN), dtype=np.float32)
    for elements, blocks, width in _int8_spans(out.size):
        into = out[elements] if weight is None else scratch[: elements.stop - elements.start]
        into[...] = levels[elements]
        rows = into.reshape(-1, width)
        np.multiply(rows, factors[blocks, None], out=rows)
        if weight is not None:
            np.add(out[elements], into, out=out[elements])


def _plain_layout(dtype: DType) -> Callable[[str, Shape], list[PartSpec]]:
    def layout(name: str, shape: Shape) -> list[PartSpec]:
        return [(name, dtype, shape)]

    return layout


_SCHEMES: Mapping[Codec, _Scheme] = MappingProxyType(
    {
        "f32": _Scheme(group=4, layout=_plain_layout("F32"), encode=_f32_encode, add=_f32_add),
        "bf16": _Scheme(group=2, layout=_plain_layout("BF16"), encode=_bf16_encode, add=_bf16_add),
        "int8": _Scheme(group=1, layout=_int8_layout, encode=_int8_encode, add=_int8_add),
    }
)
