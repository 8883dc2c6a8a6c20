"""Payloads of a few bytes that depend on their inputs as real tensors do: one other input, another digest."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from coordinator.records import Contribution
from shared import store
from shared.digest import digest
from shared.errors import RefusedError
from shared.manifest import Manifest, StateFacts, UpdateFacts
from shared.plan import SealedPlan
from shared.slices import FileSummary, Frame
from shared.store import Stored
from shared.tensorfile import F32Array, Shape
from tests.factories import SLICE

if TYPE_CHECKING:
    from tests.sim.weather import Scenario

BAD = b"\xff"
"""How the first frame of an update begins that must not pass admission."""


def frames_of(text: str, count: int, head: bytes = b"\x01") -> list[bytes]:
    """`count` frames that follow from a text."""
    return [head + hashlib.sha256(f"{text} {index}".encode()).digest() for index in range(count)]


class ToyFrames:
    """Frames in the place of a `shared.slices.FrameWriter`."""

    def __init__(self, frames: Sequence[bytes]) -> None:
        self._frames = frames

    def __iter__(self) -> Iterator[Frame]:
        return (Frame(data, digest(data)) for data in self._frames)

    @property
    def summary(self) -> FileSummary:
        """Their sizes and hashes, as of full slices."""
        return FileSummary(
            slice_size=SLICE,
            group=4,
            file_size=SLICE * len(self._frames),
            file_digest=file_digest(self._frames),
            frame_lengths=tuple(len(frame) for frame in self._frames),
            frame_hashes=b"".join(frame.digest for frame in self),
        )


def file_digest(frames: Iterable[bytes]) -> str:
    """What a toy manifest says of its file."""
    return digest(b"".join(frames)).hex()


def manifest_of(
    plan: SealedPlan, transfer_id: str, summary: FileSummary, facts: StateFacts | UpdateFacts, created: float
) -> Manifest:
    """The manifest of a toy transfer."""
    return Manifest(
        transfer_id=transfer_id,
        federation="ward",
        fingerprint=plan.fingerprint,
        codec="f32",
        **dataclasses.asdict(summary),
        created=created,
        facts=facts,
    )


def read_whole(stored: Stored) -> list[bytes]:
    """All frames of a transfer; RefusedError when they are not those of the manifest."""
    with store._reading(stored.path) as fd:
        frames = [stored._read(fd, index, verify=True) for index in range(stored.manifest.frames)]
    if file_digest(frames) != stored.manifest.file_digest:
        raise RefusedError("the file has another hash", rule="file-hash")
    return frames


def admit(stored: Stored) -> float:
    """In the place of `coordinator.admission.verify`: the norm, or RefusedError."""
    if read_whole(stored)[0].startswith(BAD):
        raise RefusedError("a tensor holds NaN", rule="non-finite")
    return 1.0


def loss_of(manifest: Manifest) -> float:
    """In the place of a model and notes: 0 to 3, by the update's bytes."""
    return 3 * int(manifest.file_digest[:8], 16) / 2**32


def merged_master(master: bytes, parts: Iterable[tuple[Contribution, Sequence[bytes]]]) -> bytes:
    """The next master: of the one before, and each contribution's weight and payload, in order."""
    told = hashlib.sha256(master)
    for part, frames in parts:
        told.update(f"{part.update_id} {part.weight!r} {part.base_version} {file_digest(frames)}".encode())
    return told.hexdigest().encode()


def published_frames(master: bytes, count: int) -> list[bytes]:
    """The state that is published of a master."""
    return frames_of(master.decode(), count)


def shapes_of(scenario: Scenario) -> dict[str, Shape]:
    """The tensors of a federation of steps: as many slices of float32 as a toy state has frames, and a few values."""
    return {"block.w": (scenario.state_frames, SLICE // 4), "head.bias": (3,)}


def tensors_of(master: bytes, scenario: Scenario) -> dict[str, F32Array]:
    """The master of a federation of steps as tensors, all of which follow from it."""
    rng = np.random.default_rng(list(hashlib.sha256(master).digest()))
    shapes = shapes_of(scenario)
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
