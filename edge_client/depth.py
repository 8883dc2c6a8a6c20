"""How deep this site trains: the topmost blocks of the federation's plan, as many as its own limits allow.

Decided at the site, once for each start, and told by what its updates hold: tensors that another site trains are not in
them, and the merge takes each tensor from those who have it. Blocks that are not trained here change all the same, with
every version; so the outputs that are kept (`edge_client.prefix`) are those of the federation's frozen blocks, and what
lies between them and the lowest block trained here runs in each step, without gradients.

Memory and time are estimates. Memory: what the process has now, with model and notes, or has taken of its GPU's; for
each trained parameter its gradient and AdamW's two moments, and what `training.proximal` and `[privacy]` keep beside
them (the delta is made when they are gone, and of the published state there is one tensor at a time); and RETAINED
times what one forward pass of the largest batch keeps for the backward pass. Time: one step of a batch of middling
size, for all the tokens of an update.
"""

from __future__ import annotations

import resource
import sys
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from edge_client.batches import Batch
from edge_client.device import Device
from edge_client.model import LoadedModel, read_personal, read_trainable, shapes_within, train_only
from edge_client.prefix import Prepared, forward_pass
from edge_client.trainer import Dataset, train
from shared import codec
from shared.config import FederationConfig, LocalLayersSection, TrainingSection
from shared.errors import ConfigError
from shared.plan import Blocks

MIB = 1 << 20
PER_TRAINED = 3 * 4
"""Bytes for each trained parameter: gradient, first and second moment; float32."""
PER_PROXIMAL = 2 * 4
"""Bytes for each trained parameter that is held to where it started: that, and how far it has moved."""
PER_PRIVATE = 3 * 4
"""Bytes for each trained parameter under `[privacy]`: sums of a record and of a batch, and a part of one."""
RETAINED = 2.5
"""What the process grows by for each byte that is alive at once: glibc keeps much of what was freed.

Seen with the shipped model, 1, 4 and 12 blocks trained: 2.5, 2.4 and 2.1. Tensors above 32 MiB are given back at once,
so that it is too careful for large models."""

Measure = Callable[[Blocks], float]
"""What training these blocks takes, in the unit of the limit that it is compared with."""


@dataclass(frozen=True, slots=True)
class Depth:
    """How many blocks this site trains."""

    blocks: int
    limit: str
    """The key that allows no more; empty when none does."""


def choose_depth(planned: Blocks, limits: LocalLayersSection, measures: Mapping[str, Measure]) -> Depth:
    """Return how many of the `planned` blocks, from the top, respect each of the limits.

    `measures` by the limit's key; what is measured grows with the blocks. ConfigError when a limit does not even allow
    the topmost one.
    """
    count = min(len(planned), limits.at_most or len(planned))
    limit = "at_most" if count < len(planned) else ""
    for key, measure in measures.items():
        allowed = getattr(limits, key)
        if allowed is not None:
            fitting = _most(planned, count, allowed, measure)
            if fitting == 0:
                raise ConfigError(
                    f"site.toml: layers.{key} = {allowed:g} does not allow block {planned[-1]} alone, which takes "
                    f"{measure(planned[-1:]):.4g}",
                    hint=f"raise layers.{key}, or leave the federation to sites that can train",
                )
            count, limit = fitting, key if fitting < count else limit
    return Depth(count, limit)


def _most(planned: Blocks, count: int, allowed: float, measure: Measure) -> int:
    """The largest number up to `count` of topmost blocks that stays within `allowed`; all are tried first."""
    if measure(planned[-count:]) <= allowed:
        return count
    return bisect_left(range(1, count), True, key=lambda blocks: measure(planned[-blocks:]) > allowed)


def measures(loaded: LoadedModel, data: Dataset, federation: FederationConfig) -> Mapping[str, Measure]:
    """Return how each limit is measured on this model and these notes, cheapest first.

    Measuring time trains single steps, measuring memory moves gradients: a state is to be applied afterwards, and
    `train_only` called.
    """
    up, training = federation.codec.up, federation.training
    each = PER_TRAINED + bool(training.proximal) * PER_PROXIMAL + bool(federation.privacy) * PER_PRIVATE
    return {
        "upload_mib": lambda blocks: codec.data_bytes(shapes_within(loaded, blocks), up) / MIB,
        "memory_mib": lambda blocks: _memory_bytes(train_only(loaded, blocks), data.prepared, each) / MIB,
        "seconds": lambda blocks: _seconds(train_only(loaded, blocks), data, training),
    }


def _memory_bytes(loaded: LoadedModel, prepared: Prepared, each: int) -> int:
    """With so many bytes for each trained parameter."""
    held = each * sum(parameter.numel() for parameter in loaded.trained.values())
    return _held_bytes(loaded.device) + held + int(RETAINED * _kept_bytes(loaded, prepared))


def _kept_bytes(loaded: LoadedModel, prepared: Prepared) -> int:
    """What one forward pass of the largest batch keeps for the backward pass, beyond the model's own parameters."""
    batch = max(prepared.batches, key=_tokens)
    shared = {parameter.untyped_storage().data_ptr() for parameter in loaded.model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in shared:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        forward_pass(loaded, prepared) as forward,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        # Held until all are counted: while the graph lives no address is used twice.
        loss = loaded.loss(forward(batch), batch.targets)
    del loss
    return sum(kept.values())


def _seconds(loaded: LoadedModel, data: Dataset, training: TrainingSection) -> float:
    batches = sorted(data.prepared.batches, key=_tokens)
    middle = batches[len(batches) // 2]
    one = replace(data, prepared=replace(data.prepared, batches=(middle,)))
    section = training.model_copy(update={"epochs": 1})
    state = read_trainable(loaded) | read_personal(loaded)
    # The first step pays for what is set up once.
    *_, took = (train(loaded, state, one, section, seed=0).metrics["seconds"] for _ in range(2))
    return took * training.epochs * sum(map(_tokens, batches)) / _tokens(middle)


def _tokens(batch: Batch) -> int:
    return batch.ids.numel()


def _held_bytes(device: Device) -> int:
    """The GPU's memory that is taken, or this process's memory, now; or, untold by the system, the most it ever was."""
    if device.is_gpu:
        return torch.cuda.memory_allocated(device.at)
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
