"""int8 and int4: symmetric linear quantisation, one scale for each block of the flattened tensor.

Scaling by blocks as in Dettmers et al., 8-bit Optimizers via Block-wise Quantization (arXiv 2110.02861), with linear
instead of dynamic levels:

    scale = max|x| / m    q = round-to-even(x / scale)    m = 127 or 7

Blocks whose magnitudes are all under FLUSH become zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.errors import RefusedError
from shared.schemes.scheme import (
    MAGNITUDE_MAX,
    SPAN,
    Arrays,
    NotFiniteError,
    PartSpec,
    Scheme,
    blocks_of,
    empty_part,
    shape_part,
    spans,
)
from shared.tensorfile import F32Array, Shape, bf16_to_f32, f32_to_bf16

INT8_BLOCK = 256
"""Values that share a scale: 1.6 % more bytes, and one outlier spoils few neighbours."""

INT4_BLOCK = 128
"""Values that share a scale of two bytes. Of deltas after AdamW steps 11.1 % of the float32 bytes travel, with a
relative error of 0.11; blocks of 64 would cost 11.6 % for 0.10, blocks of 256 10.6 % for 0.12."""

FLUSH = np.float32(2.0**-100)
"""A block of only smaller magnitudes becomes zero: neither its scale nor its inverse then leaves the normal range."""

_INT8_SCALE_MAX = np.float32(MAGNITUDE_MAX / 127)
_INT4_SCALE_MAX = np.float32(2.0**124.2)
"""Just above 2^127 / 7 as bfloat16 rounds it; eight times as much is finite."""


def _block_spans(size: int, block: int) -> Iterator[tuple[slice, slice, int]]:
    """Spans of whole blocks, then the short last block: (elements, their scales, values a block)."""
    whole = size - size % block
    for span in spans(whole):
        yield span, slice(span.start // block, span.stop // block), block
    if whole < size:
        yield slice(whole, size), slice(whole // block, whole // block + 1), size - whole


def _magnitudes(values: F32Array) -> F32Array:
    """The largest magnitude of each row, 0 where it is under FLUSH."""
    top: F32Array = np.maximum(values.max(axis=1), -values.min(axis=1))
    # Written so that a NaN fails it.
    if not (top < MAGNITUDE_MAX).all():
        raise NotFiniteError
    top[top < FLUSH] = 0
    return top


def _inverse(of: np.float32, values: F32Array) -> F32Array:
    """The quotients of / values, 0 where a value is 0."""
    return np.divide(of, values, out=np.zeros_like(values), where=values > 0)


def _quotients(
    flat: F32Array, block: int, take: Callable[[F32Array, slice], F32Array]
) -> Iterator[tuple[slice, F32Array]]:
    """Yield spans and their x / scale, rounded; `take` is given the largest magnitudes of some blocks, and inverts."""
    scratch = np.empty(min(flat.size, SPAN), dtype=np.float32)
    for elements, blocks, width in _block_spans(flat.size, block):
        values = flat[elements].reshape(-1, width)
        quotient = scratch[: values.size].reshape(values.shape)
        inverse = take(_magnitudes(values), blocks)
        np.rint(np.multiply(values, inverse[:, None], out=quotient), out=quotient)
        yield elements, quotient.reshape(-1)


def _add_levels(
    levels_of: Callable[[slice], NDArray[np.int8]],
    scales: F32Array,
    block: int,
    weight: np.float32 | None,
    out: F32Array,
) -> None:
    factors = scales if weight is None else scales * weight
    scratch = np.empty(min(out.size, SPAN), dtype=np.float32)
    for elements, blocks, width in _block_spans(out.size, block):
        into = out[elements] if weight is None else scratch[: elements.stop - elements.start]
        into[...] = levels_of(elements)
        rows = into.reshape(-1, width)
        np.multiply(rows, factors[blocks, None], out=rows)
        if weight is not None:
            np.add(out[elements], into, out=out[elements])


def _check_scales(scales: F32Array, largest: np.float32) -> None:
    # Written so that a NaN fails it.
    if not ((scales >= 0) & (scales <= largest)).all():
        raise RefusedError("a scale is negative, NaN or out of range", rule="codec-scale")


# -- int8 ---


def _int8_layout(name: str, shape: Shape) -> list[PartSpec]:
    return [(name, "I8", shape), (f"{name}.scale", "F32", (blocks_of(shape, INT8_BLOCK),))]


def _int8_encode(flat: F32Array) -> list[NDArray[Any]]:
    """Levels -127 to 127, and scales as float32.

    Rounding q costs half a scale, the float32 roundings of scale and quotient under 2^-14 of one; hence
    |error| <= 0.502 scale.
    """
    levels = np.empty(flat.size, dtype="i1")
    scales = np.empty(blocks_of(flat.shape, INT8_BLOCK), dtype="<f4")

    def take(top: F32Array, blocks: slice) -> F32Array:
        scales[blocks] = top / np.float32(127)
        return _inverse(np.float32(127), top)

    for elements, quotient in _quotients(flat, INT8_BLOCK, take):
        levels[elements] = quotient
    return [levels, scales]


def _int8_add(parts: Arrays, weight: np.float32 | None, out: F32Array) -> None:
    levels, scales = parts
    _check_scales(scales, _INT8_SCALE_MAX)
    _add_levels(lambda elements: levels[elements], scales, INT8_BLOCK, weight, out)


INT8 = Scheme(group=1, layout=_int8_layout, encode=_int8_encode, add=_int8_add)


# -- int4 ---


def _int4_layout(name: str, shape: Shape) -> list[PartSpec]:
    return [
        shape_part(name, shape),
        (f"{name}.packed", "U8", (blocks_of(shape, 2),)),
        (f"{name}.scale", "BF16", (blocks_of(shape, INT4_BLOCK),)),
    ]


def _int4_encode(flat: F32Array) -> list[NDArray[Any]]:
    """Levels -7 to 7, two in a byte, the first in its lower half (two's complement), and scales as bfloat16.

    A scale may be rounded down by 2^-8 of it, so that x / scale comes to 7.03 at most, which still rounds to 7.
    Rounding q costs half a scale as it is stored, the float32 roundings under 2^-18 of one; hence
    |error| <= 0.503 max|x| / 7.
    """
    packed = np.empty(blocks_of(flat.shape, 2), dtype="u1")
    scales = np.empty(blocks_of(flat.shape, INT4_BLOCK), dtype="<u2")
    levels = np.empty(min(flat.size + flat.size % 2, SPAN), dtype="i1")

    def take(top: F32Array, blocks: slice) -> F32Array:
        scales[blocks] = f32_to_bf16(top / np.float32(7))
        return _inverse(np.float32(1), bf16_to_f32(scales[blocks]))

    for elements, quotient in _quotients(flat, INT4_BLOCK, take):
        padded = levels[: quotient.size + quotient.size % 2]
        padded[-1] = 0
        padded[: quotient.size] = quotient
        packed[_bytes(elements)] = _pack(padded)
    return [empty_part(), packed, scales]


def _int4_add(parts: Arrays, weight: np.float32 | None, out: F32Array) -> None:
    _, packed, stored = parts
    scales = bf16_to_f32(stored)
    _check_scales(scales, _INT4_SCALE_MAX)
    if out.size % 2 and packed[-1] >> 4:
        raise RefusedError("the half byte behind the last value is not zero", rule="codec-padding")
    levels = np.empty(min(out.size + out.size % 2, SPAN), dtype="i1")

    def levels_of(elements: slice) -> NDArray[np.int8]:
        found = packed[_bytes(elements)]
        _unpack(found, levels[: 2 * found.size])
        return levels[: elements.stop - elements.start]

    _add_levels(levels_of, scales, INT4_BLOCK, weight, out)


def _bytes(elements: slice) -> slice:
    """Where the nibbles of a span lie; every span but the last begins and ends with a block, and so with a byte."""
    return slice(elements.start // 2, -(-elements.stop // 2))


def _pack(levels: NDArray[np.int8]) -> NDArray[np.uint8]:
    pairs: NDArray[np.uint16] = levels.view("<u2")
    upper = np.right_shift(pairs, 4)
    np.bitwise_and(upper, 0xF0, out=upper)
    np.bitwise_or(upper, pairs & 0x0F, out=upper)
    return upper.astype(np.uint8)


def _unpack(packed: NDArray[np.uint8], levels: NDArray[np.int8]) -> None:
    """Write two levels for each byte."""
    pairs = levels.view("<u2")
    np.left_shift(packed, 4, out=pairs, dtype="<u2")
    np.bitwise_or(pairs, packed, out=pairs)
    np.bitwise_and(pairs, 0x0F0F, out=pairs)
    # Two nibbles, each in the lower half of its byte: extend their signs.
    np.bitwise_xor(pairs, 0x0808, out=pairs)
    np.subtract(levels, 8, out=levels)


INT4 = Scheme(group=1, layout=_int4_layout, encode=_int4_encode, add=_int4_add)
