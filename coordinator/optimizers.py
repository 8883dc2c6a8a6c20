"""Server optimizers: how the master moves by the mean delta of a round; plain functions over float32 arrays.

Each works in place on one tensor at a time, so that memory does not grow with the model, and uses only element-wise
multiplications and additions, which give the same bits on every machine.

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

SLOTS: Mapping[ServerOptimizerName, tuple[str, ...]] = MappingProxyType({"sgd": (), "momentum": ("momentum",)})
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


def server_step(section: ServerSection, master: F32Array, mean: F32Array, slots: Sequence[F32Array]) -> None:
    """Move one tensor's `master` by `mean` in place; `slots` in the order of SLOTS change in place; `mean` is used up.

    All arrays are float32 of one shape.
    """
    match section.optimizer:
        case "sgd":
            sgd(master, mean, section.lr)
        case "momentum":
            (slot,) = slots
            momentum(master, mean, slot, section.lr, section.momentum)
        case _:
            assert_never(section.optimizer)
