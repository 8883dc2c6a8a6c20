from __future__ import annotations

import numpy as np
import pytest

from coordinator.optimizers import SLOTS, server_step
from shared.config import ServerOptimizerName, ServerSection
from shared.tensorfile import F32Array


def array(*values: float) -> F32Array:
    """A float32 vector."""
    return np.array(values, dtype=np.float32)


def steps(section: ServerSection, means: list[F32Array], *, late: int = 0) -> list[list[float]]:
    """The masters of versions 1, 2, ... after each mean, from (1, -2)."""
    master = array(1, -2)
    slots = [np.zeros_like(master) for _ in SLOTS[section.optimizer]]
    seen = []
    for version, mean in enumerate(means, start=1):
        server_step(section, master, mean, slots, version=version, late=late)
        seen.append(master.tolist())
    return seen


def test_sgd_by_hand() -> None:
    """By x + 1/2 m, from (1, -2): m = (4, 2) gives (3, -1), then m = (-2, 0) gives (2, -1)."""
    section = ServerSection(optimizer="sgd", lr=0.5)
    assert steps(section, [array(4, 2), array(-2, 0)]) == [[3, -1], [2, -1]]


def test_sgd_of_rate_one_is_fedavg() -> None:
    """With the default rate the master moves by exactly the mean."""
    assert steps(ServerSection(), [array(0.25, 0.5)]) == [[1.25, -1.5]]


def test_momentum_by_hand() -> None:
    """By v = 1/2 v + m and x + 1/4 v.

    From x = (1, -2): m = (4, 8) gives v = (4, 8), x = (2, 0); m = (2, 0) gives v = (4, 4), x = (3, 1);
    m = 0 gives v = (2, 2), x = (3.5, 1.5).
    """
    section = ServerSection(optimizer="momentum", lr=0.25, momentum=0.5)
    assert steps(section, [array(4, 8), array(2, 0), array(0, 0)]) == [[2, 0], [3, 1], [3.5, 1.5]]


def test_momentum_ends_at_the_step_of_its_formula() -> None:
    """A constant mean of 1 ends at steps of lr / (1 - beta) = 0.7 / 0.1 = 7."""
    section = ServerSection(optimizer="momentum", lr=0.7, momentum=0.9)
    seen = steps(section, [array(1, 1) for _ in range(200)])
    assert seen[-1][0] - seen[-2][0] == pytest.approx(7, rel=1e-4)


def test_without_memory_momentum_is_sgd() -> None:
    """With beta 0 both give the same bits."""
    means = [array(0.1, -0.7), array(3.3, 1e-9), array(-0.2, 5)]
    plain = steps(ServerSection(optimizer="sgd", lr=0.3), [mean.copy() for mean in means])
    assert steps(ServerSection(optimizer="momentum", lr=0.3, momentum=0), means) == plain


def test_nesterov_by_hand() -> None:
    """By u = 1/2 u + m and x + 1/4 (m + 1/2 u).

    From x = (1, -2): m = (4, 8) gives u = (4, 8), a step of 1/4 (6, 12), x = (2.5, 1); m = (2, 0) gives u = (4, 4), a
    step of 1/4 (4, 2), x = (3.5, 1.5).
    """
    section = ServerSection(optimizer="nesterov", lr=0.25, momentum=0.5)
    assert steps(section, [array(4, 8), array(2, 0)]) == [[2.5, 1], [3.5, 1.5]]


def test_adam_by_hand() -> None:
    """With b1 = 1/2, b2 = 3/4, eps = 1, lr = 1/2.

    From x = (1, -2): m = (4, 2) gives u = (2, 1), v = (4, 1), steps 1/2 (2/3, 1/2), x = (4/3, -7/4); m = (0, 2) gives
    u = (1, 3/2), v = (3, 7/4), steps 1/2 (1/(1 + sqrt 3), 3/2/(1 + sqrt(7/4))).
    """
    section = ServerSection(optimizer="adam", lr=0.5, momentum=0.5, beta2=0.75, eps=1)
    first, second = steps(section, [array(4, 2), array(0, 2)])
    assert first == pytest.approx([4 / 3, -7 / 4], rel=1e-6)
    assert second == pytest.approx([4 / 3 + 0.5 / (1 + 3**0.5), -7 / 4 + 0.75 / (1 + 1.75**0.5)], rel=1e-6)


def test_yogi_by_hand() -> None:
    """As adam, but v rises by 1/4 m^2 from below m^2 and falls by 1/4 m^2, not by 1/4 (v - m^2), from above.

    From x = (1, -2): m = (4, 2) gives v = (4, 1), as adam; m = (1, 2) gives u = (3/2, 3/2), v = (4 - 1/4, 1 + 1).
    """
    section = ServerSection(optimizer="yogi", lr=0.5, momentum=0.5, beta2=0.75, eps=1)
    first, second = steps(section, [array(4, 2), array(1, 2)])
    assert first == pytest.approx([4 / 3, -7 / 4], rel=1e-6)
    assert second == pytest.approx([4 / 3 + 0.75 / (1 + 3.75**0.5), -7 / 4 + 0.75 / (1 + 2**0.5)], rel=1e-6)


def test_fadas_by_hand() -> None:
    """As adam, but the root is taken of the greatest v so far.

    From x = (1, -2): m = (4, 2) gives u = (2, 1), w = v = (4, 1); m = (0, 2) gives u = (1, 3/2), v = (3, 7/4), but
    w = (4, 7/4): a step of 1/2 (1/3, ...).
    """
    section = ServerSection(optimizer="fadas", lr=0.5, momentum=0.5, beta2=0.75, eps=1)
    first, second = steps(section, [array(4, 2), array(0, 2)])
    assert first == pytest.approx([4 / 3, -7 / 4], rel=1e-6)
    assert second == pytest.approx([4 / 3 + 1 / 6, -7 / 4 + 0.75 / (1 + 1.75**0.5)], rel=1e-6)


@pytest.mark.parametrize(("late", "divisor"), [(0, 1), (4, 1), (5, 5), (8, 8)])
def test_fadas_steps_less_after_great_lateness(late: int, divisor: int) -> None:
    """Up to `slow_after` = 4 versions the rate is whole; beyond, it is divided by the lateness."""
    section = ServerSection(optimizer="fadas", lr=0.5, momentum=0.5, beta2=0.75, eps=1, slow_after=4)
    ((first, _),) = steps(section, [array(4, 2)], late=late)
    assert first == pytest.approx(1 + 1 / 3 / divisor, rel=1e-6)


def test_delayed_nesterov_by_hand() -> None:
    """With N = 2, b1 = 1/2, lr = 1: plain half steps, and the momentum in every second version.

    From x = (1, -2): m = (4, 8), a step of 1/2 m, x = (3, 2); m = (2, 0), d = (6, 8), u = d / 2 = (3, 4), a step of
    u / 2 + m / 2 = (2.5, 2), x = (5.5, 4); m = (2, 2), a step of (1, 1), x = (6.5, 5); m = (0, 0), d = (2, 2),
    u = (3, 4) / 2 + (1, 1) = (2.5, 3), a step of u / 2, x = (7.75, 6.5).
    """
    section = ServerSection(optimizer="delayed-nesterov", lr=1, momentum=0.5, every=2)
    means = [array(4, 8), array(2, 0), array(2, 2), array(0, 0)]
    assert steps(section, means) == [[3, 2], [5.5, 4], [6.5, 5], [7.75, 6.5]]


@pytest.mark.parametrize("name", SLOTS)
def test_everything_stays_float32(name: ServerOptimizerName) -> None:
    """No array is replaced or widened: they change in place."""
    master = array(1, 2)
    slots = [np.zeros_like(master) for _ in SLOTS[name]]
    # Two versions, so that the momentum that moves in every second one has moved.
    for version in (1, 2):
        server_step(ServerSection(optimizer=name, every=2), master, array(1, 1), slots, version=version, late=0)
    assert master.dtype == np.float32
    assert master.tolist() != [1, 2]
    assert all(slot.dtype == np.float32 for slot in slots)
    assert all(slot.any() for slot, held in zip(slots, SLOTS[name], strict=True) if held != "gathered")
