"""A delta as an update: what error feedback adds to it, frames for the wire, the manifest, and what it leaves out."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from edge_client.feedback import accumulated, left_out
from edge_client.outbox import Outbox
from edge_client.residual import Build
from shared.codec import Codec, encode_each, group_size
from shared.config import FederationConfig
from shared.ids import new_update_id
from shared.manifest import Manifest, StateFacts, UpdateFacts
from shared.slices import FileSummary, FrameWriter, make_transfer_frames
from shared.store import Stored
from shared.tensorfile import F32Array

Tensors = Mapping[str, F32Array]

RESIDUAL_CODEC: Codec = "bf16"
"""Half the bytes to sync; what is owed is rounded by a 256th at most."""


def seal_delta(
    outbox: Outbox,
    delta: Tensors,
    facts: UpdateFacts,
    federation: FederationConfig,
    fingerprint: str,
    finish: Callable[[Manifest], Manifest],
    own: Path | None = None,
) -> Manifest:
    """Seal a float32 `delta` as an update under an id of its own, and return the manifest, which `finish` completes.

    With `[codec] feedback` what earlier updates owe is added first, and what the codec leaves out is kept; a file
    `own`, of what stays here, is kept beside it. A failed attempt changes nothing and may be repeated. In memory: the
    delta, with feedback a second time, one encoded tensor. RefusedError(rule='non-finite') names a tensor with NaN or
    infinity; other errors as FrameStore.seal.
    """
    section = federation.codec
    update_id = new_update_id(facts.site)

    def build(codec: Codec, facts: UpdateFacts | StateFacts, summary: FileSummary) -> Manifest:
        return Manifest(
            transfer_id=update_id,
            federation=federation.federation.name,
            fingerprint=fingerprint,
            codec=codec,
            **dataclasses.asdict(summary),
            created=time.time(),
            facts=facts,
        )

    def build_update(summary: FileSummary) -> Manifest:
        return finish(build(section.up, facts, summary))

    metadata = {"mailboat": "update", "federation": federation.federation.name, "update_id": update_id}
    residuals = outbox.residuals
    with residuals.turn:
        left: tuple[FrameWriter, Build] | None = None
        if section.decay:
            whole = _with_owed(delta, residuals.current(fingerprint), section.decay)
            delta = {name: whole[name] for name in delta}
            facts_left = StateFacts(version=residuals.next_number)
            left = (
                _residual_frames(whole, delta, section.up, metadata | {"mailboat": "residual"}),
                lambda summary: build(RESIDUAL_CODEC, facts_left, summary),
            )
        frames = make_transfer_frames(delta, section.up, metadata, section.slice_kib * 1024)
        return outbox.seal(frames, build_update, left, own)


def _with_owed(delta: Tensors, owed: Stored | None, decay: float) -> dict[str, F32Array]:
    """The delta and what is owed; tensors that are owed and not in the delta are there too."""
    whole = dict(delta)
    if owed is None:
        return whole
    with owed.open_tensors() as reader:
        for name in reader.shapes:
            whole[name] = accumulated(delta.get(name), reader.tensor(name), decay)
    return whole


def _residual_frames(whole: Tensors, sent: Tensors, codec: Codec, metadata: Mapping[str, str]) -> FrameWriter:
    def left(name: str) -> F32Array:
        return left_out(name, whole[name], codec) if name in sent else whole[name]

    shapes = {name: values.shape for name, values in whole.items()}
    return FrameWriter(encode_each(shapes, left, RESIDUAL_CODEC, metadata), group=group_size(RESIDUAL_CODEC))
