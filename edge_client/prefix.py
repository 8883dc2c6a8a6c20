"""The frozen prefix: what enters the first trained block, computed once per data set instead of once per epoch.

With the top 6 of 16 blocks trained, ten blocks see the same windows with the same weights in every epoch of every
version. Their output is kept, batch by batch, and training runs the rest alone: the frozen blocks step aside for
modules that pass their input on, and a hook hands the kept states to the first trained block. Everything else (masks,
positions, norms, head) is the model's own code, so that the two paths cannot drift apart.

The frozen part runs in evaluation mode in both paths: dropout in weights that do not learn would only add noise, and
could not be kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from edge_client.batches import Batch
from edge_client.model import LoadedModel

LIMIT_BYTES = 1 << 30
"""Hidden states kept in memory for one data set: 1 GiB, about 2.1 million tokens at width 128, 130,000 at 2048."""

Forward = Callable[[Batch], torch.Tensor]
"""A batch into logits, float32 (windows, longest, classes), or (windows, classes) of a head for whole windows."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """The batches of a data set, with hidden states where they are kept."""

    batches: tuple[Batch, ...]
    first_block: int
    """The block that the kept states enter; 0 when none are kept."""
    reason: str
    """Why no states are kept; empty when they are. Whoever trains for long on these batches says it."""

    @property
    def cached(self) -> bool:
        """True when training runs the trained blocks alone."""
        return not self.reason


def prepare(loaded: LoadedModel, batches: Sequence[Batch], *, limit_bytes: int = LIMIT_BYTES) -> Prepared:
    """Return `batches` with the states that enter the first trained block; without them, and saying why, where not.

    They are not kept when the embeddings or block 0 are trained, when they would take more than `limit_bytes`, and when
    the logits computed from them differ from the whole model's (tried on one batch).
    """
    reason = _unsuited(loaded, batches, limit_bytes)
    if not reason:
        kept = Prepared(_with_states(loaded, batches), loaded.layers[0], "")
        if _agrees(loaded, kept):
            return kept
        reason = "the logits computed from kept states differ from the whole model's"
    return Prepared(tuple(batches), 0, reason)


@contextmanager
def forward_pass(loaded: LoadedModel, prepared: Prepared) -> Iterator[Forward]:
    """Give the function from batch to logits: the trained blocks alone where states are kept, else the whole model.

    Inside the context the frozen blocks are not in the model; export it outside.
    """
    model = loaded.model

    def whole(batch: Batch) -> torch.Tensor:
        logits: torch.Tensor = model(input_ids=batch.ids, attention_mask=batch.mask, **_options(loaded)).logits
        return logits

    if not prepared.cached:
        yield whole
        return
    blocks = _blocks(loaded)
    feed: list[torch.Tensor] = []

    def hand_over(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (feed.pop(), *args[1:])

    def suffix(batch: Batch) -> torch.Tensor:
        assert batch.hidden is not None
        feed.append(batch.hidden)
        return whole(batch)

    with (
        _aside(blocks, range(prepared.first_block)),
        blocks[prepared.first_block].register_forward_pre_hook(hand_over),
    ):
        yield suffix


class _PassOn(nn.Module):
    """Stands where a block was and returns the hidden states as they came."""

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return hidden_states


def _unsuited(loaded: LoadedModel, batches: Sequence[Batch], limit_bytes: int) -> str:
    if loaded.full:
        return "the embeddings are trained"
    if loaded.layers[0] == 0:
        return "block 0 is trained: nothing below it is frozen but the embeddings"
    if not batches:
        return "there are no batches"
    needed = sum(batch.ids.numel() for batch in batches) * loaded.model.config.hidden_size * 4
    if needed > limit_bytes:
        return f"the states would take {needed >> 20} MiB, more than {limit_bytes >> 20} MiB"
    return ""


@torch.no_grad()
def _with_states(loaded: LoadedModel, batches: Sequence[Batch]) -> tuple[Batch, ...]:
    blocks, first = _blocks(loaded), loaded.layers[0]
    caught: list[torch.Tensor] = []
    loaded.model.eval()
    with (
        _aside(blocks, range(first, loaded.depth)),
        blocks[first].register_forward_pre_hook(lambda _, args: caught.append(args[0])),
    ):
        done = []
        for batch in batches:
            loaded.model(input_ids=batch.ids, attention_mask=batch.mask, **_options(loaded))
            done.append(replace(batch, hidden=caught.pop()))
    return tuple(done)


@torch.no_grad()
def _agrees(loaded: LoadedModel, kept: Prepared) -> bool:
    batch = kept.batches[0]
    loaded.model.eval()
    with forward_pass(loaded, kept) as forward:
        cached = forward(batch)
    with forward_pass(loaded, replace(kept, reason="the reference")) as forward:
        whole = forward(batch)
    # Equal bits are what the processors tried give; an accelerator may choose another kernel for the same product.
    return torch.allclose(cached, whole, rtol=1e-4, atol=1e-5)


def _blocks(loaded: LoadedModel) -> nn.ModuleList:
    blocks = loaded.model.get_submodule(loaded.family.blocks)
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def _options(loaded: LoadedModel) -> dict[str, bool]:
    """Decoders fill a cache for generation unless told not to."""
    return {"use_cache": False} if loaded.family.causal else {}


@contextmanager
def _aside(blocks: nn.ModuleList, indices: range) -> Iterator[None]:
    """Replace the blocks `indices` by pass-ons; puts them back."""
    away = {index: blocks[index] for index in indices}
    for index in away:
        blocks[index] = _PassOn()
    try:
        yield
    finally:
        for index, block in away.items():
            blocks[index] = block
