"""The frozen prefix: what enters the first trained block, computed once per data set instead of once per epoch.

With the top 6 of 16 blocks trained, ten blocks see the same windows with the same weights in every epoch of every
version. Their output is kept, batch by batch, and training runs the rest alone: the frozen blocks and the embeddings
step aside for modules that pass on what they get, and a hook hands the kept states to the first trained block.
Everything else (masks, positions, norms, head) is the model's own code, so that the two paths cannot drift apart. What
has stepped aside need not be in memory; with states that a site has kept from an earlier start it never comes there.

The frozen part runs in evaluation mode in both paths: dropout in weights that do not learn would only add noise, and
could not be kept.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
import transformers
from torch import nn

from edge_client.batches import Batch
from edge_client.model import LoadedModel
from edge_client.prefix_store import DTYPES, HiddenSpec, InMemory, Keep, NotKeptError, Rows
from shared.config import StateDType

LIMIT_BYTES = 1 << 30
"""Hidden states kept in memory for one data set: 1 GiB, about 2.1 million tokens at width 128, 130,000 at 2048."""

MEMORY = InMemory(LIMIT_BYTES)
"""Where states are kept that are not worth a place on the disk."""

FORMAT = 1
"""Raised when the same key would stand for other bytes."""

DISAGREEMENT: Mapping[StateDType, float] = MappingProxyType({"f32": 1e-5, "f16": 1e-2, "bf16": 5e-2})
"""How far logits from kept states may be from the whole model's, as a share of the greatest of these.

In f32 equal bits are what the processors tried give; an accelerator may choose another kernel for the same product. The
others have 11 and 8 significant bits, and each block above may double what they round."""

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


def prepare(loaded: LoadedModel, batches: Sequence[Batch], keep: Keep = MEMORY) -> Prepared:
    """Return `batches` with the states that enter the first trained block; without them, and saying why, where not.

    They are not kept when the embeddings or block 0 are trained, when `keep` has no room or its type cannot hold them,
    and when the logits computed from them differ from the whole model's (tried on one batch, before they are kept).
    """
    try:
        _check_suited(loaded, batches)
        spec = _spec(loaded, batches, keep.dtype)
        rows = keep.find(spec)
        if rows is None:
            keep.check(spec)
            with loaded.weights.whole(loaded.model):
                _check_agrees(loaded, batches[0], keep.dtype)
                with closing(_states(loaded, batches, keep.dtype)) as states:
                    rows = keep.put(spec, states)
    except NotKeptError as why:
        keep.clear()
        return Prepared(tuple(batches), 0, str(why))
    return Prepared(tuple(_with_states(batches, rows)), loaded.layers[0], "")


@contextmanager
def forward_pass(loaded: LoadedModel, prepared: Prepared) -> Iterator[Forward]:
    """Give the function from batch to logits: the trained blocks alone where states are kept, else the whole model.

    Inside the context a model that runs from kept states is without its frozen blocks; export it outside.
    """
    if prepared.cached:
        with _suffix(loaded, prepared.first_block) as forward:
            yield forward
    else:
        with loaded.weights.whole(loaded.model):
            yield lambda batch: _logits(loaded, batch)


@contextmanager
def _suffix(loaded: LoadedModel, first: int) -> Iterator[Forward]:
    model, blocks = loaded.model, _blocks(loaded)
    embeddings, feed = model.get_input_embeddings(), _Feed()

    def forward(batch: Batch) -> torch.Tensor:
        assert batch.hidden is not None
        feed.hidden = batch.hidden()
        logits = _logits(loaded, batch)
        feed.hidden = None
        return logits

    with (
        _aside(blocks, range(first)),
        blocks[first].register_forward_pre_hook(lambda _, args: (feed.hidden, *args[1:])),
    ):
        model.set_input_embeddings(feed)
        try:
            yield forward
        finally:
            model.set_input_embeddings(embeddings)


def _logits(loaded: LoadedModel, batch: Batch) -> torch.Tensor:
    # Decoders fill a cache for generation unless told not to.
    options = {"use_cache": False} if loaded.family.causal else {}
    logits: torch.Tensor = loaded.model(input_ids=batch.ids, attention_mask=batch.mask, **options).logits
    return logits


class _Feed(nn.Module):
    """Stands where the embeddings were and gives a batch's kept states, in whose shape the model then thinks."""

    hidden: torch.Tensor | None = None

    def forward(self, _ids: torch.Tensor) -> torch.Tensor | None:
        return self.hidden


class _PassOn(nn.Module):
    """Stands where a block was and returns the hidden states as they came."""

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return hidden_states


def _check_suited(loaded: LoadedModel, batches: Sequence[Batch]) -> None:
    if loaded.full:
        raise NotKeptError("the embeddings are trained")
    if loaded.layers[0] == 0:
        raise NotKeptError("block 0 is trained: nothing below it is frozen but the embeddings")
    if not batches:
        raise NotKeptError("there are no batches")


def _spec(loaded: LoadedModel, batches: Sequence[Batch], dtype: StateDType) -> HiddenSpec:
    """The states' extent, and a digest of all that their bits follow from: weights, tokens, and who multiplies how."""
    config = loaded.model.config
    origin = {
        "format": FORMAT,
        "frozen": loaded.frozen_sha256,
        "config": {key: value for key, value in config.to_dict().items() if key != "_name_or_path"},
        "attention": config._attn_implementation,  # noqa: SLF001 - it has no public name
        "block": loaded.layers[0],
        "dtype": dtype,
        "versions": [torch.__version__, transformers.__version__],
        "threads": torch.get_num_threads(),
    }
    digest = hashlib.sha256(json.dumps(origin, sort_keys=True, default=str).encode())
    for batch in batches:
        for tensor in (batch.ids, batch.mask):
            digest.update(b"none" if tensor is None else repr(tuple(tensor.shape)).encode() + tensor.numpy().tobytes())
    tokens = sum(batch.ids.numel() for batch in batches)
    return HiddenSpec(digest.hexdigest(), tokens, config.hidden_size, dtype)


def _with_states(batches: Sequence[Batch], rows: Rows) -> Iterator[Batch]:
    at = 0
    for batch in batches:
        yield replace(batch, hidden=_reader(rows, at, batch.ids.shape))
        at += batch.ids.numel()


def _reader(rows: Rows, begin: int, shape: torch.Size) -> Callable[[], torch.Tensor]:
    return lambda: rows(begin, begin + shape.numel()).float().view(*shape, -1)


@torch.no_grad()
def _states(loaded: LoadedModel, batches: Sequence[Batch], dtype: StateDType) -> Generator[torch.Tensor]:
    """What enters the first trained block, batch by batch, each (tokens, width)."""
    blocks, first = _blocks(loaded), loaded.layers[0]
    caught: list[torch.Tensor] = []
    loaded.model.eval()
    with (
        _aside(blocks, range(first, loaded.depth)),
        blocks[first].register_forward_pre_hook(lambda _, args: caught.append(args[0])),
    ):
        for batch in batches:
            _logits(loaded, batch)
            states = caught.pop().to(DTYPES[dtype])
            if not states.isfinite().all():
                raise NotKeptError(f"the states do not fit {dtype}")
            yield states.flatten(0, 1)


@torch.no_grad()
def _check_agrees(loaded: LoadedModel, batch: Batch, dtype: StateDType) -> None:
    (states,) = _states(loaded, [batch], dtype)
    (kept,) = _with_states([batch], lambda begin, end: states[begin:end])
    with _suffix(loaded, loaded.layers[0]) as forward:
        cached = forward(kept)
    whole = _logits(loaded, batch)
    # A comparison with a number that is not finite is false.
    if not (cached - whole).abs().max() <= DISAGREEMENT[dtype] * whole.abs().max():
        raise NotKeptError("the logits computed from kept states differ from the whole model's")


def _blocks(loaded: LoadedModel) -> nn.ModuleList:
    blocks = loaded.model.get_submodule(loaded.family.blocks)
    assert isinstance(blocks, nn.ModuleList)
    return blocks


@contextmanager
def _aside(blocks: nn.ModuleList, indices: range) -> Iterator[None]:
    """Replace the blocks `indices` by pass-ons; put them back."""
    away = {index: blocks[index] for index in indices}
    for index in away:
        blocks[index] = _PassOn()
    try:
        yield
    finally:
        for index, block in away.items():
            blocks[index] = block
