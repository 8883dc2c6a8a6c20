"""How much each block matters to this site's notes: measured on a published state, over a few batches.

With g_b the gradient of batch b's mean loss by a block's parameters, and g their mean over the batches:

    gradient-norm            ||g||^2
    relative-gradient-norm   ||g||^2 / ||w||^2, w being the parameters
    snr                      sum of g^2 / sum of the variances of g_b over the batches, both over the parameters

The first is what Sun et al. (arXiv 2408.15600) select layers by; relative norm and signal-to-noise ratio are criteria
of Lee et al. (arXiv 2210.11466), the latter here as one ratio for the block, so that a single parameter without any
variance does not decide. Dropout is off. Gradients reach down to the lowest candidate, so that measuring takes the
memory of training all candidates, but for the optimizer's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import assert_never

import numpy as np
import torch

from edge_client import adapters
from edge_client.layers import block_of
from edge_client.model import LoadedModel, train_only
from edge_client.prefix import Prepared, forward_pass
from shared.config import ImportanceName

BATCHES = 8
"""Most batches that are looked at: a warm-up shall stay short beside an update."""

TINY = 1e-30
"""Stands for a variance or a norm of 0, so that every score is finite."""

ROUNDING = 1e-6
"""Share of a sum of squares that rounding may make."""

Tensors = Mapping[str, torch.Tensor]


def measure(loaded: LoadedModel, prepared: Prepared, by: ImportanceName, *, seed: int) -> dict[int, float]:
    """Return a score for each block that the federation may train, at the state that the model holds.

    The same arguments give the same scores.
    """
    candidates = train_only(loaded, loaded.layers)
    order = np.random.default_rng(seed).permutation(len(prepared.batches))[:BATCHES]
    parameters = {name: parameter for name, parameter in candidates.trained.items() if _block(loaded, name) is not None}
    sums = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    squares = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()} if by == "snr" else {}
    loaded.model.eval()
    with forward_pass(candidates, prepared) as forward:
        for index in order:
            batch = prepared.batches[index]
            loss = loaded.loss(forward(batch), batch.targets)
            gradients = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
            for name, gradient in zip(parameters, gradients, strict=True):
                sums[name] += gradient
                if squares:
                    squares[name] += gradient.square()
    of_block = {block: [name for name in parameters if _block(loaded, name) == block] for block in loaded.layers}
    return {block: _score(parameters, sums, squares, names, len(order), by) for block, names in of_block.items()}


def _score(
    parameters: Tensors, sums: Tensors, squares: Tensors, names: Sequence[str], count: int, by: ImportanceName
) -> float:
    """One block's score from the sums, and for snr the sums of squares, of its gradients over so many batches."""
    signal = sum(_squared(sums[name]) for name in names) / count**2
    match by:
        case "gradient-norm":
            return signal
        case "relative-gradient-norm":
            return signal / max(TINY, sum(_squared(parameters[name].detach()) for name in names))
        case "snr":
            total = sum(squares[name].double().sum().item() for name in names)
            # What float32 cannot tell from 0 is no variance: a single batch says that all blocks are alike.
            variance = max(total - count * signal, ROUNDING * total) / max(1, count - 1)
            return signal / max(TINY, variance)
        case _:
            assert_never(by)


def _squared(tensor: torch.Tensor) -> float:
    return tensor.double().square().sum().item()


def _block(loaded: LoadedModel, name: str) -> int | None:
    return block_of(name.removeprefix(adapters.PREFIX), loaded.family)
