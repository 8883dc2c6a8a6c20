"""A delta as an update: frames for the wire, and the manifest that follows from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from shared.config import FederationConfig
from shared.ids import new_update_id
from shared.manifest import Manifest, UpdateFacts
from shared.slices import FileSummary, FrameWriter, make_transfer_frames
from shared.tensorfile import F32Array


def seal_parts(
    delta: Mapping[str, F32Array], facts: UpdateFacts, federation: FederationConfig, fingerprint: str
) -> tuple[FrameWriter, Callable[[FileSummary, float], Manifest]]:
    """Return the frames of a float32 `delta`, under an id of its own, and what makes its manifest.

    The manifest follows from the frames' summary, once all were taken, and the time (unix seconds, for people).
    RefusedError(rule='non-finite') names a tensor with NaN or infinity, while frames are taken.
    """
    update_id, codec = new_update_id(facts.site), federation.codec
    name = federation.federation.name
    frames = make_transfer_frames(
        delta, codec.up, {"mailboat": "update", "federation": name, "update_id": update_id}, codec.slice_kib * 1024
    )

    def build(summary: FileSummary, created: float) -> Manifest:
        return Manifest(
            transfer_id=update_id,
            federation=name,
            fingerprint=fingerprint,
            codec=codec.up,
            **dataclasses.asdict(summary),
            created=created,
            facts=facts,
        )

    return frames, build
