"""Powers and exponentials, held to integer arithmetic and to another way of computing them."""

from __future__ import annotations

import decimal
import math
from fractions import Fraction

from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.exact import exp, power

COUNTS = st.integers(1, 10**9)


@settings(deadline=None)
@given(COUNTS)
def test_a_root_is_the_nearest_double(count: int) -> None:
    """As IEEE 754 wants of square roots, and C libraries do not of powers; a power of 1 or 0 changes nothing."""
    assert power(count, 0.5) == math.sqrt(count)
    assert (power(count, 1.0), power(count, 0.0)) == (float(count), 1.0)


@settings(deadline=None)
@given(COUNTS)
def test_one_over_a_root_is_the_nearest_double(count: int) -> None:
    """The default of staleness: x lies within half a last place of n^-1/2, by comparing squares of fractions."""
    found = power(count, -0.5)
    half = Fraction(math.ulp(found)) / 2
    assert (Fraction(found) - half) ** 2 * count <= 1 <= (Fraction(found) + half) ** 2 * count


@settings(deadline=None)
@given(st.floats(-40, 40))
def test_an_exponential_is_the_nearest_double(value: float) -> None:
    """As its series gives it, added up in fractions: 200 terms of at most 40^n / n! leave out less than 10^-50."""
    at, term, total = Fraction(value), Fraction(1), Fraction(1)
    for index in range(1, 200):
        term = Fraction(round(term * at / index * 2**400), 2**400)
        total += term
    assert abs(Fraction(exp(value)) - total) <= Fraction(math.ulp(exp(value))) * Fraction(50001, 100000)


def test_tables_agree() -> None:
    """e^-1 as tables have it, a tenth, a root of 2; and far below, nothing."""
    assert (exp(-1.0), power(10, -1.0), power(2, 0.5)) == (0.36787944117144233, 0.1, 1.4142135623730951)
    assert exp(-1e300) == 0.0


def test_nobody_s_precision_changes_them() -> None:
    """Whoever works with fewer digits in the same thread gets the same bits here."""
    wanted = power(7, 0.37)
    with decimal.localcontext() as context:
        context.prec = 3
        assert power(7, 0.37) == wanted
