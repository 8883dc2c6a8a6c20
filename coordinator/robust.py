"""Robust means: for each number, what stands for the updates of a round when one of them may be wrong or hostile.

Median and trimmed mean by coordinate: Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical
Rates", arXiv 1803.01498, definitions 1 and 2. With k updates of which fewer than the trimmed are hostile, each number
lies between two that honest sites sent. Every update counts alike: an example count is what its site says.

Only sorting, additions and one multiplication in float32, in one order: the same inputs give the same bits.
"""

from __future__ import annotations

from typing import assert_never

import numpy as np

from shared.config import MergeRule
from shared.tensorfile import F32Array


def trimmed(rule: MergeRule, updates: int, share: float) -> int:
    """How many of `updates` values are left out at each end; at least one or two remain in the middle."""
    assert updates > 0
    match rule:
        case "mean":
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
