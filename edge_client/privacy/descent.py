"""The gradients of DP-SGD: records drawn by chance, each one's gradient clipped, their sum blurred.

Abadi et al. (arXiv 1607.00133), algorithm 1, with records in the place of examples. In each step

    S     = each record, by itself, with probability q                                      (Poisson sampling)
    g_r   = gradient of the sum over the windows of r of the task's loss, over all tensors that are trained
    grad  = (sum over r in S of g_r min(1, C / ||g_r||)  +  N(0, (sigma C)^2 I)) / (q records)

S may be empty; then the step is noise alone. What becomes of `grad` (the optimizer, the codec, the merge) is
post-processing and costs nothing.

A record's gradient is computed by a backward pass of its own. Opacus' hooks give the gradient of each window instead,
and keep all of them at once: windows times parameters, 1.4 GB a window for the top six layers of LLaMA-3.2-1B. One
pass a record needs one gradient, takes any model and adapter as it is, and was the quicker one for notes of the usual
length (docs/privacy.md has the measurements; a test holds the two to the same numbers). Where the site wants it, short
records share a pass (`ghost`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import structlog
import torch

from edge_client.batches import Batch
from edge_client.data import AnyNote
from edge_client.model import LoadedModel
from edge_client.prefix import MEMORY, Forward
from edge_client.prefix_store import Keep
from edge_client.privacy.accounting import charge_of, spend, steps_of
from edge_client.privacy.chance import Chance
from edge_client.privacy.clipping import clip_factor
from edge_client.privacy.ghost import add_clipped_together, unsuited
from edge_client.privacy.ledger import Charge, Limit, Spent
from edge_client.privacy.records import SHORT, WINDOWS_AT_ONCE, Records, grouped, make_records
from edge_client.trainer import Descent
from shared.config import Clipping, FederationConfig, PrivacySection
from shared.errors import ConfigError, RefusedError

log = structlog.get_logger("worker")


@dataclass(frozen=True, slots=True)
class Private:
    """A site's notes by record, how they are protected, and what one update costs them."""

    records: Records
    section: PrivacySection
    charge: Charge
    together: int
    """Records of at most so many tokens share a pass; 0: none do."""

    def spend(self, so_far: Sequence[Charge], limits: Sequence[Limit]) -> Spent:
        """What all trainings come to with one more; errors as `accounting.spend`."""
        return spend(self.charge, so_far, limits, self.section.delta)

    def descent(self, loaded: LoadedModel) -> Descent:
        """The gradients of one update."""
        return private_descent(loaded, self.records, self.charge, self.section.clip_norm, together=self.together)


def make_private(
    loaded: LoadedModel,
    notes: Sequence[AnyNote],
    federation: FederationConfig,
    section: PrivacySection,
    clipping: Clipping = "record",
    keep: Keep = MEMORY,
) -> Private:
    """Return what a federation with `[privacy]` trains on, and say in the log what one update costs, and how it clips.

    `keep` takes the frozen prefix.

    RefusedError(rule='note-missing') when no record has a window, ConfigError when `clipping` is "ghost" and a layer
    cannot be; other errors as `make_records` and `charge_of`.
    """
    together, how = _together(loaded, clipping)
    records = make_records(loaded, notes, keep)
    count = len(records.spans)
    if not records.data.prepared.batches:
        raise RefusedError("the notes hold nothing to train on", rule="note-missing", hint="check the notes' folder")
    if section.delta * count >= 1:
        log.warning(
            "delta-is-large",
            delta=section.delta,
            records=count,
            consequence="a mechanism that gives one record away whole would count as private; lower privacy.delta",
        )
    charge = charge_of(section, federation.training, records=count, versions=federation.federation.versions)
    log.info("private", records=count, **charge.model_dump(), clipping=how)
    return Private(records, section, charge, together)


def _together(loaded: LoadedModel, clipping: Clipping) -> tuple[int, str]:
    """Return the tokens up to which records share a pass, and how to say it."""
    if clipping == "record":
        return 0, "record"
    layer = unsuited(loaded.model)
    if layer and clipping == "ghost":
        raise ConfigError(
            f'site.toml: privacy.clipping = "ghost" cannot tell records apart in a trained layer of type {layer}',
            hint='set it to "record", or train blocks or adapters alone: [layers] plan in federation.toml',
        )
    if layer:
        return 0, f"record, because of {layer}"
    if clipping == "auto":
        return SHORT, f"ghost up to {SHORT} tokens"
    return WINDOWS_AT_ONCE * loaded.max_length, "ghost"


@dataclass(frozen=True, slots=True)
class RecordGradient:
    """What one record asks for: a gradient for each trained tensor, and the mean loss of its windows."""

    tensors: tuple[torch.Tensor, ...]
    loss: float


def private_descent(
    loaded: LoadedModel, records: Records, charge: Charge, clip_norm: float, *, together: int = 0
) -> Descent:
    """Return the gradients of a training that costs `charge`, with a secret of its own.

    Records of one batch with at most `together` tokens share passes, which hold no more tokens than a batch may.
    No seed goes in: two trainings with the same arguments give different updates, or noise could be taken off again.
    """
    chance, batches = Chance(), records.data.prepared.batches
    parameters = _trained(loaded)
    expected = charge.sample_rate * len(records.spans)

    def gradient(forward: Forward, _step: int) -> float:
        drawn = np.flatnonzero(chance.uniform(len(records.spans)) < charge.sample_rate)
        sums = {parameter: torch.zeros_like(parameter) for parameter in parameters}
        loss, short = 0.0, []
        for record in drawn:
            own = [batches[place] for place in records.spans[record]]
            if len(own) == 1 and own[0].ids.numel() <= together:
                short += own
            else:
                loss += add_clipped([*sums.values()], record_gradient(loaded, forward, own), clip_norm)
        for group in grouped(short, WINDOWS_AT_ONCE * loaded.max_length):
            loss += add_clipped_together(sums, loaded, forward, group, clip_norm)
        for parameter, total in sums.items():
            noise = torch.from_numpy(chance.normal(total.numel())).view_as(total)
            parameter.grad = ((total + charge.noise_multiplier * clip_norm * noise) / expected).float()
        return loss / expected

    return Descent(charge.steps, steps_of(charge.sample_rate, epochs=1), gradient)


def record_gradient(loaded: LoadedModel, forward: Forward, batches: Sequence[Batch]) -> RecordGradient:
    """Return the gradient of the summed loss of a record's windows, all of which are in `batches`.

    The loss is the task's, window by window, so that what one window asks for does not depend on its neighbours.
    """
    parameters = _trained(loaded)
    sums = [torch.zeros_like(parameter) for parameter in parameters]
    total, windows = 0.0, 0
    for batch in batches:
        logits = forward(batch)
        rows = zip(torch.split(logits, 1), torch.split(batch.targets, 1), strict=True)
        loss = torch.stack([loaded.task.loss(*row) for row in rows]).sum()
        parts = torch.autograd.grad(loss, parameters, materialize_grads=True)
        torch._foreach_add_(sums, list(parts))
        total, windows = total + loss.item(), windows + len(batch.windows)
    return RecordGradient(tuple(sums), total / max(1, windows))


def add_clipped(sums: Sequence[torch.Tensor], asked: RecordGradient, clip_norm: float) -> float:
    """Add a record's gradient to `sums`, in place, scaled down to at most `clip_norm`; return its loss.

    A gradient without a norm below NORM_MAX adds nothing, and its loss is 0: whatever a record holds, it moves the sum
    by no more than the bound.
    """
    squares = [torch.linalg.vector_norm(each, dtype=torch.float64).square() for each in asked.tensors]
    factor = clip_factor(torch.stack(squares).sum().sqrt().item(), asked.loss, clip_norm)
    if not factor:
        return 0.0
    for total, each in zip(sums, asked.tensors, strict=True):
        total.add_(each, alpha=factor)
    return asked.loss


def _trained(loaded: LoadedModel) -> tuple[torch.nn.Parameter, ...]:
    """All that a step changes, by name, whether or not it leaves the site: nothing may move that was not blurred."""
    return tuple(parameter for _, parameter in sorted(loaded.model.named_parameters()) if parameter.requires_grad)
