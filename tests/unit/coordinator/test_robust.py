"""How many values are trimmed and the mean of what is left; which updates Krum chooses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from coordinator import robust
from coordinator.robust import chosen, krum_choice, squared_distances, trimmed, trimmed_mean
from shared.config import AggregationSection


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


@given(st.floats(0.001, 0.499))
def test_fewest_leave_one_out_at_each_end(share: float) -> None:
    """One update less, and the trimmed mean would be the mean."""
    fewest, _formula = AggregationSection(rule="trimmed-mean", trim=share).fewest
    assert [trimmed("trimmed-mean", updates, share) > 0 for updates in (fewest - 1, fewest)] == [False, True]


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


FIVE = [[0.0, 0.0], [3.0, 4.0], [0.0, 1.0], [100.0, 0.0], [0.0, -1.0]]
"""Squared distances from the first: 25, 1, 10000, 1."""


def test_squared_distances_by_hand() -> None:
    """Between (0, 0) and (3, 4) 25, between (3, 4) and (0, 1) 18, of each from itself 0; and both ways."""
    distances = squared_distances(np.array(FIVE, dtype=np.float32))
    assert distances[0].tolist() == [0, 25, 1, 10000, 1]
    assert distances[1].tolist() == [25, 0, 18, 97**2 + 16, 34]
    assert np.array_equal(distances, distances.T)


def test_krum_by_hand() -> None:
    """K = 5, f = 1: each score is the sum of the two smallest distances.

    (0, 0): 1 + 1 = 2; (3, 4): 18 + 25; (0, 1): 1 + 4; (100, 0): two of 10,000 and more; (0, -1): 1 + 4. So the first is
    chosen, then, of two equal ones, the earlier, and the outlier comes last.
    """
    distances = squared_distances(np.array(FIVE, dtype=np.float32))
    assert krum_choice(distances, 1, 1) == [0]
    assert krum_choice(distances, 1, 5) == [0, 2, 4, 1, 3]


def test_two_of_a_kind_do_not_win_by_being_close_to_each_other() -> None:
    """K = 7, f = 2: three neighbours count, so that two hostile ones, however close, need honest company."""
    honest = [[0.0], [1.0], [2.0], [3.0], [4.0]]
    for place in (-1e6, 10.0, 1e6):
        values = np.array([*honest, [place], [place]], dtype=np.float32)
        assert krum_choice(squared_distances(values), 2, 1) == [1]
        assert set(krum_choice(squared_distances(values), 2, 5)) == {0, 1, 2, 3, 4}


def test_krum_refuses_to_judge_too_few() -> None:
    """K >= 2 f + 3: with six updates two hostile ones cannot be told."""
    with pytest.raises(AssertionError, match="so few"):
        krum_choice(np.zeros((6, 6)), 2, 1)


@pytest.mark.parametrize(("rule", "expected"), [("krum", 1), ("multi-krum", 5), ("mean", 7)])
def test_how_many_are_chosen(rule: Any, expected: int) -> None:
    """Of seven with f = 2."""
    assert chosen(rule, 7, 2) == expected


def test_a_distance_in_pieces_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against numpy's, to the rounding of float64, whatever the length and the pieces."""
    rng = np.random.default_rng(5)
    for pieces in (3, 1000, 1 << 20):
        monkeypatch.setattr(robust, "_WIDENED", pieces)
        for size in (1, 2, 7, 1025):
            values = rng.normal(0, 1, (4, size)).astype(np.float32)
            wide = values.astype(np.float64)
            expected = ((wide[:, None] - wide[None]) ** 2).sum(axis=2)
            np.testing.assert_allclose(squared_distances(values), expected, rtol=1e-13)
