"""Ghost clipping: the clipped gradients of several records, summed, by one backward pass for all of them.

For a linear layer let a_t be what enters it at a token t and b_t what the loss wants of what comes out. Then the
gradient of a record, and its squared length, are sums over the tokens of all its windows:

    g_r = sum_t b_t a_t^T        ||g_r||^2 = sum_s sum_t (a_s . a_t) (b_s . b_t)

The second needs no g_r (Goodfellow, arXiv 1510.01799; with tokens Li et al., arXiv 2110.05679, section 4), and is
taken where it is the quicker one, layer by layer (Bu et al., arXiv 2205.10683). The lengths give each record's factor
c_r, and sum_r c_r g_r is the same product once more, over the tokens of all records, with c_r b_t in the place of b_t:
there is no second backward pass (Bu et al., arXiv 2210.00038). Norms and biases have gradients that are no longer than
a token, and these are formed.

Opacus' ghost clipping takes each window for a record, and goes backwards twice; a test holds the lengths here to its.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from edge_client.batches import Batch, side_by_side
from edge_client.model import LoadedModel
from edge_client.prefix import Forward
from edge_client.privacy.clipping import clip_factor

DOUBLE = 2.0
"""What a product costs in double precision, in those of single precision."""


@dataclass(frozen=True, slots=True)
class _Use:
    """A layer's part in a pass, (windows, tokens, width) or (windows, width)."""

    layer: nn.Module
    entered: torch.Tensor
    """Of a norm what it has made of it, before weight and bias."""
    asked: torch.Tensor
    """The gradient of the loss by what came out."""


def unsuited(model: nn.Module) -> str:
    """Return the type of a trained layer whose records cannot be told apart here; empty when all can.

    Those of an embedding cannot, as positions are looked up once for all windows, nor those of a tensor that two share.
    """
    seen: set[nn.Parameter] = set()
    for layer in _trained_layers(model):
        own = {parameter for parameter in layer.parameters(recurse=False) if parameter.requires_grad}
        if not (isinstance(layer, nn.Linear | Conv1D) or _is_norm(layer)) or own & seen:
            return type(layer).__name__
        seen |= own
    return ""


def add_clipped_together(
    sums: Mapping[nn.Parameter, torch.Tensor],
    loaded: LoadedModel,
    forward: Forward,
    records: Sequence[Batch],
    clip_norm: float,
) -> float:
    """Add the gradients of `records`, each scaled down to at most `clip_norm`, to `sums`, in place; return their loss.

    Each record is one batch. As `record_gradient` and `add_clipped` for one after the other: the loss is the task's,
    window by window, and a record without a finite gradient adds nothing. The model must not be `unsuited`.
    """
    per_token = loaded.task.head.per_token
    batch = side_by_side(records, pad_id=loaded.pad_id, causal=loaded.family.causal, per_token=per_token)
    uses, losses = _passed(loaded, forward, batch)
    counts = [len(record.windows) for record in records]
    spans = [slice(begin, end) for begin, end in pairwise(accumulate(counts, initial=0))]
    means = [losses[span].mean().item() for span in spans]
    norms = [math.sqrt(max(0.0, sum(_squared_length(use, span) for use in uses))) for span in spans]
    factors = [clip_factor(norm, mean, clip_norm) for norm, mean in zip(norms, means, strict=True)]
    by_window = [factor for factor, count in zip(factors, counts, strict=True) for _ in range(count)]
    kept = [place for place, factor in enumerate(by_window) if factor]
    scale = loaded.device.take(torch.tensor([by_window[place] for place in kept], dtype=torch.float32))
    for use in uses:
        scaled = use.asked[kept] * scale.view(-1, *[1] * (use.asked.ndim - 1))
        for parameter, gradient in _gradients(use.layer, use.entered[kept].flatten(0, -2), scaled.flatten(0, -2)):
            sums[parameter].add_(gradient)
    return sum(mean for mean, factor in zip(means, factors, strict=True) if factor)


def _passed(loaded: LoadedModel, forward: Forward, batch: Batch) -> tuple[list[_Use], torch.Tensor]:
    """Run a batch there and back; return what its layers saw, and the loss of each window."""
    with _watched(loaded.model) as calls:
        logits = forward(batch)
    rows = zip(torch.split(logits, 1), torch.split(loaded.device.take(batch.targets), 1), strict=True)
    losses = torch.stack([loaded.loss(*row) for row in rows])
    wanted = torch.autograd.grad(losses.sum(), [call.came_out for call in calls], materialize_grads=True)
    assert len({call.layer for call in calls}) == len(calls), (
        "a layer that runs twice would need both its parts at once"
    )
    assert all(len(asked) == len(batch.windows) for asked in wanted), (
        "a layer that mixes windows tells no records apart"
    )
    pairs = zip(calls, wanted, strict=True)
    uses = [_Use(call.layer, _inside(call.layer, call.entered), asked.float()) for call, asked in pairs]
    return uses, losses.detach()


@dataclass(frozen=True, slots=True)
class _Call:
    """One run of a layer."""

    layer: nn.Module
    entered: torch.Tensor
    came_out: torch.Tensor


@contextmanager
def _watched(model: nn.Module) -> Iterator[list[_Call]]:
    """Yield a list that gets each run of a layer that is trained."""
    calls: list[_Call] = []

    def note(layer: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        # In bf16 what is measured and what is added up are the same products, taken in float32.
        calls.append(_Call(layer, args[0].detach().float(), out))

    with ExitStack() as hooks:
        for layer in _trained_layers(model):
            hooks.enter_context(layer.register_forward_hook(note))
        yield calls


def _trained_layers(model: nn.Module) -> Iterator[nn.Module]:
    """Modules with trained tensors of their own."""
    for module in model.modules():
        if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
            yield module


def _is_norm(layer: nn.Module) -> bool:
    """Whether a layer is x -> weight * f(x) + bias for vectors weight and bias; each library has classes of its own."""
    own = dict(layer.named_parameters(recurse=False))
    vectors = all(values.ndim == 1 for values in own.values())
    return type(layer).__name__.endswith("Norm") and vectors and own.keys() <= {"weight", "bias"}


@torch.no_grad()
def _inside(layer: nn.Module, entered: torch.Tensor) -> torch.Tensor:
    if not _is_norm(layer):
        return entered
    own = layer.named_parameters(recurse=False)
    plain = {name: torch.ones_like(values) if name == "weight" else torch.zeros_like(values) for name, values in own}
    inside: torch.Tensor = functional_call(layer, plain, (entered,))
    return inside


def _squared_length(use: _Use, span: slice) -> float:
    """Of the gradient of some windows together; in double precision, as terms of both signs may cancel."""
    entered, asked = use.entered[span].flatten(0, -2), use.asked[span].flatten(0, -2)
    weight = use.layer.get_parameter("weight")
    cost = DOUBLE * len(entered) * (entered.shape[1] + asked.shape[1])
    ghost = weight.ndim > 1 and weight.requires_grad and cost < weight.numel()
    total = 0.0
    for _, gradient in _gradients(use.layer, entered, asked, without=weight if ghost else None):
        total += torch.linalg.vector_norm(gradient, dtype=torch.float64).square().item()
    if ghost:
        into, wanted = entered.double(), asked.double()
        total += ((into @ into.T) * (wanted @ wanted.T)).sum().item()
    return total


def _gradients(
    layer: nn.Module, entered: torch.Tensor, asked: torch.Tensor, *, without: nn.Parameter | None = None
) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
    """The gradients of a layer's trained tensors by tokens, (tokens, width)."""
    own = dict(layer.named_parameters(recurse=False))
    weight, bias = own["weight"], own.get("bias")
    if weight.requires_grad and weight is not without:
        if isinstance(layer, nn.Linear):
            yield weight, asked.T @ entered
        elif isinstance(layer, Conv1D):
            yield weight, entered.T @ asked
        else:
            yield weight, (asked * entered).sum(0)
    if bias is not None and bias.requires_grad:
        yield bias, asked.sum(0)
