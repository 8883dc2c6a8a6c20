"""What trainings cost together, and which noise a wanted cost takes: Opacus' accountant of Rényi differential privacy.

A step is the sampled Gaussian mechanism: of neighbouring data sets at most one record differs, it is drawn with
probability q, and the noise has `noise_multiplier` times the bound on what it can add. Its RDP at each order is that of
Mironov et al., "Rényi Differential Privacy of the Sampled Gaussian Mechanism" (arXiv 1908.10530), section 3.3; RDP adds
up over steps, also over those with other rates and noise (Mironov, arXiv 1702.07476, proposition 1); and it is turned
into (epsilon, delta) by theorem 21 of Balle et al. (arXiv 1905.09982), at the order at which that is smallest.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from opacus.accountants.analysis.rdp import compute_rdp, get_privacy_spent
from opacus.accountants.utils import get_noise_multiplier

from edge_client.privacy.ledger import BUDGET, Charge, Limit, Spent
from shared.config import PrivacySection, TrainingSection
from shared.errors import ConfigError, RefusedError

ORDERS: tuple[float, ...] = (
    *(1 + tenth / 10 for tenth in range(1, 100)),
    *range(11, 64),
    *(2**power for power in range(6, 10)),
)
"""Orders at which the cost is added up: those of Opacus, and some above, at which small epsilons are tight."""

PLANNED_WITHIN = 1e-3
"""Share of a target that planned noise may leave unspent."""

NOISE_MAX = 1000.0
"""The largest noise multiplier that is planned; an update would be noise alone long before."""


def epsilon_of(charges: Sequence[Charge], delta: float) -> float:
    """Return the epsilon at `delta` that the charges come to together; 0 for none."""
    if not charges:
        return 0.0
    rdp = np.sum([_rdp(each.sample_rate, each.noise_multiplier) * each.steps for each in charges], axis=0)
    with warnings.catch_warnings(action="ignore"):  # it says when the best order is the first or the last
        epsilon, _ = get_privacy_spent(orders=ORDERS, rdp=rdp, delta=delta)
    return max(0.0, float(epsilon))


def noise_for(target_epsilon: float, delta: float, *, sample_rate: float, steps: int) -> float:
    """Return the least noise multiplier, within 0.1 % of the target, with which `steps` cost at most `target_epsilon`.

    ConfigError when no useful noise is enough.
    """
    loudest = Charge(sample_rate=sample_rate, noise_multiplier=NOISE_MAX, steps=steps)
    if epsilon_of([loudest], delta) > target_epsilon:
        raise ConfigError(
            f"no noise brings {steps} steps at rate {sample_rate:.3g} down to epsilon {target_epsilon:g}",
            hint="raise privacy.target_epsilon, or lower training.epochs or federation.versions",
        )
    with warnings.catch_warnings(action="ignore"):
        noise = get_noise_multiplier(
            target_epsilon=target_epsilon,
            target_delta=delta,
            sample_rate=sample_rate,
            steps=steps,
            accountant="rdp",
            epsilon_tolerance=PLANNED_WITHIN * target_epsilon,
            alphas=ORDERS,
        )
    return float(noise)


def charge_of(privacy: PrivacySection, training: TrainingSection, *, records: int, versions: int) -> Charge:
    """Return what one update costs a site of so many records, in a run of so many versions.

    With a target, the noise is the one with which an update of each version costs the target in all.
    """
    rate = min(1.0, training.batch_size / records)
    steps = steps_of(rate, epochs=training.epochs)
    noise = privacy.noise_multiplier
    if noise is None:
        assert privacy.target_epsilon is not None, "one of the two, says PrivacySection"
        noise = noise_for(privacy.target_epsilon, privacy.delta, sample_rate=rate, steps=steps * versions)
    return Charge(sample_rate=rate, noise_multiplier=noise, steps=steps)


def steps_of(sample_rate: float, *, epochs: int) -> int:
    """Return the steps in which a record is drawn `epochs` times on average, rounded up."""
    return math.ceil(epochs / sample_rate - 1e-9)


def spend(charge: Charge, so_far: Sequence[Charge], limits: Sequence[Limit], delta: float) -> Spent:
    """Return what all trainings come to with one of `charge`; RefusedError(rule='privacy-budget') past a limit."""
    for limit in limits:
        epsilon = epsilon_of((*limit.charges, charge), delta)
        if epsilon > limit.epsilon:
            raise RefusedError(
                f"one more training would make epsilon {epsilon:.4g} at delta {delta:g}, "
                f"and {limit.name} allows {limit.epsilon:g}",
                rule=BUDGET,
                hint="the site goes on without training; whether more may be spent is for the hospital to say",
            )
    return Spent(charge=charge, epsilon=epsilon_of((*so_far, charge), delta), delta=delta)


def trainings_left(charge: Charge, limit: Limit, delta: float) -> int:
    """Return how many more trainings of `charge` stay within the limit, at most a million."""

    def fits(times: int) -> bool:
        return epsilon_of((*limit.charges, charge.times(times)), delta) <= limit.epsilon

    low, high = 0, 1
    while high < _MANY and fits(high):
        low, high = high, min(2 * high, _MANY)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


_MANY = 1_000_001


@lru_cache(maxsize=256)
def _rdp(sample_rate: float, noise_multiplier: float) -> npt.NDArray[np.float64]:
    """RDP of one step at each of ORDERS; a run has few kinds of steps, and is asked about them for each update."""
    return np.asarray(compute_rdp(q=sample_rate, noise_multiplier=noise_multiplier, steps=1, orders=ORDERS))
