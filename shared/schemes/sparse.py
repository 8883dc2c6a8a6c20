"""topk2 and topk2x4: of each chunk the values of largest magnitude, each as a sign and one of two levels.

After SparseLoCo (Sarfi et al., arXiv 2508.15706): top-k within chunks, two bits a value, and what is left out is added
to the next update by the sender (`edge_client.feedback`). A chunk is CHUNK values of the flattened tensor; of m values
ceil(m / sparsity) are kept, so that the short last chunk is as dense as the others.

    index   12 bits a value: its place in the chunk, ascending; two in three bytes, lower bits first
    value   2 bits a value: bit 0 is set for the upper level, bit 1 for a negative value; four a byte, lower bits first
    scale   two levels a chunk, lower and upper, as bfloat16

The two levels are the means of the smaller and of the larger magnitudes, parted where the squared error is least (the
optimal two-level quantiser of these very values: Lloyd, Least squares quantization in PCM, 1982). Hence
||x - decoded|| <= ||x||, and |error| <= 1.004 x (largest magnitude of the chunk).
"""

from __future__ import annotations

from functools import partial
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

CHUNK = 4096
"""Values among which the largest are looked for; an index into it has 12 bits."""

SPARSITY = 64
"""One value of so many is kept: 64 of 4096, as in the paper."""

SPARSITY_X4 = 16
"""For runs of few versions: a value that is never sent is never learnt."""

_KEPT_SPAN = SPAN // 2
"""Kept values that are decoded at a time: their places, 8 bytes each, fill 512 KiB."""

_MAGNITUDE_BITS = np.int32(0x7FFFFFFF)
_BITS_MAX = MAGNITUDE_MAX.view(np.int32)

Int64Array = NDArray[np.int64]


def _layout(name: str, shape: Shape, *, sparsity: int) -> list[PartSpec]:
    kept = blocks_of(shape, sparsity)
    return [
        shape_part(name, shape),
        (f"{name}.index", "U8", (blocks_of((3 * kept,), 2),)),
        (f"{name}.value", "U8", (blocks_of((kept,), 4),)),
        (f"{name}.scale", "BF16", (blocks_of(shape, CHUNK), 2)),
    ]


def _encode(flat: F32Array, *, sparsity: int) -> list[NDArray[Any]]:
    kept = blocks_of(flat.shape, sparsity)
    indices = np.empty(kept, dtype=np.uint16)
    codes = np.empty(kept, dtype=np.uint8)
    scales = np.empty(2 * blocks_of(flat.shape, CHUNK), dtype="<u2")
    whole = flat.size - flat.size % CHUNK
    pieces = [*spans(whole), *([slice(whole, flat.size)] if whole < flat.size else [])]
    for piece in pieces:
        rows = flat[piece].reshape(-1, min(CHUNK, piece.stop - piece.start))
        places = _largest(rows, -(-rows.shape[1] // sparsity))
        values = np.take_along_axis(rows, places, axis=1)
        levels, upper = _two_levels(np.abs(values))
        here = slice(piece.start // sparsity, -(-piece.stop // sparsity))
        indices[here] = places.reshape(-1)
        codes[here] = (upper | (values < 0).view(np.uint8) << 1).reshape(-1)
        scales[2 * (piece.start // CHUNK) :][: levels.size] = levels.reshape(-1)
    return [empty_part(), _pack12(indices), _pack2(codes), scales]


def _largest(rows: F32Array, count: int) -> Int64Array:
    """Places of the `count` largest magnitudes of each row, ascending; of equal ones the first.

    Magnitudes are compared as integers, which order as the floats do and are selected twice as fast.
    """
    magnitudes = rows.view(np.int32) & _MAGNITUDE_BITS
    if not magnitudes.max() < _BITS_MAX:
        raise NotFiniteError
    width = rows.shape[1]
    least = np.partition(magnitudes, width - count, axis=1)[:, width - count, None]
    chosen = magnitudes >= least
    places = np.flatnonzero(chosen)
    if places.size != count * len(rows):
        # Some row has more values that equal its least one than it may keep.
        above = magnitudes > least
        spare = count - np.count_nonzero(above, axis=1)
        equal = magnitudes == least
        chosen = above | (equal & (np.cumsum(equal, axis=1) <= spare[:, None]))
        places = np.flatnonzero(chosen)
    within: Int64Array = places.reshape(len(rows), count) % width
    return within


def _two_levels(magnitudes: F32Array) -> tuple[NDArray[np.uint16], NDArray[np.uint8]]:
    """Two levels (rows, 2) as bfloat16 bits, lower first, and 1 for each magnitude that is nearer to the upper one."""
    ordered = np.sort(magnitudes, axis=1).astype(np.float64)
    count = ordered.shape[1]
    below = np.cumsum(ordered, axis=1)
    total = below[:, -1:]
    # The lower level stands for the first `split` values; none, when all are of one level.
    split = np.arange(count)
    lower_sum = np.concatenate([np.zeros_like(total), below[:, :-1]], axis=1)
    lower_mean = lower_sum / np.maximum(split, 1)
    upper_mean = (total - lower_sum) / (count - split)
    # The squared error is the sum of squares, which is given, less this.
    best = np.argmax(lower_sum * lower_mean + (total - lower_sum) * upper_mean, axis=1)[:, None]
    upper = np.take_along_axis(upper_mean, best, axis=1)
    lower = np.where(best > 0, np.take_along_axis(lower_mean, best, axis=1), upper)
    levels = f32_to_bf16(np.concatenate([lower, upper], axis=1).astype(np.float32))
    middle = bf16_to_f32(levels).astype(np.float64).mean(axis=1, keepdims=True)
    return levels, (magnitudes > middle).view(np.uint8)


def _add(parts: Arrays, weight: np.float32 | None, out: F32Array, *, sparsity: int) -> None:
    _, index, value, stored = parts
    scales = bf16_to_f32(stored).reshape(-1, 2)
    _check(index, value, scales, out.size, sparsity)
    # In the order of their codes.
    levels = np.concatenate([scales, -scales], axis=1)
    if weight is None:
        out[...] = 0
    else:
        levels *= weight
    for kept in spans(blocks_of(out.shape, sparsity), _KEPT_SPAN):
        chunk = np.arange(kept.start, kept.stop) // (CHUNK // sparsity)
        places = chunk * CHUNK + _unpack12(index, kept)
        values = levels[chunk, _unpack2(value, kept)]
        if weight is not None:
            np.add(out[places], values, out=values)
        out[places] = values


def _check(index: NDArray[np.uint8], value: NDArray[np.uint8], scales: F32Array, size: int, sparsity: int) -> None:
    """Raise RefusedError unless each place is named once and inside its chunk, and each level is a sound number."""
    lower, upper = scales.T
    # Written so that a NaN fails it.
    if not ((lower >= 0) & (lower <= upper) & (upper <= MAGNITUDE_MAX)).all():
        raise RefusedError("a level is negative, NaN or out of range, or above the upper one", rule="codec-scale")
    count, a_chunk = blocks_of((size,), sparsity), CHUNK // sparsity
    for kept in spans(count, _KEPT_SPAN):
        indices = _unpack12(index, kept)
        rising = indices[1:] > indices[:-1]
        rising[a_chunk - 1 :: a_chunk] = True  # from one chunk to the next
        # The last one is the largest of its chunk, which may be short.
        if not rising.all() or (kept.stop == count and size % CHUNK and indices[-1] >= size % CHUNK):
            raise RefusedError("the indices of a chunk do not ascend, or lead out of it", rule="codec-index")
    if (count % 2 and index[-1] >> 4) or (count % 4 and value[-1] >> 2 * (count % 4)):
        raise RefusedError("bits behind the last index or value are not zero", rule="codec-padding")


# -- bits; a span of kept values begins with a chunk, and so with a byte ---


def _pack12(indices: NDArray[np.uint16]) -> NDArray[np.uint8]:
    pairs = np.append(indices, np.zeros(indices.size % 2, dtype=np.uint16)).reshape(-1, 2)
    first, second = pairs.T
    packed = np.stack([first & 0xFF, first >> 8 | (second & 0x0F) << 4, second >> 4], axis=1)
    return packed.astype(np.uint8).reshape(-1)[: blocks_of((3 * indices.size,), 2)]


def _unpack12(packed: NDArray[np.uint8], kept: slice) -> NDArray[np.uint16]:
    taken = packed[3 * kept.start // 2 : blocks_of((3 * kept.stop,), 2)]
    low, middle, high = np.append(taken, np.zeros(-taken.size % 3, dtype=np.uint8)).reshape(-1, 3).astype(np.uint16).T
    pairs = np.stack([low | (middle & 0x0F) << 8, middle >> 4 | high << 4], axis=1)
    return pairs.reshape(-1)[: kept.stop - kept.start]


_PLACES = np.array([0, 2, 4, 6], dtype=np.uint8)
"""How far each of four values is shifted in its byte."""


def _pack2(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    fours = np.append(codes, np.zeros(-codes.size % 4, dtype=np.uint8)).reshape(-1, 4)
    packed: NDArray[np.uint8] = np.bitwise_or.reduce(fours << _PLACES, axis=1)
    return packed


def _unpack2(packed: NDArray[np.uint8], kept: slice) -> NDArray[np.uint8]:
    taken = packed[kept.start // 4 : -(-kept.stop // 4)]
    codes = np.right_shift(taken[:, None], _PLACES) & np.uint8(3)
    return codes.reshape(-1)[: kept.stop - kept.start]


def _scheme(sparsity: int) -> Scheme:
    return Scheme(
        group=1,
        layout=partial(_layout, sparsity=sparsity),
        encode=partial(_encode, sparsity=sparsity),
        add=partial(_add, sparsity=sparsity),
    )


TOPK2 = _scheme(SPARSITY)
TOPK2X4 = _scheme(SPARSITY_X4)
