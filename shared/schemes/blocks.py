"""int8 and int4: symmetric linear quantisation, one scale for each block of the flattened tensor.

Scaling by blocks as in Dettmers et al., 8-bit Optimizers via Block-wise Quantization (arXiv 2110.02861), with linear
instead of dynamic levels:

    scale = max|x| / m, as bfloat16    q = round-to-even(x / scale)    m = 127 or 7

The scale's rounding may take 2^-8 of it, so x / scale comes to 127.497 or 7.03 at most, which is level m still.
Rounding q costs half a scale, which is at most 1 + 2^-8 times max|x| / m, and the float32 roundings of inverse and
quotient under 2^-14 of one; hence |error| <= 0.502 max|x| / m. Blocks of magnitudes under FLUSH become zero.
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
"""Values that share a scale of two bytes: 0.8 % more bytes, and one outlier spoils few neighbours."""

INT4_BLOCK = 128
"""Of deltas after AdamW steps 11.1 to 11.4 % of the float32 bytes travel, with a relative error of 0.11; blocks of 64
would cost half a per cent more for 0.10, blocks of 256 half a per cent less for 0.12."""

FLUSH = np.float32(2.0**-100)
"""A block of only smaller magnitudes becomes zero: neither its scale nor its inverse then leaves the normal range."""

Levels = NDArray[np.int8]


def block_spans(size: int, block: int) -> Iterator[tuple[slice, slice, int]]:
    """Spans of whole blocks, then the short last block: (elements, their scales, values a block)."""
    whole = size - size % block
    for span in spans(whole):
        yield span, slice(span.start // block, span.stop // block), block
    if whole < size:
        yield slice(whole, size), slice(whole // block, whole // block + 1), size - whole


def _quantise(flat: F32Array, most: int, block: int) -> tuple[Levels, NDArray[np.uint16]]:
    """Levels from -most to most, and a scale for each block, as bfloat16 bits."""
    levels = np.empty(flat.size, dtype="i1")
    scales = np.empty(blocks_of(flat.shape, block), dtype="<u2")
    scratch = np.empty(min(flat.size, SPAN), dtype=np.float32)
    for elements, blocks, width in block_spans(flat.size, block):
        values = flat[elements].reshape(-1, width)
        quotient = scratch[: values.size].reshape(values.shape)
        top = np.maximum(values.max(axis=1), -values.min(axis=1))
        # Written so that a NaN fails it.
        if not (top < MAGNITUDE_MAX).all():
            raise NotFiniteError
        top[top < FLUSH] = 0
        scales[blocks] = f32_to_bf16(top / np.float32(most))
        scale = bf16_to_f32(scales[blocks])
        inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
        np.rint(np.multiply(values, inverse[:, None], out=quotient), out=quotient)
        levels[elements] = quotient.reshape(-1)
    return levels, scales


def add_levels(
    levels_of: Callable[[slice], Levels],
    stored: NDArray[np.uint16],
    most: int,
    block: int,
    weight: np.float32 | None,
    out: F32Array,
) -> None:
    """As `Scheme.add`; `levels_of(span)` are the levels of a span, which begins with a block."""
    scales = _sound(stored, most)
    factors = scales if weight is None else scales * weight
    scratch = np.empty(min(out.size, SPAN), dtype=np.float32)
    for elements, blocks, width in block_spans(out.size, block):
        into = out[elements] if weight is None else scratch[: elements.stop - elements.start]
        into[...] = levels_of(elements)
        rows = into.reshape(-1, width)
        np.multiply(rows, factors[blocks, None], out=rows)
        if weight is not None:
            np.add(out[elements], into, out=out[elements])


def _sound(stored: NDArray[np.uint16], most: int) -> F32Array:
    """The scales as float32; what an encoder writes, of the largest input too, and times most + 1 still finite."""
    scales = bf16_to_f32(stored)
    if not ((scales >= 0) & (scales <= np.float32(1.01 * MAGNITUDE_MAX / most))).all():
        raise RefusedError("a scale is negative, NaN or out of range", rule="codec-scale")
    return scales


# -- int8 ---


def _int8_layout(name: str, shape: Shape) -> list[PartSpec]:
    return [(name, "I8", shape), (f"{name}.scale", "BF16", (blocks_of(shape, INT8_BLOCK),))]


def _int8_encode(flat: F32Array) -> list[NDArray[Any]]:
    return [*_quantise(flat, 127, INT8_BLOCK)]


def _int8_add(parts: Arrays, weight: np.float32 | None, out: F32Array) -> None:
    levels, scales = parts
    add_levels(lambda elements: levels[elements], scales, 127, INT8_BLOCK, weight, out)


INT8 = Scheme(group=1, layout=_int8_layout, encode=_int8_encode, add=_int8_add)


# -- int4: two levels a byte, the first in its lower half, in two's complement ---


def _int4_layout(name: str, shape: Shape) -> list[PartSpec]:
    return [
        shape_part(name, shape),
        (f"{name}.packed", "U8", (blocks_of(shape, 2),)),
        (f"{name}.scale", "BF16", (blocks_of(shape, INT4_BLOCK),)),
    ]


def _int4_encode(flat: F32Array) -> list[NDArray[Any]]:
    levels, scales = _quantise(flat, 7, INT4_BLOCK)
    packed = np.empty(blocks_of(flat.shape, 2), dtype="u1")
    for span in spans(levels.size):
        packed[_bytes(span)] = _pack(levels[span])
    return [empty_part(), packed, scales]


def _int4_add(parts: Arrays, weight: np.float32 | None, out: F32Array) -> None:
    _, packed, scales = parts
    if out.size % 2 and packed[-1] >> 4:
        raise RefusedError("the half byte behind the last value is not zero", rule="codec-padding")
    levels = np.empty(min(out.size + out.size % 2, SPAN), dtype="i1")

    def levels_of(elements: slice) -> Levels:
        found = packed[_bytes(elements)]
        _unpack(found, levels[: 2 * found.size])
        return levels[: elements.stop - elements.start]

    add_levels(levels_of, scales, 7, INT4_BLOCK, weight, out)


def _bytes(elements: slice) -> slice:
    """Where the levels of a span lie: it begins with a block, and so with a byte."""
    return slice(elements.start // 2, -(-elements.stop // 2))


def _pack(levels: Levels) -> NDArray[np.uint8]:
    padded = np.append(levels, np.int8(0)) if levels.size % 2 else levels
    pairs: NDArray[np.uint16] = padded.view("<u2")
    upper = np.right_shift(pairs, 4)
    np.bitwise_and(upper, 0xF0, out=upper)
    np.bitwise_or(upper, pairs & 0x0F, out=upper)
    return upper.astype(np.uint8)


def _unpack(packed: NDArray[np.uint8], levels: Levels) -> None:
    """Write two levels for each byte."""
    pairs: NDArray[np.uint16] = levels.view("<u2")
    np.left_shift(packed, 4, out=pairs, dtype="<u2")
    np.bitwise_or(pairs, packed, out=pairs)
    np.bitwise_and(pairs, 0x0F0F, out=pairs)
    # Two nibbles, each in the lower half of its byte: extend their signs.
    np.bitwise_xor(pairs, 0x0808, out=pairs)
    np.subtract(levels, 8, out=levels)


INT4 = Scheme(group=1, layout=_int4_layout, encode=_int4_encode, add=_int4_add)
