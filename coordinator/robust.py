"""Rules that trust nobody: what stands for the updates of a round when some of them may be wrong or hostile.

Median and trimmed mean by coordinate: Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical
Rates", arXiv 1803.01498, definitions 1 and 2. With k updates of which fewer than the trimmed are hostile, each number
lies between two that honest sites sent.

Krum and multi-Krum: Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent", NIPS
2017 (arXiv 1703.02757). Of K updates of which at most f are hostile, K >= 2 f + 3, the score of each is the sum of its
squared distances to the K - f - 2 others that are closest to it. Krum takes the update with the lowest score,
multi-Krum the mean of the m with the lowest; m = K - f, the most that leaves f out.

Every update counts alike: an example count is what its site says.

Only sorting, additions and multiplications, in one order: the same inputs give the same bits.
"""

from __future__ import annotations

from typing import assert_never

import numpy as np
from numpy.typing import NDArray

from shared.config import MergeRule
from shared.tensorfile import F32Array

F64Array = NDArray[np.float64]

MIDDLES: frozenset[MergeRule] = frozenset({"median", "trimmed-mean"})
"""Rules that choose for each number."""

KRUMS: frozenset[MergeRule] = frozenset({"krum", "multi-krum"})
"""Rules that choose among whole updates."""

_WIDENED = 1 << 20
"""Values, of all updates together, that are held in float64 at a time: 8 MiB."""


def trimmed(rule: MergeRule, updates: int, share: float) -> int:
    """How many of `updates` values are left out at each end; at least one or two remain in the middle."""
    assert updates > 0
    match rule:
        case "mean" | "ca2fl" | "krum" | "multi-krum":
            return 0
        case "median":
            return (updates - 1) // 2
        case "trimmed-mean":
            # A share of 0.2 of 5 is 1, although the nearest float to 0.2 may lie below it.
            return min(int(share * updates + 1e-9), (updates - 1) // 2)
        case _:
            assert_never(rule)


def trimmed_mean(values: F32Array, trim: int) -> F32Array:
    """Mean of the (k, n) `values` over k without the `trim` smallest and largest of each column; sorts them in place.

    Shape (n,), float32. Values must be finite.
    """
    count = len(values) - 2 * trim
    assert count >= 1
    values.sort(axis=0)
    total: F32Array = values[trim].copy()
    for row in values[trim + 1 : trim + count]:
        np.add(total, row, out=total)
    np.multiply(total, np.float32(1 / count), out=total)
    return total


def chosen(rule: MergeRule, updates: int, byzantine: int) -> int:
    """How many of `updates` count: for Krum one, for multi-Krum all but `byzantine`, for other rules all."""
    match rule:
        case "krum":
            return 1
        case "multi-krum":
            return updates - byzantine
        case _:
            return updates


def squared_distances(values: F32Array) -> F64Array:
    """Squared distance between any two rows of the (k, n) `values`, shape (k, k), float64."""
    count, size = values.shape
    distances = np.zeros((count, count), dtype=np.float64)
    piece_size = max(1, _WIDENED // count)
    for start in range(0, size, piece_size):
        piece = values[:, start : start + piece_size].astype(np.float64)
        for row in range(count):
            for other in range(row):
                apart = piece[row] - piece[other]
                np.multiply(apart, apart, out=apart)
                distances[row, other] += _folded(apart)
    return distances + distances.T


def krum_choice(distances: F64Array, byzantine: int, count: int) -> list[int]:
    """Rows of the `count` updates with the lowest scores, best first; of equal scores the first row's is better.

    `distances` (k, k) are squared, k >= 2 `byzantine` + 3.
    """
    updates = len(distances)
    assert updates >= 2 * byzantine + 3, "Krum cannot judge so few"
    scores = []
    for row in range(updates):
        others = np.sort(np.delete(distances[row], row))
        scores.append(_folded(others[: updates - byzantine - 2]))
    return sorted(range(updates), key=lambda row: (scores[row], row))[:count]


def _folded(values: F64Array) -> float:
    """Sum of a vector, which is used up; halves are added to each other, as no library's sum promises its order."""
    size = len(values)
    while size > 1:
        half = (size + 1) // 2
        np.add(values[: size - half], values[half:size], out=values[: size - half])
        size = half
    return float(values[0])
