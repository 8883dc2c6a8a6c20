"""What the sites get of a version: its state whole, or the step from the version before, made in one pass.

Formula and words: `shared.states`.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from shared.codec import Part, decode_add, encode, write_file
from shared.config import CodecName, FederationConfig
from shared.manifest import Manifest, StepFacts
from shared.plan import SealedPlan
from shared.states import State, file_metadata, open_state, seal_part, seal_state
from shared.store import FrameStore
from shared.tensorfile import F32Array, Shape, build_header


def publish(
    states: FrameStore,
    version: int,
    before: Sequence[str],
    master: Mapping[str, F32Array],
    sealed: SealedPlan,
    federation: FederationConfig,
    *,
    created: float | None = None,
) -> tuple[Manifest, Manifest | None]:
    """Seal how a version is published: its state, or the step to it and, when its turn has come, its state as well.

    `before` are the transfers that make up the state of the version before; at version 0 there are none, and the state
    is sealed. May be repeated, with the same result. RefusedError(rule='non-finite') when the master has overflowed;
    else errors as `open_state` and `seal_state`.
    """
    shapes, fingerprint = dict(sorted(sealed.tensors.items())), sealed.fingerprint
    created = time.time() if created is None else created
    if not (before and federation.codec.steps):
        return seal_state(states, version, master, shapes, federation, fingerprint, created=created), None
    codec, published = federation.codec.down, open_state(states, before)
    stepping = Stepping(published, master, codec, file_metadata(version, fingerprint, federation, "state"))
    step = seal_part(
        states,
        stepping.chunks(file_metadata(version, fingerprint, federation, "step")),
        codec,
        lambda _summary: StepFacts(version=version, base_sha256=published.sha256, state_sha256=stepping.sha256),
        federation,
        fingerprint,
        created=created,
    )
    if version % federation.codec.steps:
        return step, None
    state, digest = open_state(states, [*before, step.transfer_id]), stepping.sha256
    return step, seal_state(states, version, state, shapes, federation, fingerprint, expected=digest, created=created)


class Stepping:
    """One step as it is made: the file of the step goes out, and the digest of the state that it makes comes along."""

    def __init__(
        self, published: State, master: Mapping[str, F32Array], codec: CodecName, metadata: Mapping[str, str]
    ) -> None:
        self._published = published
        self._master = master
        self._codec = codec
        # The plain file of the state, as `seal_state` writes it: header, then the tensors in order of their names.
        self._shapes: dict[str, Shape] = dict(sorted(published.shapes.items()))
        self._ahead = iter(self._shapes)
        self._hash = hashlib.sha256(build_header([(name, "F32", of) for name, of in self._shapes.items()], metadata))

    def chunks(self, metadata: Mapping[str, str]) -> Iterator[memoryview]:
        """Yield the bytes of the step's file; in memory at a time: one tensor of state, master and step."""
        yield from write_file(self._shapes, self._encoded, self._codec, metadata)
        assert next(self._ahead, None) is None, "tensors are missing"

    @property
    def sha256(self) -> str:
        """SHA-256 (hex) of the plain file of the state that the step makes, once all chunks were taken."""
        return self._hash.hexdigest()

    def _encoded(self, name: str) -> list[Part]:
        assert next(self._ahead) == name, "tensors come in order of their names"
        published, master = self._published[name], self._master[name]
        # An overflow is found when the difference or the state is encoded, and told as such.
        with np.errstate(over="ignore", invalid="ignore"):
            parts = encode(name, np.subtract(master, published), self._codec)
            decode_add([array for _, _, array in parts], self._codec, 1.0, published)
        ((_, _, plain),) = encode(name, published, "f32")
        self._hash.update(plain.reshape(-1).view(np.uint8).data)
        return parts
