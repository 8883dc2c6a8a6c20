"""How many values are trimmed, and the mean of what is left."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from coordinator.robust import trimmed, trimmed_mean


@pytest.mark.parametrize(
    ("rule", "updates", "share", "expected"),
    [
        ("mean", 9, 0.4, 0),
        ("median", 1, 0.4, 0),
        ("median", 4, 0.1, 1),
        ("median", 5, 0.1, 2),
        ("trimmed-mean", 4, 0.2, 0),
        ("trimmed-mean", 5, 0.2, 1),
        ("trimmed-mean", 10, 0.3, 3),
        ("trimmed-mean", 1, 0.49, 0),
        ("trimmed-mean", 2, 0.49, 0),
        ("trimmed-mean", 1000, 0.4999, 499),
    ],
)
def test_how_many_are_left_out(rule: Any, updates: int, share: float, expected: int) -> None:
    """The share rounded down, and never all."""
    assert trimmed(rule, updates, share) == expected


@given(st.lists(st.lists(st.integers(-1000, 1000), min_size=3, max_size=3), min_size=1, max_size=9), st.data())
def test_it_is_the_trimmed_mean_of_others(rows: list[list[int]], data: st.DataObject) -> None:
    """Whole numbers, so that both are exact up to the last division."""
    trim = data.draw(st.integers(0, (len(rows) - 1) // 2))
    values = np.array(rows, dtype=np.float32)
    expected = stats.trim_mean(values.astype(np.float64), trim / len(rows) + 1e-12, axis=0)
    np.testing.assert_allclose(trimmed_mean(values, trim), expected, rtol=1e-6, atol=1e-4)


def test_hostile_values_stay_outside() -> None:
    """With two hostile of five, whatever they send, the median lies between what the honest three sent."""
    honest = np.array([[1.0], [2.0], [3.0]], dtype=np.float32)
    for first in (-3e38, 0.0, 3e38):
        for second in (-3e38, 2.5, 3e38):
            values = np.concatenate([honest, np.array([[first], [second]], dtype=np.float32)])
            assert 1.0 <= trimmed_mean(values, trimmed("median", 5, 0.2))[0] <= 3.0
