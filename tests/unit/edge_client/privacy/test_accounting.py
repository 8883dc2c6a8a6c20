"""What trainings cost, held to formulas written out here and to other accountants."""

from __future__ import annotations

import math

import numpy as np
import pytest
from opacus.accountants import PRVAccountant, RDPAccountant

from edge_client.privacy.accounting import charge_of, epsilon_of, noise_for, spend, steps_of, trainings_left
from edge_client.privacy.ledger import Charge, Limit
from shared.config import PrivacySection, TrainingSection
from shared.errors import ConfigError, RefusedError

DELTA = 1e-5


def charge(rate: float, noise: float, steps: int) -> Charge:
    """Short for it."""
    return Charge(sample_rate=rate, noise_multiplier=noise, steps=steps)


CASES = [
    [charge(0.01, 1.0, 1000)],
    [charge(0.1, 1.1, 80)],
    [charge(0.13, 2.5, 400)],
    [charge(0.02, 0.8, 500)],
    [charge(0.5, 4.0, 60)],
    [charge(1.0, 20.0, 30)],
    [charge(0.1, 1.1, 40), charge(0.05, 0.9, 100), charge(0.3, 3.0, 10)],
]


def log_moment(rate: float, noise: float, order: int) -> float:
    """The logarithm of A_a for integer order a: Mironov et al. (arXiv 1908.10530), section 3.3.

    A_a = sum over k = 0..a of  C(a, k) (1 - q)^(a - k) q^k exp((k^2 - k) / (2 sigma^2)),

    in logarithms throughout, which no term overflows.
    """
    if rate == 1:
        return order * (order - 1) / (2 * noise**2)
    terms = [
        math.log(math.comb(order, k))
        + (order - k) * math.log1p(-rate)
        + k * math.log(rate)
        + (k * k - k) / (2 * noise**2)
        for k in range(order + 1)
    ]
    top = max(terms)
    return top + math.log(sum(math.exp(term - top) for term in terms))


def by_formula(charges: list[Charge], orders: range) -> tuple[int, float]:
    """The best order and its epsilon: RDP added up, and turned into epsilon by theorem 21 of arXiv 1905.09982.

    epsilon = rdp(a) + log((a - 1) / a) - (log(delta) + log(a)) / (a - 1).
    """
    found = {}
    for order in orders:
        rdp = sum(log_moment(c.sample_rate, c.noise_multiplier, order) / (order - 1) * c.steps for c in charges)
        found[order] = rdp + math.log((order - 1) / order) - (math.log(DELTA) + math.log(order)) / (order - 1)
    best = min(found, key=lambda order: found[order])
    return best, found[best]


def by_integral(charges: list[Charge], orders: np.ndarray) -> float:
    """The same epsilon from the definition of A_a, at any order, added up on a fine grid in logarithms.

    A_a is the mean over z ~ N(0, sigma^2) of ((1 - q) + q exp((2 z - 1) / (2 sigma^2)))^a.
    """
    found = []
    for order in orders:
        rdp = 0.0
        for c in charges:
            sigma = c.noise_multiplier
            z = np.linspace(-12 * sigma, 12 * sigma + order, 20_001)
            density = -(z**2) / (2 * sigma**2) - math.log(sigma * math.sqrt(2 * math.pi))
            with np.errstate(divide="ignore"):
                ratio = np.logaddexp(np.log1p(-c.sample_rate), np.log(c.sample_rate) + (2 * z - 1) / (2 * sigma**2))
            terms = density + order * ratio
            top = terms.max()
            moment = top + math.log(float(np.trapezoid(np.exp(terms - top), z)))
            rdp += moment / (order - 1) * c.steps
        found.append(rdp + math.log((order - 1) / order) - (math.log(DELTA) + math.log(order)) / (order - 1))
    return float(min(found))


@pytest.mark.parametrize("charges", CASES, ids=lambda charges: f"{epsilon_of(charges, DELTA):.2f}")
def test_an_independent_accountant_comes_to_the_same(charges: list[Charge]) -> None:
    """Within 1 %: the integral at every order; and the closed form at integer orders, where the best one is above 5.

    Below that the integers are too far apart; they can only come to more.
    """
    ours = epsilon_of(charges, DELTA)
    assert ours == pytest.approx(by_integral(charges, np.linspace(1.5, 40, 155)), rel=0.01)
    best, closed = by_formula(charges, range(2, 200))
    assert ours <= closed * (1 + 1e-9)
    if best > 5:
        assert ours == pytest.approx(closed, rel=0.01)


def test_the_closed_form_by_hand() -> None:
    """Order 2, q = 1/2, sigma = 1: A = 1/4 + 1/2 + e/4 = 1.42957..., and one step of rate 1 costs a / (2 sigma^2)."""
    assert math.exp(log_moment(0.5, 1.0, 2)) == pytest.approx(0.75 + math.e / 4)
    assert log_moment(1.0, 2.0, 3) / 2 == pytest.approx(3 / 8)


def test_opacus_own_accountants_agree() -> None:
    """RDP over the same steps comes to the same; PRV, which is tighter, to less, and not to much less."""
    charges = [charge(0.05, 1.2, 200), charge(0.1, 1.5, 50)]
    history = [(c.noise_multiplier, c.sample_rate, c.steps) for c in charges]
    rdp, prv = RDPAccountant(), PRVAccountant()
    rdp.history, prv.history = list(history), list(history)
    ours = epsilon_of(charges, DELTA)
    assert ours == pytest.approx(rdp.get_epsilon(DELTA), rel=1e-6)
    assert 0.8 * ours < prv.get_epsilon(DELTA) < ours


def test_trainings_add_up() -> None:
    """Split over rounds, restarts and in any order, the same steps cost the same; nothing costs nothing."""
    whole = epsilon_of([charge(0.1, 1.1, 80)], DELTA)
    assert epsilon_of([charge(0.1, 1.1, 8)] * 10, DELTA) == pytest.approx(whole)
    mixed = CASES[-1]
    assert epsilon_of(mixed[::-1], DELTA) == pytest.approx(epsilon_of(mixed, DELTA))
    assert epsilon_of([], DELTA) == 0.0
    assert epsilon_of([*mixed, charge(0.1, 5.0, 1)], DELTA) > epsilon_of(mixed, DELTA)


def test_what_costs_more() -> None:
    """More steps, a higher rate, less noise, a smaller delta."""
    base = epsilon_of([charge(0.1, 1.5, 50)], DELTA)
    for dearer in (charge(0.1, 1.5, 60), charge(0.12, 1.5, 50), charge(0.1, 1.4, 50)):
        assert epsilon_of([dearer], DELTA) > base
    assert epsilon_of([charge(0.1, 1.5, 50)], DELTA / 10) > base


@pytest.mark.parametrize("rate", [1e-4, 0.05, 0.6, 1.0])
@pytest.mark.parametrize("noise", [0.3, 1.0, 50.0])
def test_every_setting_has_a_number(rate: float, noise: float) -> None:
    """No overflow, no NaN, for one step and for many."""
    few, many = (epsilon_of([charge(rate, noise, steps)], DELTA) for steps in (1, 10_000))
    assert 0 <= few <= many < math.inf


@pytest.mark.parametrize(("target", "rate", "steps"), [(1.0, 0.1, 100), (8.0, 0.1, 100), (3.0, 1.0, 10)])
def test_planned_noise_spends_the_target(target: float, rate: float, steps: int) -> None:
    """Never more, and a fifth of a percent less at most."""
    noise = noise_for(target, DELTA, sample_rate=rate, steps=steps)
    assert target * 0.998 <= epsilon_of([charge(rate, noise, steps)], DELTA) <= target


def test_a_target_that_no_noise_reaches() -> None:
    """A configuration's fault, with what to change."""
    with pytest.raises(ConfigError, match=r"epsilon 0\.001") as caught:
        noise_for(0.001, DELTA, sample_rate=0.5, steps=10)
    assert "target_epsilon" in caught.value.hint


def test_an_update_s_charge_by_hand() -> None:
    """8 of 60 records at rate 2/15; three epochs are 22.5, so 23 steps; a batch beyond all records takes all."""
    section = PrivacySection(delta=DELTA, noise_multiplier=1.3)
    training = TrainingSection(batch_size=8, epochs=3)
    assert charge_of(section, training, records=60, versions=10) == charge(8 / 60, 1.3, 23)
    assert charge_of(section, training, records=5, versions=10) == charge(1.0, 1.3, 3)
    assert [steps_of(rate, epochs=1) for rate in (0.1, 1 / 3, 0.3, 1.0)] == [10, 3, 4, 1]


def test_the_noise_is_planned_for_all_versions() -> None:
    """Ten versions' updates cost the target together, so that the tenth may still be trained."""
    section = PrivacySection(delta=DELTA, target_epsilon=4.0)
    each = charge_of(section, TrainingSection(batch_size=10), records=50, versions=10)
    assert 3.99 < epsilon_of([each] * 10, DELTA) <= 4.0
    limit = Limit(name="the target", epsilon=4.0, charges=(each.times(9),))
    assert spend(each, limit.charges, [limit], DELTA).epsilon <= 4.0
    with pytest.raises(RefusedError) as caught:
        spend(each, (), [limit.model_copy(update={"charges": (each.times(10),)})], DELTA)
    assert caught.value.rule == "privacy-budget"
    assert "the target allows 4" in caught.value.message


def test_each_limit_counts_its_own() -> None:
    """What is reported are all trainings; what is refused, those that a limit counts."""
    once = charge(0.2, 1.0, 5)
    alone = epsilon_of([once], DELTA)
    run = Limit(name="run", epsilon=1.5 * alone, charges=())
    everything = Limit(name="site", epsilon=100.0, charges=(once.times(20),))
    spent = spend(once, everything.charges, [run, everything], DELTA)
    assert spent.epsilon == pytest.approx(epsilon_of([once] * 21, DELTA))
    with pytest.raises(RefusedError, match="site allows"):
        spend(once, everything.charges, [run, everything.model_copy(update={"epsilon": spent.epsilon * 0.999})], DELTA)


def test_how_many_trainings_are_left() -> None:
    """As many as fit when they are made one after the other."""
    each, had = charge(0.2, 1.2, 5), (charge(0.1, 1.0, 30),)
    limit = Limit(name="site", epsilon=1.8 * epsilon_of(had, DELTA), charges=had)
    made = 0
    while epsilon_of((*had, each.times(made + 1)), DELTA) <= limit.epsilon:
        made += 1
    assert trainings_left(each, limit, DELTA) == made > 1
    assert trainings_left(each, limit.model_copy(update={"epsilon": 0.1}), DELTA) == 0
