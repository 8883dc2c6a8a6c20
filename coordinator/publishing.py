"""What the sites get of a version: its state whole, or the step from the version before, made in one pass.

Formula and words: `shared.states`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from shared.codec import Part, decode_add, encode, write_file
from shared.config import CodecName
from shared.digest import Hasher
from shared.manifest import Manifest, StepFacts
from shared.states import Imprint, State, open_state, seal_part, seal_state
from shared.store import FrameStore
from shared.tensorfile import F32Array, Shape, build_header


def publish(
    states: FrameStore,
    imprint: Imprint,
    before: Sequence[str],
    master: Callable[[str], F32Array],
    shapes: Mapping[str, Shape],
    *,
    created: float | None = None,
) -> tuple[Manifest, Manifest | None]:
    """Seal how a version is published: its state, or the step to it and, when its turn has come, its state as well.

    `master(name)` returns a tensor of the version's master; each is asked for once, in the order of their names.
    `before` are the transfers that make up the state of the version before; at version 0 there are none, and the state
    is sealed. `shapes` are those of all tensors. May be repeated, with the same result. RefusedError(rule='non-finite')
    when the master has overflowed; else errors as `open_state` and `seal_state`.
    """
    section, shapes = imprint.federation.codec, dict(sorted(shapes.items()))
    created = time.time() if created is None else created
    if not (before and section.steps):
        return seal_state(states, imprint, master, shapes, created=created), None
    published = open_state(states, before)
    stepping = Stepping(published, master, section.down, imprint.metadata("state"))
    step = seal_part(
        states,
        imprint,
        stepping.chunks(imprint.metadata("step")),
        section.down,
        lambda _summary: StepFacts(version=imprint.version, base_digest=published.digest, state_digest=stepping.digest),
        created=created,
    )
    if imprint.version % section.steps:
        return step, None
    state = open_state(states, [*before, step.transfer_id])
    return step, seal_state(states, imprint, state.__getitem__, shapes, expected=stepping.digest, created=created)


class Stepping:
    """One step as it is made: the file of the step goes out, and the digest of the state that it makes comes along."""

    def __init__(
        self, published: State, master: Callable[[str], F32Array], codec: CodecName, metadata: Mapping[str, str]
    ) -> None:
        self._published = published
        self._master = master
        self._codec = codec
        # The plain file of the state, as `seal_state` writes it: header, then the tensors in order of their names.
        self._shapes: dict[str, Shape] = dict(sorted(published.shapes.items()))
        self._ahead = iter(self._shapes)
        self._hash = Hasher(build_header([(name, "F32", of) for name, of in self._shapes.items()], metadata))

    def chunks(self, metadata: Mapping[str, str]) -> Iterator[memoryview]:
        """Yield the bytes of the step's file; in memory at a time: one tensor of state, master and step."""
        yield from write_file(self._shapes, self._encoded, self._codec, metadata)
        assert next(self._ahead, None) is None, "tensors are missing"

    @property
    def digest(self) -> str:
        """BLAKE3 (hex) of the plain file of the state that the step makes, once all chunks were taken."""
        return self._hash.hexdigest()

    def _encoded(self, name: str) -> list[Part]:
        assert next(self._ahead) == name, "tensors come in order of their names"
        published, master = self._published[name], self._master(name)
        # An overflow is found when the difference or the state is encoded, and told as such.
        with np.errstate(over="ignore", invalid="ignore"):
            parts = encode(name, np.subtract(master, published), self._codec)
            decode_add([array for _, _, array in parts], self._codec, 1.0, published)
        ((_, _, plain),) = encode(name, published, "f32")
        self._hash.update(plain.reshape(-1).view(np.uint8).data)
        return parts
