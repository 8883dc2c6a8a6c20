"""Small transfers made in memory, for the tests of readers and stores."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
from blake3 import blake3

from shared.codec import Codec
from shared.manifest import Manifest, StateFacts
from shared.slices import FileSummary, FrameWriter, make_transfer_frames
from shared.tensorfile import F32Array

SLICE_BYTES = 4096
ID = "ab" * 16


def tensors_of(seed: int = 0) -> dict[str, F32Array]:
    """Five tensors of 13,000 values: some share a slice, one spans several, one is empty, one a scalar."""
    rng = np.random.default_rng(seed)
    shapes = {"norm": (100,), "empty": (0, 3), "layer.w": (110, 101), "layer.bias": (1789,), "zero_dim": ()}
    return {name: np.asarray(rng.standard_normal(shape) * 1e-3, dtype=np.float32) for name, shape in shapes.items()}


def manifest_builder(codec: str = "bf16", transfer_id: str = ID, version: int = 3) -> Callable[[FileSummary], Manifest]:
    """The function that makes a state's manifest of what was written."""

    def build(summary: FileSummary) -> Manifest:
        return Manifest(
            transfer_id=transfer_id,
            federation="north",
            fingerprint="0f" * 32,
            codec=codec,
            **dataclasses.asdict(summary),
            created=1000.0,
            facts=StateFacts(version=version),
        )

    return build


def writer_of(tensors: Mapping[str, F32Array], codec: Codec = "bf16") -> FrameWriter:
    """A writer of the frames of these tensors, in slices of 4 KiB."""
    return make_transfer_frames(tensors, codec, {"codec": codec}, slice_size=SLICE_BYTES)


def transfer_of(
    tensors: Mapping[str, F32Array], codec: Codec = "bf16", transfer_id: str = ID
) -> tuple[Manifest, list[bytes]]:
    """Manifest and frames of these tensors."""
    writer = writer_of(tensors, codec)
    frames = [frame.data for frame in writer]
    return manifest_builder(codec, transfer_id)(writer.summary), frames


def with_frames(manifest: Manifest, frames: list[bytes]) -> Manifest:
    """The manifest of a sender that says these frames are the right ones; nothing else in it is mended."""
    return manifest.model_copy(
        update={
            "frame_lengths": tuple(len(frame) for frame in frames),
            "frame_hashes": b"".join(blake3(frame).digest() for frame in frames),
        }
    )
