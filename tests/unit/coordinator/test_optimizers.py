from __future__ import annotations

import numpy as np
import pytest

from coordinator.optimizers import SLOTS, server_step
from shared.config import ServerOptimizerName, ServerSection
from shared.tensorfile import F32Array


def array(*values: float) -> F32Array:
    """A float32 vector."""
    return np.array(values, dtype=np.float32)


def steps(section: ServerSection, means: list[F32Array]) -> list[list[float]]:
    """The masters after each mean, from (1, -2)."""
    master = array(1, -2)
    slots = [np.zeros_like(master) for _ in SLOTS[section.optimizer]]
    seen = []
    for mean in means:
        server_step(section, master, mean, slots)
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


@pytest.mark.parametrize("name", SLOTS)
def test_everything_stays_float32(name: ServerOptimizerName) -> None:
    """No array is replaced or widened: they change in place."""
    master = array(1, 2)
    slots = [np.zeros_like(master) for _ in SLOTS[name]]
    server_step(ServerSection(optimizer=name), master, array(1, 1), slots)
    assert master.dtype == np.float32
    assert master.tolist() != [1, 2]
    assert all(slot.any() for slot in slots)
