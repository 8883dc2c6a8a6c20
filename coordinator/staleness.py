"""Staleness functions s(tau): how much an update still counts that is tau versions late.

tau is the number of versions published between the state that a site started from and the version that its update is
merged into, minus one: an update of the newest state has tau 0. Each function gives 1 at tau 0 and never rises.
"""

from __future__ import annotations

from typing import assert_never

from coordinator.exact import power
from shared.config import StalenessSection

POLYNOMIAL_A = 0.5  # FedBuff's 1 / sqrt(1 + tau), and FedAsync's own choice
HINGE_A = 10.0  # FedAsync, section 5.2
HINGE_B = 4.0


def constant(tau: int) -> float:
    """s(tau) = 1 (FedAsync, arXiv 1903.03934, section 5.2)."""
    assert tau >= 0
    return 1.0


def polynomial(tau: int, a: float = POLYNOMIAL_A) -> float:
    """s(tau) = (1 + tau)^-a (FedAsync, arXiv 1903.03934, section 5.2; FedBuff, arXiv 2106.06639, with a = 1/2).

    The one is inside the power: at a = 1/2 this is 1 / sqrt(1 + tau), not 1 / (1 + sqrt(tau)).
    """
    assert tau >= 0
    return power(1 + tau, -a)


def hinge(tau: int, a: float = HINGE_A, b: float = HINGE_B) -> float:
    """s(tau) = 1 for tau <= b, else 1 / (a (tau - b) + 1) (FedAsync, arXiv 1903.03934, section 5.2).

    The slope counts from b on (tau - b, not tau + b), so that the function has no step at b.
    """
    assert tau >= 0
    return 1.0 if tau <= b else 1.0 / (a * (tau - b) + 1.0)


def staleness_weight(section: StalenessSection, tau: int) -> float:
    """The configured s(tau), in (0, 1]; parameters that the section leaves out take the published values."""
    match section.kind:
        case "constant":
            return constant(tau)
        case "polynomial":
            return polynomial(tau, POLYNOMIAL_A if section.a is None else section.a)
        case "hinge":
            a = HINGE_A if section.a is None else section.a
            return hinge(tau, a, HINGE_B if section.b is None else section.b)
    assert_never(section.kind)
