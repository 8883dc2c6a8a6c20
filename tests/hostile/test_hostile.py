"""Each hostile file is refused under the rule in its name, within bounds of time and memory."""

from __future__ import annotations

import resource
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import msgpack
import numpy as np
import pytest

from coordinator import admission
from shared.config import CodecName
from shared.errors import MailboatError, RefusedError
from shared.manifest import manifest_from_bytes
from shared.messages import decode, parse_chunk
from shared.slices import expand_into
from shared.states import Imprint, open_state, seal_state
from shared.store import FrameStore
from shared.tensorfile import header_size, parse_header
from shared.trust.envelope import parse
from tests.factories import make_federation, make_plan
from tests.fuzz.targets import TARGETS
from tests.hostile.make import HERE, KINDS, RAW_BYTES
from tests.hostile.updates import SHAPES, update_of

FEDERATION = make_federation(codec={"down": "int8", "steps": 4})
PLAN = make_plan(make_federation()).model_copy(update={"tensors": SHAPES})
MEMORY_BYTES = 16 * 1024 * 1024
"""Several times the longest control message; the bombs want four times as much, or exabytes."""
PROCESSOR_S = 2.0
FILES = sorted(HERE.glob("*/*.bin"))


def _header(data: bytes, _folder: Path) -> None:
    head, size = data[:-8], int.from_bytes(data[-8:], "little")
    header_size(head[:8], size)
    parse_header(head, size)


def _frame(data: bytes, _folder: Path) -> None:
    expand_into(data, np.empty(RAW_BYTES, np.uint8), 4)


def _update(data: bytes, folder: Path) -> None:
    raw, frames = msgpack.unpackb(data)
    store, manifest = FrameStore(folder), manifest_from_bytes(raw)
    with store.open_partial(manifest) as partial:
        for index, frame in enumerate(frames):
            partial.write(index, frame)
        stored = partial.finish()
    admission.verify(stored, PLAN)


def _step(data: bytes, folder: Path) -> None:
    """What a site does before it calls a state its own; what it then does about an error is not of interest here."""
    store = FrameStore(folder)
    for part in msgpack.unpackb(data):
        raw, frames = msgpack.unpackb(part)
        with store.open_partial(manifest_from_bytes(raw)) as partial:
            for index, frame in enumerate(frames):
                partial.write(index, frame)
            partial.finish()
    state = open_state(store, ["ab" * 16, "cd" * 16])
    with np.errstate(invalid="ignore"):
        seal_state(store, Imprint(FEDERATION, "0f" * 32, 1), state.__getitem__, state.shapes, expected=state.digest)


DECODERS: dict[str, Callable[[bytes, Path], object]] = {
    "message": lambda data, _folder: decode(data),
    "envelope": lambda data, _folder: parse(data, "mb/v1/ward/site/north/up/ctl"),
    "manifest": lambda data, _folder: manifest_from_bytes(data),
    "header": _header,
    "frame": _frame,
    "chunk": lambda data, _folder: parse_chunk(data),
    "update": _update,
    "step": _step,
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_hostile_file_is_refused_under_its_rule(path: Path, tmp_path: Path) -> None:
    """And neither fills memory nor takes long."""
    rule, _, _ = path.stem.partition("--")
    data = path.read_bytes()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    tracemalloc.start()
    try:
        with pytest.raises(RefusedError) as refused:
            DECODERS[path.parent.name](data, tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert refused.value.rule == rule
    assert peak < MEMORY_BYTES
    assert resource.getrusage(resource.RUSAGE_SELF).ru_utime - before < PROCESSOR_S


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_recipe_has_its_file(kind: str) -> None:
    """A new recipe without a file would test nothing: `python -m tests.hostile.make` writes it."""
    assert {path.stem for path in FILES if path.parent.name == kind} == {name for name, _ in KINDS[kind]()}


@pytest.mark.parametrize("name", ["message", "envelope", "manifest", "chunk", "grant", "request", "record", "snapshot"])
def test_whatever_is_cut_short_is_refused(name: str) -> None:
    """Each sound sample of the decoder, cut behind each of its bytes but the last; a text's newline says nothing."""
    for sample in TARGETS[name].samples:
        for length in range(len(sample.removesuffix(b"\n"))):
            with pytest.raises(MailboatError):
                TARGETS[name].run(sample[:length])


def test_a_sound_update_passes(tmp_path: Path) -> None:
    """What the hostile ones are made of is admitted, so that each is refused for what is said of it."""
    sound = {name: np.full(shape, 0.01, np.float32) for name, shape in SHAPES.items()}
    for codec in get_args(CodecName):
        _update(update_of(sound, codec), tmp_path / codec)
