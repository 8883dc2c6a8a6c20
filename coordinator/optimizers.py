"""Server optimizers: how the master moves by the mean delta of a round; plain functions over float32 arrays.

Each works in place on one tensor at a time, so that memory does not grow with the model, and uses only element-wise
additions, multiplications, divisions and square roots, which IEEE 754 rounds the same way on every machine.

In the formulas x is the master, m the mean delta (a step downhill, the negative of a gradient), lr the rate, b1
`momentum`, b2 `beta2`; u, v, w and d are slots, zero at first.

A tensor that no update of a round holds is not stepped at all: master and slots stay as they are. To feed a zero mean
instead would let an old momentum move a tensor about which nobody said anything, and let it fade where sites of
greater depth come rarely.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import assert_never

import numpy as np

from shared.config import ServerOptimizerName, ServerSection
from shared.tensorfile import F32Array

SLOTS: Mapping[ServerOptimizerName, tuple[str, ...]] = MappingProxyType(
    {
        "sgd": (),
        "momentum": ("momentum",),
        "nesterov": ("momentum",),
        "adam": ("momentum", "variance"),
        "yogi": ("momentum", "variance"),
        "fadas": ("momentum", "variance", "peak"),
        "delayed-nesterov": ("momentum", "gathered"),
    }
)
"""Names of the float32 arrays, each of the tensor's shape and zero at first, that an optimizer keeps per tensor."""


def sgd(master: F32Array, mean: F32Array, lr: float) -> None:
    """Plain step: x <- x + lr m, in place; m is used up.

    McMahan et al., arXiv 1602.05629, algorithm 1 (lr 1); Nguyen et al., arXiv 2106.06639, algorithm 1 (eta_g).
    """
    np.multiply(mean, np.float32(lr), out=mean)
    np.add(master, mean, out=master)


def momentum(master: F32Array, mean: F32Array, slot: F32Array, lr: float, beta: float) -> None:
    """Heavy ball: v <- beta v + m; x <- x + lr v, in place; m is used up.

    FedAvgM: Hsu et al., arXiv 1909.06335, section 4.3, with the server's learning rate of Reddi et al., arXiv
    2003.00295. No damping factor 1 - beta: a constant mean ends at a step of lr m / (1 - beta).
    """
    np.multiply(slot, np.float32(beta), out=slot)
    np.add(slot, mean, out=slot)
    np.multiply(slot, np.float32(lr), out=mean)
    np.add(master, mean, out=master)


def nesterov(master: F32Array, mean: F32Array, slot: F32Array, lr: float, beta: float) -> None:
    """Nesterov's momentum: u <- b1 u + m; x <- x + lr (m + b1 u), in place; m is used up.

    The outer optimizer of DiLoCo: Douillard et al., arXiv 2311.08105, algorithm 1, in the form of Sutskever et al.
    (2013) that deep learning libraries use. Unstable when deltas are late; `delayed_nesterov` is for those.
    """
    np.multiply(slot, np.float32(beta), out=slot)
    np.add(slot, mean, out=slot)
    np.add(mean, slot * np.float32(beta), out=mean)
    np.multiply(mean, np.float32(lr), out=mean)
    np.add(master, mean, out=master)


def adam(master: F32Array, mean: F32Array, slots: Sequence[F32Array], section: ServerSection) -> None:
    """FedAdam: u <- b1 u + (1 - b1) m; v <- b2 v + (1 - b2) m^2; x <- x + lr u / (sqrt(v) + eps), in place.

    Reddi et al., arXiv 2003.00295, algorithm 2, without bias correction as there; v starts at 0 and not at eps^2.
    """
    first, second = slots
    _decay(first, mean, section.momentum)
    _decay(second, np.multiply(mean, mean, out=mean), section.beta2)
    _adaptive_step(master, first, second, section.rate, section.eps, out=mean)


def yogi(master: F32Array, mean: F32Array, slots: Sequence[F32Array], section: ServerSection) -> None:
    """FedYogi: as `adam`, but v <- v - (1 - b2) m^2 sign(v - m^2), in place.

    Reddi et al., arXiv 2003.00295, algorithm 2: v falls by no more than m^2, so that a quiet round does not make the
    next step large.
    """
    first, second = slots
    _decay(first, mean, section.momentum)
    np.multiply(mean, mean, out=mean)
    sign = np.sign(second - mean)
    np.multiply(mean, np.float32(1 - section.beta2), out=mean)
    np.subtract(second, np.multiply(mean, sign, out=mean), out=second)
    _adaptive_step(master, first, second, section.rate, section.eps, out=mean)


def fadas(master: F32Array, mean: F32Array, slots: Sequence[F32Array], section: ServerSection, late: int) -> None:
    """FADAS: u and v as `adam`; w <- max(w, v); x <- x + lr' u / (sqrt(w) + eps), in place.

    Wang et al., arXiv 2407.18365: AMSGrad over a buffer, with lr' = lr, or lr / late when the latest
    update of the buffer is `late` versions late and that is more than `slow_after`. Accounts of the paper differ: where
    one has min(lr, 1 / late), no update is slowed that is less than 1 / lr versions late.
    """
    first, second, peak = slots
    _decay(first, mean, section.momentum)
    _decay(second, np.multiply(mean, mean, out=mean), section.beta2)
    np.maximum(peak, second, out=peak)
    rate = section.rate / late if late > section.slow_after else section.rate
    _adaptive_step(master, first, peak, rate, section.eps, out=mean)


def delayed_nesterov(
    master: F32Array, mean: F32Array, slots: Sequence[F32Array], section: ServerSection, version: int
) -> None:
    """Delayed Nesterov: the momentum moves in every N-th version, by the mean of those since; in place.

    d <- d + m; in versions that N divides u <- b1 u + d / N, x <- x + lr (b1 u + m / N), d <- 0; in the others
    x <- x + lr m / N. Liu et al., arXiv 2401.09135. Of a tensor that no update of such a version holds, d goes on to
    the next: its momentum then moves by more than a mean.
    """
    first, gathered = slots
    np.add(gathered, mean, out=gathered)
    share = np.float32(1 / section.every)
    np.multiply(mean, share, out=mean)
    if version % section.every == 0:
        np.multiply(first, np.float32(section.momentum), out=first)
        np.add(first, gathered * share, out=first)
        gathered.fill(0)
        np.add(mean, first * np.float32(section.momentum), out=mean)
    np.multiply(mean, np.float32(section.rate), out=mean)
    np.add(master, mean, out=master)


def server_step(
    section: ServerSection, master: F32Array, mean: F32Array, slots: Sequence[F32Array], *, version: int, late: int
) -> None:
    """Move one tensor's `master` by `mean` in place; `slots` in the order of SLOTS change in place; `mean` is used up.

    All arrays are float32 of one shape. `version` is the one that is made, `late` the greatest staleness in it.
    """
    match section.optimizer:
        case "sgd":
            sgd(master, mean, section.rate)
        case "momentum":
            momentum(master, mean, slots[0], section.rate, section.momentum)
        case "nesterov":
            nesterov(master, mean, slots[0], section.rate, section.momentum)
        case "adam":
            adam(master, mean, slots, section)
        case "yogi":
            yogi(master, mean, slots, section)
        case "fadas":
            fadas(master, mean, slots, section, late)
        case "delayed-nesterov":
            delayed_nesterov(master, mean, slots, section, version)
        case _:
            assert_never(section.optimizer)


def _decay(slot: F32Array, value: F32Array, beta: float) -> None:
    """A running mean: slot <- beta slot + (1 - beta) value."""
    np.multiply(slot, np.float32(beta), out=slot)
    np.add(slot, value * np.float32(1 - beta), out=slot)


def _adaptive_step(
    master: F32Array, first: F32Array, second: F32Array, lr: float, eps: float, *, out: F32Array
) -> None:
    """Move x by lr first / (sqrt(second) + eps); `out` is room for it."""
    np.sqrt(second, out=out)
    np.add(out, np.float32(eps), out=out)
    np.divide(first, out, out=out)
    np.multiply(out, np.float32(lr), out=out)
    np.add(master, out, out=master)
