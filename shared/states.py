"""Published states: whole, or as the steps that lead from one to the next.

A step is a rounded difference, QAFeL's hidden state (Ortega and Jafarkhani, arXiv 2308.00263, algorithms 1 and 2):

    published_{v+1} = published_v + Q(master_{v+1} - published_v)

Q is what the downlink's codec makes of a tensor and what is read from that again. Coordinator and sites add the same
float32 numbers in the same order, so the states at all ends are equal bit for bit. What Q rounds away is still in the
next difference: it is made up for later and does not add up.

A state is known by its digest, the BLAKE3 of its plain file: in a federation of steps a safetensors file of float32
tensors whose header names federation, fingerprint and version. Whether it came whole or by steps makes no difference.
A state at rest is one transfer that is whole and the steps since, added up whenever it is read.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from shared import durable
from shared.codec import decode_add, encode_each, group_size
from shared.config import CodecName, FederationConfig
from shared.digest import Hasher
from shared.errors import CorruptError, RefusedError
from shared.manifest import Manifest, StateFacts, StepFacts
from shared.plan import BLOCKS_KEY, Blocks
from shared.reader import TensorReader
from shared.slices import FileSummary, FrameWriter
from shared.store import FrameStore, Stored
from shared.tensorfile import F32Array, Shape


class State(Mapping[str, F32Array]):
    """The tensors of a state that is made up of a whole one and the steps behind it; each look-up adds one up.

    Memory: one tensor, and a few slices for each part. RefusedError(rule='step-shapes') when a step holds other tensors
    than the state; else errors as `TensorReader`.
    """

    def __init__(self, whole: TensorReader, steps: Sequence[TensorReader] = ()) -> None:
        self._whole = whole
        self._steps = steps
        last = (whole, *steps)[-1].manifest
        self.version = last.version
        self.digest = last.leads_to
        """Digest that the state must have, in hex."""
        self.metadata = {**(whole, *steps)[-1].header.metadata, "mailboat.kind": "state"}
        """What the state's plain file says of itself in its header."""
        self.shapes: Mapping[str, Shape] = whole.shapes
        if any(step.shapes != self.shapes for step in steps):
            raise RefusedError("a step holds other tensors than the state that it is added to", rule="step-shapes")

    def __getitem__(self, name: str) -> F32Array:
        tensor = self._whole.tensor(name)
        for step in self._steps:
            step.add_tensor(name, 1.0, tensor)
        return tensor

    def add_tensor(self, name: str, weight: float, accumulator: F32Array) -> None:
        """Add weight x one tensor to an accumulator of its shape; errors as `decode_add`."""
        if self._steps:
            decode_add([self[name]], "f32", weight, accumulator)
        else:
            self._whole.add_tensor(name, weight, accumulator)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def open_state(store: FrameStore, parts: Sequence[str]) -> State:
    """Return the state that these transfers make up: one that is whole, and the steps behind it, in order.

    Each frame is compared with its hash as it is read: CorruptError when one of them is not what was stored, or a
    transfer is not there; else errors as `State`.
    """
    whole, *steps = (open_part(store, part) for part in parts)
    return State(whole, steps)


def open_part(store: FrameStore, transfer_id: str) -> TensorReader:
    """Open one transfer; its manifest, too, is in memory only while it is read. Errors as `open_state`."""
    found = stored_part(store, transfer_id)
    return TensorReader(found.manifest, found.read_frame, verify=False)


def stored_part(store: FrameStore, transfer_id: str) -> Stored:
    """Return one transfer; CorruptError when it is not there, or its size is not what was stored."""
    found = store.get(transfer_id)
    if found is None:
        raise CorruptError(
            f"{store.root}: transfer {transfer_id} is gone, although it is needed",
            hint="restore the folder from a backup",
        )
    return found


@dataclass(frozen=True, slots=True)
class Imprint:
    """What the files of a version say of themselves."""

    federation: FederationConfig
    fingerprint: str
    version: int
    blocks: Blocks | None = None
    """Those to be trained from it, where importance chooses."""

    def metadata(self, kind: str) -> dict[str, str]:
        """For the header of a file; `kind` is state, step, master, or the name of a slot."""
        chosen = {} if self.blocks is None else {BLOCKS_KEY: ",".join(map(str, self.blocks))}
        return chosen | {
            "mailboat.federation": self.federation.federation.name,
            "mailboat.fingerprint": self.fingerprint,
            "mailboat.kind": kind,
            "mailboat.version": str(self.version),
        }


def seal_state(
    store: FrameStore,
    imprint: Imprint,
    read: Callable[[str], F32Array],
    shapes: Mapping[str, Shape],
    *,
    expected: str | None = None,
    created: float | None = None,
) -> Manifest:
    """Seal a state that travels whole, in the codec for that, and return its manifest.

    `read(name)` returns a tensor; each is asked for once, in the order of their names.
    The transfer id is the head of the file's digest, so that equal states have equal ids. `created` is unix seconds,
    by default now. RefusedError(rule='state-digest'), and nothing is left, when the digest is not the `expected` one;
    else as `encode` and `FrameStore.seal`.
    """
    version, codec = imprint.version, imprint.federation.codec.whole

    def stated(summary: FileSummary) -> StateFacts:
        if expected is not None:
            _check_digest(version, summary.file_digest, expected)
        return StateFacts(version=version)

    chunks = encode_each(shapes, read, codec, imprint.metadata("state"))
    return seal_part(store, imprint, chunks, codec, stated, created=created)


def seal_part(
    store: FrameStore,
    imprint: Imprint,
    chunks: Iterator[memoryview],
    codec: CodecName,
    stated: Callable[[FileSummary], StateFacts | StepFacts],
    *,
    created: float | None = None,
) -> Manifest:
    """Seal the bytes of a state's or a step's file; `stated` gives the facts when all bytes were taken."""
    federation = imprint.federation

    def build(summary: FileSummary) -> Manifest:
        return Manifest(
            transfer_id=summary.file_digest[:32],
            federation=federation.federation.name,
            fingerprint=imprint.fingerprint,
            codec=codec,
            **dataclasses.asdict(summary),
            created=time.time() if created is None else created,
            facts=stated(summary),
        )

    frames = FrameWriter(chunks, group=group_size(codec), slice_size=federation.codec.slice_kib * 1024)
    return store.seal(frames, build).manifest


def extract_state(store: FrameStore, parts: Sequence[str], path: Path) -> None:
    """Write the plain safetensors file of a state over `path`, to be read now: the bytes whose digest is the state's.

    RefusedError(rule='state-digest') when they are not; else errors as `open_state`. After an error nothing is left.
    """
    if len(parts) == 1:
        durable.overwrite(path, stored_part(store, parts[0]).plain())
    else:
        durable.overwrite(path, _plain(open_state(store, parts)))


def check_state_digest(store: FrameStore, parts: Sequence[str]) -> None:
    """Add a state up and compare it with its digest; RefusedError(rule='state-digest'), else errors as `open_state`."""
    if len(parts) == 1:
        stored_part(store, parts[0]).verify()
    else:
        for _chunk in _plain(open_state(store, parts)):
            pass


def _plain(state: State) -> Iterator[memoryview]:
    hasher = Hasher()
    for chunk in encode_each(state.shapes, state.__getitem__, "f32", state.metadata):
        hasher.update(chunk)
        yield chunk
    _check_digest(state.version, hasher.hexdigest(), state.digest)


def _check_digest(version: int, found: str, published: str) -> None:
    if found != published:
        raise RefusedError(
            f"version {version} came out as state {found[:12]}, published was {published[:12]}",
            rule="state-digest",
            hint="memory or disk has failed, or this machine does not compute float32 as IEEE 754 says",
        )
