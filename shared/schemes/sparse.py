"""topk2 and topk2x4: of each chunk the values of largest magnitude, each as a sign and one of two levels.

After SparseLoCo (Sarfi et al., arXiv 2508.15706): top-k within chunks, two bits a value, and what is left out is added
to the next update by the sender (`edge_client.feedback`). A chunk is CHUNK values of the flattened tensor; of m values
ceil(m / sparsity) are kept, so that the short last chunk is as dense as the others.

    gap     lower 8 bits of how many values are left out since the one before it in the chunk, or since its beginning
    leap    upper 4 bits of the same; two a byte, lower bits first
    value   2 bits: bit 0 is set for the upper level, bit 1 for a negative value; four a byte, lower bits first
    scale   two levels a chunk, lower and upper, as bfloat16

Gaps are distributed nearly geometrically, and their entropy is that of the places (Golomb, Run-length encodings, 1966):
zstd's Huffman code packs gap and leap to 5.5 bits where one value in 16 is kept, and to 7.6 where it is one in 64; a
place takes 12.

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
    PartSpec,
    Scheme,
    blocks_of,
    empty_part,
    magnitude_bits,
    shape_part,
    spans,
)
from shared.tensorfile import F32Array, Shape, bf16_to_f32, f32_to_bf16

CHUNK = 4096
"""Values among which the largest are looked for; a distance within it has 12 bits."""

SPARSITY = 64
"""One value of so many is kept: 64 of 4096, as in the paper."""

SPARSITY_X4 = 16
"""For runs of few versions: a value that is never sent is never learnt."""

_KEPT_SPAN = SPAN // 2
"""Kept values that are decoded at a time: their places, 8 bytes each, fill 512 KiB."""


Int64Array = NDArray[np.int64]


def _layout(name: str, shape: Shape, *, sparsity: int) -> list[PartSpec]:
    kept = blocks_of(shape, sparsity)
    return [
        shape_part(name, shape),
        (f"{name}.gap", "U8", (kept,)),
        (f"{name}.leap", "U8", (blocks_of((kept,), 2),)),
        (f"{name}.value", "U8", (blocks_of((kept,), 4),)),
        (f"{name}.scale", "BF16", (blocks_of(shape, CHUNK), 2)),
    ]


def _encode(flat: F32Array, *, sparsity: int) -> list[NDArray[Any]]:
    kept = blocks_of(flat.shape, sparsity)
    gaps = np.empty(kept, dtype=np.uint16)
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
        gaps[here] = np.diff(places, axis=1, prepend=-1).reshape(-1) - 1
        codes[here] = (upper | (values < 0).view(np.uint8) << 1).reshape(-1)
        scales[2 * (piece.start // CHUNK) :][: levels.size] = levels.reshape(-1)
    lower, upper = (gaps & 0xFF).astype(np.uint8), (gaps >> 8).astype(np.uint8)
    return [empty_part(), lower, _pack(upper, 4), _pack(codes, 2), scales]


def _largest(rows: F32Array, count: int) -> Int64Array:
    """Places of the `count` largest magnitudes of each row, ascending; of equal ones the first."""
    magnitudes = magnitude_bits(rows)
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
    _, gap, leap, value, stored = parts
    scales = bf16_to_f32(stored).reshape(-1, 2)
    count, a_chunk = blocks_of(out.shape, sparsity), CHUNK // sparsity
    _check_scales(scales)
    _check_padding(count, leap, value)
    for kept in spans(count, _KEPT_SPAN):
        _check_ends(_steps(gap, leap, kept, a_chunk), out.size % CHUNK if kept.stop == count else 0)
    # In the order of their codes.
    levels = np.concatenate([scales, -scales], axis=1)
    if weight is None:
        out[...] = 0
    else:
        levels *= weight
    for kept in spans(count, _KEPT_SPAN):
        chunk = np.arange(kept.start, kept.stop) // a_chunk
        within = _steps(gap, leap, kept, a_chunk).cumsum(axis=1).reshape(-1)[: chunk.size] - 1
        places = chunk * CHUNK + within
        values = levels[chunk, _unpack(value, kept, 2)]
        if weight is not None:
            np.add(out[places], values, out=values)
        out[places] = values


def _steps(gap: NDArray[np.uint8], leap: NDArray[np.uint8], kept: slice, a_chunk: int) -> Int64Array:
    """From place to place in the chunks of a span, a row each, the first from -1; zero behind a short one's last."""
    count = kept.stop - kept.start
    steps = np.zeros(-(-count // a_chunk) * a_chunk, dtype=np.int64)
    steps[:count] = _unpack(leap, kept, 4)
    steps[:count] <<= 8
    steps[:count] += gap[kept]
    steps[:count] += 1
    return steps.reshape(-1, a_chunk)


# -- what no encoder writes: RefusedError ---


def _check_scales(scales: F32Array) -> None:
    lower, upper = scales.T
    # Written so that a NaN fails it.
    if np.signbit(lower).any() or not ((lower <= upper) & (upper <= MAGNITUDE_MAX)).all():
        raise RefusedError("a level is negative, NaN or out of range, or above the upper one", rule="codec-scale")


def _check_ends(steps: Int64Array, short: int) -> None:
    """Places ascend, since no step is back: all are inside their chunk if the last one is."""
    ends = steps.sum(axis=1)
    if ends.max() > CHUNK or (short and ends[-1] > short):
        raise RefusedError("the gaps of a chunk lead out of it", rule="codec-index")


def _check_padding(count: int, leap: NDArray[np.uint8], value: NDArray[np.uint8]) -> None:
    if (count % 2 and leap[-1] >> 4) or (count % 4 and value[-1] >> 2 * (count % 4)):
        raise RefusedError("bits behind the last leap or value are not zero", rule="codec-padding")


# -- bits; a span of kept values begins with a chunk, and so with a byte ---


def _shifts(bits: int) -> NDArray[np.uint8]:
    """How far each code of so many bits is shifted in its byte."""
    return np.arange(0, 8, bits, dtype=np.uint8)


def _pack(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    a_byte = 8 // bits
    rows = np.append(codes, np.zeros(-codes.size % a_byte, dtype=np.uint8)).reshape(-1, a_byte)
    packed: NDArray[np.uint8] = np.bitwise_or.reduce(rows << _shifts(bits), axis=1)
    return packed


def _unpack(packed: NDArray[np.uint8], kept: slice, bits: int) -> NDArray[np.uint8]:
    a_byte = 8 // bits
    taken = packed[kept.start // a_byte : -(-kept.stop // a_byte)]
    codes = np.right_shift(taken[:, None], _shifts(bits)) & np.uint8((1 << bits) - 1)
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
