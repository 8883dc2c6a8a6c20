"""ternary: of each block the five sixteenths of largest magnitude, each as a sign; one level for all of them.

After sparse ternary compression (Sattler et al., Robust and Communication-Efficient Federated Learning from Non-i.i.d.
Data, arXiv 1903.02891, algorithm 1), by blocks and so dense that no places have to be told: of m values at least
ceil(5 m / 16) are kept, all that are as large as the least of these; a zero is never kept. What is left out may be
added to the next update by the sender (`edge_client.feedback`).

    trit    2 bits: bit 0 is set for a value that is kept, bit 1 if it is negative too; four a byte, lower bits first
    scale   the mean magnitude of the values that are kept, as bfloat16; one a block

The mean is the level of the least squared error, hence ||x - decoded|| <= (1 + 2^-8) ||x||, and |error| <= 1.004 x
(largest magnitude of the block). Five sixteenths are 1.21 bits a value; zstd's Huffman code needs hardly more.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.errors import RefusedError
from shared.schemes.blocks import Levels, add_levels, block_spans
from shared.schemes.scheme import (
    SPAN,
    Arrays,
    PartSpec,
    Scheme,
    blocks_of,
    empty_part,
    magnitude_bits,
    shape_part,
)
from shared.tensorfile import F32Array, Shape, f32_to_bf16

BLOCK = 512
"""Of deltas after AdamW steps 4.1 % of the float32 bytes travel, with a relative error of 0.52; blocks of 128 would
cost a quarter of a per cent more for as much."""

KEPT = 5, 16
"""Of the matrices alone 3.9 % travel; a quarter would be 3.5 % with an error of 0.57, three eighths 4.3 % with 0.48, a
half 4.8 % with 0.44."""

_LEVELS = np.array([[(code & 1) - (code & 2) for code in (b & 3, b >> 2 & 3, b >> 4 & 3, b >> 6)] for b in range(256)])
_LEVELS_OF_BYTE: NDArray[np.uint32] = _LEVELS.astype("i1").view("<u4").reshape(-1)
"""Four levels for each byte; those of code 2, which is refused, mean nothing."""


def _layout(name: str, shape: Shape) -> list[PartSpec]:
    return [
        shape_part(name, shape),
        (f"{name}.trit", "U8", (blocks_of(shape, 4),)),
        (f"{name}.scale", "BF16", (blocks_of(shape, BLOCK),)),
    ]


def _encode(flat: F32Array) -> list[NDArray[Any]]:
    trits = np.empty(blocks_of(flat.shape, 4), dtype="u1")
    scales = np.empty(blocks_of(flat.shape, BLOCK), dtype="<u2")
    for elements, blocks, width in block_spans(flat.size, BLOCK):
        rows = flat[elements].reshape(-1, width)
        kept = _kept(rows)
        counts = np.maximum(np.count_nonzero(kept, axis=1), 1)
        sums = np.where(kept, np.abs(rows), np.float32(0)).sum(axis=1, dtype=np.float64)
        scales[blocks] = f32_to_bf16((sums / counts).astype(np.float32))
        codes = np.left_shift((kept & (rows < 0)).view(np.uint8), 1, dtype=np.uint8)
        codes |= kept.view(np.uint8)
        trits[_bytes(elements)] = _pack(codes.reshape(-1))
    return [empty_part(), trits, scales]


def _kept(rows: F32Array) -> NDArray[np.bool_]:
    """Which values are kept."""
    magnitudes = magnitude_bits(rows)
    width = rows.shape[1]
    share, of = KEPT
    place = width + -width * share // of
    least = np.partition(magnitudes, place, axis=1)[:, place, None]
    kept: NDArray[np.bool_] = magnitudes >= np.maximum(least, 1)
    return kept


def _add(parts: Arrays, weight: np.float32 | None, out: F32Array) -> None:
    _, trits, scales = parts
    _check(trits, out.size)
    levels = np.empty(min(out.size + -out.size % 4, SPAN), dtype="i1")

    def levels_of(elements: slice) -> Levels:
        found = trits[_bytes(elements)]
        np.take(_LEVELS_OF_BYTE, found, out=levels.view("<u4")[: found.size], mode="clip")
        return levels[: elements.stop - elements.start]

    add_levels(levels_of, scales, 1, BLOCK, weight, out)


def _check(trits: NDArray[np.uint8], size: int) -> None:
    """No encoder gives a sign to a value that is not kept, nor a value to the bits behind the last one."""
    if (trits & ~(trits << 1) & 0xAA).any() or (size % 4 and trits[-1] >> 2 * (size % 4)):
        raise RefusedError("bits of no value are not zero", rule="codec-padding")


def _bytes(elements: slice) -> slice:
    """Where the codes of a span lie: it begins with a block, and so with a byte."""
    return slice(elements.start // 4, -(-elements.stop // 4))


def _pack(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    padded = np.append(codes, np.zeros(-codes.size % 4, dtype=np.uint8)) if codes.size % 4 else codes
    fours: NDArray[np.uint32] = padded.view("<u4")
    return (fours | fours >> 6 | fours >> 12 | fours >> 18).astype(np.uint8)


TERNARY = Scheme(group=1, layout=_layout, encode=_encode, add=_add)
