from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.staleness import constant, hinge, polynomial, staleness_weight
from shared.config import StalenessSection

SECTIONS = [
    StalenessSection(kind="constant"),
    StalenessSection(kind="polynomial"),
    StalenessSection(kind="polynomial", a=0.9),
    StalenessSection(kind="hinge"),
    StalenessSection(kind="hinge", a=0.5, b=0),
]


@pytest.mark.parametrize(("tau", "expected"), [(0, 1.0), (3, 0.5), (8, 1 / 3), (99, 0.1)])
def test_polynomial_by_hand(tau: int, expected: float) -> None:
    """(1 + tau)^-1/2: one half at tau 3, where 1 / (1 + sqrt(tau)) would give 0.366."""
    assert polynomial(tau) == pytest.approx(expected, rel=1e-15)


def test_polynomial_takes_its_exponent() -> None:
    """(1 + 3)^-2 = 1/16."""
    assert polynomial(3, a=2.0) == 1 / 16


@pytest.mark.parametrize(("tau", "expected"), [(0, 1.0), (4, 1.0), (5, 1 / 11), (6, 1 / 21), (14, 1 / 101)])
def test_hinge_by_hand(tau: int, expected: float) -> None:
    """1 up to b = 4, then 1 / (10 (tau - 4) + 1): 1/11 at tau 5, where tau + b would give 1/91."""
    assert hinge(tau) == expected


def test_hinge_takes_its_slope_and_corner() -> None:
    """With a = 1/2 and b = 0: 1 / (2/2 + 1) at tau 2."""
    assert hinge(2, a=0.5, b=0.0) == 0.5


def test_constant_is_one() -> None:
    """An update counts the same however late it is."""
    assert [constant(tau) for tau in (0, 1, 1000)] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("section", "tau", "expected"),
    [
        (SECTIONS[0], 7, 1.0),
        (SECTIONS[1], 3, 0.5),
        (SECTIONS[2], 3, 4**-0.9),
        (SECTIONS[3], 5, 1 / 11),
        (SECTIONS[4], 2, 0.5),
    ],
)
def test_the_section_chooses_function_and_parameters(section: StalenessSection, tau: int, expected: float) -> None:
    """Given parameters are used, those left out take the published values."""
    assert staleness_weight(section, tau) == expected


@settings(deadline=None)
@given(st.sampled_from(SECTIONS), st.integers(0, 10_000))
def test_every_function_starts_at_one_and_never_rises(section: StalenessSection, tau: int) -> None:
    """s(0) = 1 and 0 < s(tau + 1) <= s(tau)."""
    assert staleness_weight(section, 0) == 1.0
    assert 0 < staleness_weight(section, tau + 1) <= staleness_weight(section, tau)
    assert math.isfinite(staleness_weight(section, tau))
