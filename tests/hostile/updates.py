"""Whole updates that are hostile inside: a manifest, and frames that fit it; for `tests.hostile.make`."""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgpack
import numpy as np
from blake3 import blake3

from shared.codec import Codec
from shared.manifest import Manifest, UpdateFacts
from shared.slices import compress_slice, expand_frame, make_transfer_frames
from tests.factories import digest

SLICE_BYTES = 4096
SHAPES = {"a.weight": (8, 16), "b.weight": (32,)}
"""What the plan says."""


def _packed(value: Any) -> bytes:
    data: bytes = msgpack.packb(value, use_bin_type=True)
    return data


def update_of(
    tensors: Mapping[str, Any],
    codec: Codec = "f32",
    spoil: Callable[[dict[str, Any], list[bytes]], None] | None = None,
    *,
    facts: dict[str, Any] | None = None,
    transfer_id: str = "ab" * 16,
) -> bytes:
    """A sound update of these tensors; `spoil` may change manifest and frames before lengths and hashes are taken.

    Or, with other `facts`, a state or a step.
    """
    writer = make_transfer_frames(tensors, codec, {"codec": codec}, slice_size=SLICE_BYTES)
    found = [frame.data for frame in writer]
    summary = writer.summary
    said = UpdateFacts(site="north", base_version=0, base_digest=digest("base"), examples=10, metrics={})
    manifest = Manifest(
        transfer_id=transfer_id,
        federation="ward",
        fingerprint="0f" * 32,
        codec=codec,
        **dataclasses.asdict(summary),
        created=1.0,
        facts=said,
    ).to_wire()
    manifest["facts"] = facts or manifest["facts"]
    if spoil is not None:
        spoil(manifest, found)
    manifest["frame_lengths"] = [len(frame) for frame in found]
    manifest["frame_hashes"] = b"".join(blake3(frame).digest() for frame in found)
    return _packed([_packed(manifest), found])


def _with_value(value: float) -> Callable[[dict[str, Any], list[bytes]], None]:
    """Replace the last float32 of the file, which no honest encoder lets through."""

    def spoil(manifest: dict[str, Any], found: list[bytes]) -> None:
        raw = bytearray(_expanded(manifest, found))
        raw[-4:] = struct.pack("<f", value)
        _replace(manifest, found, bytes(raw))

    return spoil


def _expanded(manifest: dict[str, Any], found: list[bytes]) -> bytes:
    return expand_frame(found[0], manifest["file_size"], manifest["group"])


def _replace(manifest: dict[str, Any], found: list[bytes], raw: bytes) -> None:
    found[0] = compress_slice(raw, manifest["group"])
    manifest["file_digest"] = blake3(raw).hexdigest()
    manifest["file_size"] = len(raw)


def _in_part(name: str, data: bytes) -> Callable[[dict[str, Any], list[bytes]], None]:
    """Put `data` at the beginning of a stored tensor."""

    def spoil(manifest: dict[str, Any], found: list[bytes]) -> None:
        raw = bytearray(_expanded(manifest, found))
        size = 8 + int.from_bytes(raw[:8], "little")
        at = size + json.loads(raw[8:size])[name]["data_offsets"][0]
        raw[at : at + len(data)] = data
        _replace(manifest, found, bytes(raw))

    return spoil


def _shape_lie(old: bytes, new: bytes) -> Callable[[dict[str, Any], list[bytes]], None]:
    """Put other numbers of the same length into the header."""

    def spoil(manifest: dict[str, Any], found: list[bytes]) -> None:
        raw = _expanded(manifest, found)
        assert raw.count(old) == 1
        _replace(manifest, found, raw.replace(old, new))

    return spoil


def updates() -> Iterator[tuple[str, bytes]]:
    """For the store and `coordinator.admission.verify`, as [manifest, frames]."""
    sound = {name: np.full(shape, 0.01, np.float32) for name, shape in SHAPES.items()}
    yield "non-finite--nan", update_of(sound, spoil=_with_value(float("nan")))
    yield "non-finite--infinity", update_of(sound, spoil=_with_value(float("inf")))
    yield "norm-bound--1e30-everywhere", update_of({**sound, "b.weight": np.full((32,), 1e30, np.float32)})
    yield "unknown-tensor--one-more", update_of({**sound, "c.weight": np.zeros((1,), np.float32)})
    yield "wrong-shape--transposed", update_of({**sound, "a.weight": np.zeros((16, 8), np.float32)})
    yield "wrong-shape--empty", update_of({**sound, "b.weight": np.zeros((0,), np.float32)})
    yield "no-tensors--empty-file", update_of({})
    yield "codec-parts--f32-said-to-be-int8", update_of(sound, spoil=_codec_lie)
    minus_one, nan = b"\x80\xbf", b"\xc0\x7f"
    yield "codec-scale--negative", update_of(sound, "int8", spoil=_in_part("a.weight.scale", minus_one))
    yield "codec-scale--int4-nan", update_of(sound, "int4", spoil=_in_part("a.weight.scale", nan))
    yield "codec-parts--int4-of-a-larger-tensor", update_of(sound, "int4", spoil=_shape_lie(b"[0,8,16]", b"[0,8,96]"))
    yield "codec-parts--int4-with-values", update_of(sound, "int4", spoil=_shape_lie(b"[0,8,16]", b"[1,0,16]"))
    yield "codec-scale--ternary-infinite", update_of(sound, "ternary", spoil=_in_part("a.weight.scale", b"\x80\x7f"))
    yield "codec-padding--ternary-sign-of-nothing", update_of(sound, "ternary", spoil=_in_part("a.weight.trit", b"\2"))
    yield (
        "codec-scale--topk2-upper-below-lower",
        update_of(sound, "topk2", spoil=_in_part("a.weight.scale", b"\x80\x3f\0\0")),
    )
    yield "codec-index--topk2-outside-its-tensor", update_of(sound, "topk2", spoil=_in_part("b.weight.gap", b"\x20"))
    yield "codec-index--topk2-far-outside", update_of(sound, "topk2", spoil=_in_part("a.weight.leap", b"\xff"))
    yield "codec-padding--topk2-bits-of-nobody", update_of(sound, "topk2", spoil=_in_part("b.weight.value", b"\4"))
    yield "file-hash--of-another-file", update_of(sound, spoil=_hash_lie)
    yield "file-size--bytes-behind", update_of(sound, spoil=_longer)


def _codec_lie(manifest: dict[str, Any], found: list[bytes]) -> None:
    raw = _expanded(manifest, found)
    manifest["codec"], manifest["group"] = "int8", 1
    _replace(manifest, found, raw)


def _hash_lie(manifest: dict[str, Any], _found: list[bytes]) -> None:
    manifest["file_digest"] = "0f" * 32


def _longer(manifest: dict[str, Any], found: list[bytes]) -> None:
    _replace(manifest, found, _expanded(manifest, found) + bytes(100))


def steps() -> Iterator[tuple[str, bytes]]:
    """For the store and `edge_client.states.States`, as [[manifest, frames] of a sound state, the same of the step]."""
    zeros = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    small = {name: np.full(shape, 0.01, np.float32) for name, shape in SHAPES.items()}
    bad = {
        "step-shapes--a-tensor-less": step_of({"a.weight": small["a.weight"]}),
        "step-shapes--one-more": step_of({**small, "c.weight": np.zeros((1,), np.float32)}),
        "step-shapes--transposed": step_of({**small, "a.weight": np.zeros((16, 8), np.float32)}),
        "step-shapes--nothing": step_of({}),
        "non-finite--nan": step_of(small, spoil=_with_value(float("nan"))),
        "non-finite--infinity": step_of(small, spoil=_with_value(float("-inf"))),
        "codec-scale--negative": step_of(small, "int8", spoil=_in_part("a.weight.scale", b"\x80\xbf")),
        "codec-index--outside-its-tensor": step_of(small, "topk2", spoil=_in_part("b.weight.gap", b"\x20")),
        "codec-parts--f32-said-to-be-int8": step_of(small, spoil=_codec_lie),
        "state-digest--of-another-state": step_of(small),
    }
    for name, step in bad.items():
        yield name, _packed([update_of(zeros, facts={"version": 0}), step])


def step_of(tensors: Mapping[str, Any], codec: Codec = "f32", **options: Any) -> bytes:
    """A step from whatever state to one that nobody has."""
    facts = {"version": 1, "base_digest": "0f" * 32, "state_digest": "f0" * 32}
    return update_of(tensors, codec, facts=facts, transfer_id="cd" * 16, **options)
