"""Windows into batches of nearly equal length, once per data set.

The batches of a data set are drawn once and keep their members; training shuffles their order. So the hidden states
below the trained blocks can be kept batch by batch, in the very shapes in which they were computed, which is what
makes the cached path equal to the plain one bit for bit (a matrix product may round differently in another shape).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from edge_client.tasks import IGNORED, Window


@dataclass(frozen=True, slots=True)
class Batch:
    """Token ids, int64 of shape (windows, longest), padded on the right; the mask is 1 on tokens."""

    ids: torch.Tensor = field(repr=False)
    targets: torch.Tensor = field(repr=False)
    """Under a head per token as `ids`, IGNORED in the padding; otherwise the windows' own, stacked."""
    mask: torch.Tensor | None = field(repr=False)
    """None where it would change nothing: without padding, and in causal models, which never see what is right of a
    token; attention then takes its quicker path."""
    windows: tuple[Window, ...] = field(repr=False)
    hidden: Callable[[], torch.Tensor] | None = field(default=None, repr=False)
    """Gives what enters the first trained block, float32 (windows, longest, width), where it is kept."""


def make_batches(
    windows: Sequence[Window], *, size: int, pad_id: int, causal: bool, per_token: bool, seed: int
) -> tuple[Batch, ...]:
    """Return batches of at most `size` windows of like length; who meets whom among equals follows from `seed`."""
    order = np.random.default_rng(seed).permutation(len(windows))
    lengths = np.array([len(windows[index].ids) for index in order], dtype=np.int64)
    order = order[np.argsort(lengths, kind="stable")]
    return tuple(
        _collate(
            [windows[index] for index in order[start : start + size]],
            pad_id=pad_id,
            causal=causal,
            per_token=per_token,
        )
        for start in range(0, len(order), size)
    )


def side_by_side(batches: Sequence[Batch], *, pad_id: int, causal: bool, per_token: bool) -> Batch:
    """Return the windows of several batches as one, padded to its longest; hidden states too, where all have them."""
    longest = max(batch.ids.shape[1] for batch in batches)

    def padded(values: torch.Tensor, value: float) -> torch.Tensor:
        behind = (0, 0) * (values.ndim - 2) + (0, longest - values.shape[1])
        return nn.functional.pad(values, behind, value=value)

    masks = [torch.ones_like(batch.ids) if batch.mask is None else batch.mask for batch in batches]
    mask = torch.cat([padded(each, 0) for each in masks])
    kept = [batch.hidden for batch in batches if batch.hidden is not None]
    return Batch(
        ids=torch.cat([padded(batch.ids, pad_id) for batch in batches]),
        targets=torch.cat([padded(batch.targets, IGNORED) if per_token else batch.targets for batch in batches]),
        mask=None if causal or bool(mask.all()) else mask,
        windows=tuple(window for batch in batches for window in batch.windows),
        hidden=(lambda: torch.cat([padded(read(), 0) for read in kept])) if kept else None,
    )


def _collate(windows: Sequence[Window], *, pad_id: int, causal: bool, per_token: bool) -> Batch:
    shape = (len(windows), max(len(window.ids) for window in windows))
    ids, mask = np.full(shape, pad_id, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    for row, window in enumerate(windows):
        ids[row, : len(window.ids)], mask[row, : len(window.ids)] = window.ids, 1
    targets = np.full(shape, IGNORED, dtype=np.int64) if per_token else np.stack([window.targets for window in windows])
    if per_token:
        for row, window in enumerate(windows):
            targets[row, : len(window.ids)] = window.targets
    needed = not causal and not mask.all()
    return Batch(
        torch.from_numpy(ids), torch.from_numpy(targets), torch.from_numpy(mask) if needed else None, tuple(windows)
    )
