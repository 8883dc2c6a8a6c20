"""Published states: a whole one and the steps behind it, added up; sealed, extracted, and refused when they differ."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3
from safetensors.numpy import load_file

from shared.codec import encode_file
from shared.config import CodecSection, FederationConfig, FederationSection, ModelSection
from shared.errors import CorruptError, RefusedError
from shared.manifest import Manifest, StateFacts, StepFacts
from shared.states import Imprint, extract_state, open_part, open_state, seal_part, seal_state
from shared.store import FrameStore
from shared.tensorfile import F32Array

FINGERPRINT = "0f" * 32
FEDERATION = FederationConfig(
    federation=FederationSection(name="ward"),
    model=ModelSection(base="unused"),
    codec=CodecSection(down="int8", steps=4, slice_kib=4),
)
RNG = np.random.default_rng(5)
SHAPES: dict[str, tuple[int, ...]] = {"block.w": (70, 33), "head.bias": (3,), "head.scale": ()}


def values() -> dict[str, F32Array]:
    """Random tensors."""
    return {name: np.asarray(RNG.normal(size=shape), dtype=np.float32) for name, shape in SHAPES.items()}


def imprint(version: int) -> Imprint:
    """What the files of a version say of themselves here."""
    return Imprint(FEDERATION, FINGERPRINT, version)


def seal(store: FrameStore, version: int, tensors: Mapping[str, F32Array], **options: str) -> Manifest:
    """A state that travels whole."""
    return seal_state(store, imprint(version), tensors.__getitem__, SHAPES, created=1.0, **options)


def seal_step(store: FrameStore, version: int, difference: Mapping[str, F32Array], base: str, made: str) -> Manifest:
    """A step that says so of itself, whatever it makes."""
    metadata = imprint(version).metadata("step")
    facts = StepFacts(version=version, base_digest=base, state_digest=made)
    chunks = encode_file(difference, "int8", metadata)
    return seal_part(store, imprint(version), chunks, "int8", lambda _summary: facts, created=1.0)


def plain(version: int, tensors: Mapping[str, F32Array]) -> bytes:
    """The plain file of a state."""
    return b"".join(encode_file(tensors, "f32", imprint(version).metadata("state")))


@pytest.fixture
def store(tmp_path: Path) -> FrameStore:
    """An empty folder."""
    return FrameStore(tmp_path / "states")


def chain(store: FrameStore) -> tuple[list[str], list[dict[str, F32Array]]]:
    """A state and two steps, and the three states that they make, added up here in memory."""
    states = [values()]
    parts = [seal(store, 0, states[0]).transfer_id]
    for version in (1, 2):
        with_step = {name: tensor.copy() for name, tensor in states[-1].items()}
        difference = {name: tensor * np.float32(0.01) for name, tensor in values().items()}
        sealed = seal_step(store, 9, difference, "0" * 64, "1" * 64)
        for name, decoded in open_part(store, sealed.transfer_id).tensors():
            with_step[name] = with_step[name] + decoded
        store.delete(sealed.transfer_id)
        digests = (
            blake3(plain(at, each)).hexdigest() for at, each in ((version - 1, states[-1]), (version, with_step))
        )
        parts.append(seal_step(store, version, difference, *digests).transfer_id)
        states.append(with_step)
    return parts, states


def test_a_state_is_the_whole_one_and_the_steps_behind_it(store: FrameStore) -> None:
    """Added up in float32, one step after the other; the digest that it must have is that of its plain file."""
    parts, states = chain(store)
    for version, wanted in enumerate(states):
        state = open_state(store, parts[: version + 1])
        assert (state.version, dict(state.shapes), len(state)) == (version, SHAPES, 3)
        assert state.digest == blake3(plain(version, wanted)).hexdigest()
        for name, shape in SHAPES.items():
            np.testing.assert_array_equal(state[name], wanted[name], strict=True)
            sums = np.full(shape, 0.5, dtype=np.float32)
            state.add_tensor(name, 0.25, sums)
            np.testing.assert_array_equal(sums, np.float32(0.5) + np.float32(0.25) * wanted[name])


def test_a_state_made_by_steps_is_sealed_as_one_that_came_whole(store: FrameStore, tmp_path: Path) -> None:
    """The same bytes, hence the same id, file and frames, down to the manifest."""
    parts, states = chain(store)
    whole = seal(FrameStore(tmp_path / "elsewhere"), 2, states[2])
    state = open_state(store, parts)
    assert seal(store, 2, state, expected=state.digest) == whole
    assert (whole.codec, whole.facts, whole.transfer_id) == ("f32", StateFacts(version=2), state.digest[:32])


def test_the_plain_file_of_a_state_has_its_digest(store: FrameStore, tmp_path: Path) -> None:
    """Whether it is one transfer or the sum of three."""
    parts, states = chain(store)
    whole = seal(store, 2, states[2])
    for number, made in enumerate((parts, [whole.transfer_id])):
        path = tmp_path / f"{number}.safetensors"
        extract_state(store, made, path)
        assert blake3(path.read_bytes()).hexdigest() == whole.file_digest
        np.testing.assert_array_equal(load_file(path)["block.w"], states[2]["block.w"])


def test_a_sum_that_differs_from_what_was_published_is_refused(store: FrameStore, tmp_path: Path) -> None:
    """Neither sealed nor written: nothing under that digest may be anything else."""
    parts, states = chain(store)
    false = seal_step(store, 3, values(), blake3(plain(2, states[2])).hexdigest(), "ab" * 32)
    state = open_state(store, [*parts, false.transfer_id])
    with pytest.raises(RefusedError, match=r"version 3 came out as state .*, published was abababababab") as refused:
        seal(store, 3, state, expected=state.digest)
    assert refused.value.rule == "state-digest"
    with pytest.raises(RefusedError, match="version 3"):
        extract_state(store, [*parts, false.transfer_id], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert set(store.ids()) == {*parts, false.transfer_id}


def test_a_step_of_other_tensors_is_refused(store: FrameStore) -> None:
    """One that lacks a tensor, or has one of another shape, would leave part of the state behind."""
    whole = seal(store, 0, values())
    for name in SHAPES:
        lacking = {other: tensor for other, tensor in values().items() if other != name}
        for difference in (lacking, {**lacking, name: np.zeros(5, dtype=np.float32)}):
            step = seal_step(store, 1, difference, whole.file_digest, "ab" * 32)
            with pytest.raises(RefusedError) as refused:
                open_state(store, [whole.transfer_id, step.transfer_id])
            assert refused.value.rule == "step-shapes"


def test_a_part_that_is_gone_or_rotten_is_named(store: FrameStore) -> None:
    """Frames are compared with their hashes as they are added up."""
    parts, _ = chain(store)
    frames = store.root / f"{parts[1]}.frames"
    sound = frames.read_bytes()
    frames.write_bytes(sound[:-3] + bytes([sound[-3] ^ 1]) + sound[-2:])
    with pytest.raises(CorruptError, match=parts[1]):
        _ = [*open_state(store, parts).values()]
    store.delete(parts[1])
    with pytest.raises(CorruptError, match=f"{parts[1]} is gone"):
        open_state(store, parts)
