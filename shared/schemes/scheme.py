"""What a codec consists of, and what all of them share.

All work is done in spans that fit the cache. Each element goes through the same float32 operations in the same order
on every machine, so that a merge replayed elsewhere gives the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from shared.tensorfile import DType, F32Array, Shape

Group = Literal[1, 2, 4]
"""Bytes of one element, by which a slice is grouped."""

PartSpec = tuple[str, DType, Shape]
Arrays = Sequence[NDArray[Any]]

MAGNITUDE_MAX = np.float32(2.0**127)
"""Larger input is refused like infinity: no codec's rounding can then overflow. Sound weights stay under 2^20."""

SPAN = 1 << 17
"""Elements worked on at a time: a 512 KiB temporary stays in the second-level cache. A multiple of every block."""


class NotFiniteError(Exception):
    """Input that no codec takes; `shared.codec.encode` knows the tensor's name and says it."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """One codec. Arrays are flat, in the order of `layout`, which gives the part of the tensor's own name first.

    `add(parts, weight, out)` adds weight x decoded to `out`, or, with weight None, writes decoded to it. A tensor may
    be taken apart at multiples of a block, so that what lies before an element is what that many values take.
    """

    group: Group
    layout: Callable[[str, Shape], list[PartSpec]]
    encode: Callable[[F32Array], list[NDArray[Any]]]
    add: Callable[[Arrays, np.float32 | None, F32Array], None]


def shape_part(name: str, shape: Shape) -> PartSpec:
    """The empty tensor that keeps the shape of one whose values lie packed in its companions: (0, ...shape)."""
    return name, "F32", (0, *shape)


def empty_part() -> F32Array:
    """The data of a `shape_part`."""
    return np.empty(0, dtype="<f4")


def blocks_of(shape: Shape, size: int) -> int:
    """How many blocks of `size` values a tensor of this shape takes, the last one perhaps shorter."""
    return -(-math.prod(shape) // size)


def spans(size: int, span: int = SPAN) -> Iterator[slice]:
    """Cut `size` elements into spans."""
    return (slice(start, min(start + span, size)) for start in range(0, size, span))


def magnitude_bits(values: F32Array) -> NDArray[np.int32]:
    """Magnitudes as integers, which order as the floats do and are selected twice as fast; raises as `check_finite`."""
    magnitudes: NDArray[np.int32] = values.view(np.int32) & np.int32(0x7FFFFFFF)
    if not magnitudes.max() < MAGNITUDE_MAX.view(np.int32):
        raise NotFiniteError
    return magnitudes


def check_finite(flat: F32Array) -> None:
    """Raise NotFiniteError on NaN, infinity and magnitudes from 2^127 on."""
    scratch = np.empty(min(flat.size, SPAN), dtype=np.float32)
    for span in spans(flat.size):
        values = flat[span]
        # max() hands on a NaN, and a NaN is not below anything.
        if not np.abs(values, out=scratch[: values.size]).max() < MAGNITUDE_MAX:
            raise NotFiniteError
