"""The manifest: what it promises about its frames, its canonical bytes, and what is not one."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import msgpack
import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import RefusedError
from shared.manifest import (
    MAX_FRAME_BYTES,
    MAX_FRAMES,
    MAX_METRICS,
    MAX_SLICE_BYTES,
    MIN_SLICE_BYTES,
    Manifest,
    manifest_from_bytes,
    parse_manifest,
)
from shared.messages import MAX_CONTROL_BYTES, Announce, Offer, encode
from tests.factories import SLICE, digest, make_federation, make_plan, make_state, make_step, make_update

PLAN = make_plan(make_federation())
STATE = make_state(PLAN, 3)
STEP = make_step(PLAN, 3)
UPDATE = make_update(PLAN, "north", STATE)


def _wire(**changes: Any) -> dict[str, Any]:
    return {**UPDATE.to_wire(), **changes}


def _facts(**changes: Any) -> dict[str, Any]:
    return _wire(facts={**UPDATE.to_wire()["facts"], **changes})


@pytest.mark.parametrize("manifest", [STATE, STEP, UPDATE], ids=["state", "step", "update"])
def test_a_manifest_survives_the_wire_and_the_disk(manifest: Manifest) -> None:
    """Equal manifests give equal bytes, and equal bytes equal manifests."""
    again = manifest_from_bytes(manifest.to_bytes())
    assert again == manifest
    assert again.to_bytes() == manifest.to_bytes()
    assert again.digest == manifest.digest == hashlib.sha256(manifest.to_bytes()).hexdigest()


@pytest.mark.parametrize("field", ["transfer_id", "fingerprint", "frame_hashes", "created", "file_digest"])
def test_the_digest_stands_for_every_field(field: str) -> None:
    """Whatever differs, the digest in the receipt differs."""
    changed = {
        "transfer_id": "9" * 32,
        "fingerprint": digest("x"),
        "frame_hashes": bytes(32 * 5),
        "created": 7.0,
        "file_digest": digest("y"),
    }
    assert parse_manifest(_wire(**{field: changed[field]})).digest != UPDATE.digest


@settings(max_examples=25)
@given(st.integers(1, 20 * SLICE), st.sampled_from([SLICE, 2 * SLICE]))
def test_slices_cover_the_file_exactly(file_size: int, slice_size: int) -> None:
    """Raw sizes add up to the file; only the last one is short."""
    frames = -(-file_size // slice_size)
    manifest = parse_manifest(
        _wire(
            file_size=file_size,
            slice_size=slice_size,
            frame_lengths=list(range(1, frames + 1)),
            frame_hashes=bytes(32 * frames),
        )
    )
    sizes = [manifest.raw_size(index) for index in range(manifest.frames)]
    assert sum(sizes) == file_size
    assert set(sizes[:-1]) <= {slice_size}
    assert 0 < sizes[-1] <= slice_size
    assert manifest.wire_bytes == frames * (frames + 1) // 2


def test_each_frame_has_its_own_hash() -> None:
    """32 bytes each, in order."""
    assert UPDATE.frame_hash(3) == blake3(bytes([3])).digest()
    assert b"".join(UPDATE.frame_hash(index) for index in range(UPDATE.frames)) == UPDATE.frame_hashes


def test_state_and_step_lead_to_the_same_digest() -> None:
    """Whether a version comes whole or by a step, it is the same state; the files are two."""
    assert STEP.leads_to == STATE.leads_to == STATE.file_digest != STEP.file_digest
    assert STEP.version == STATE.version == 3


def test_update_state_and_step_are_told_apart() -> None:
    """Asking one for the facts of the other is a mistake of the caller."""
    assert UPDATE.update.site == "north"
    assert STATE.state.version == 3
    assert STEP.step.base_digest == make_state(PLAN, 2).file_digest
    with pytest.raises(AssertionError):
        _ = STATE.step
    with pytest.raises(AssertionError):
        _ = UPDATE.version
    with pytest.raises(AssertionError):
        _ = UPDATE.state
    with pytest.raises(AssertionError):
        _ = STATE.update


@pytest.mark.parametrize(
    ("wire", "field"),
    [
        (_wire(extra=1), "extra"),
        ({key: value for key, value in _wire().items() if key != "codec"}, "codec"),
        (_wire(transfer_id="../../etc/passwd"), "transfer_id"),
        (_wire(transfer_id="A" * 32), "transfer_id"),
        (_wire(federation="a.b"), "federation"),
        (_wire(fingerprint="0" * 63), "fingerprint"),
        (_wire(codec="bf16; rm"), "codec"),
        (_wire(group=3), "group"),
        (_wire(slice_size=MIN_SLICE_BYTES - 8), "slice_size"),
        (_wire(slice_size=MAX_SLICE_BYTES + 8), "slice_size"),
        (_wire(slice_size=SLICE + 4), "slice_size"),
        (_wire(slice_size=float(SLICE)), "slice_size"),
        (_wire(file_size=0), "file_size"),
        (_wire(file_size=-1), "file_size"),
        (_wire(file_digest=b"0" * 64), "file_digest"),
        (_wire(frame_lengths=[]), "frame_lengths"),
        (_wire(frame_lengths=[0] * 5), "frame_lengths"),
        (_wire(frame_lengths=[MAX_FRAME_BYTES + 1] * 5), "frame_lengths"),
        (_wire(frame_lengths=[1.0] * 5), "frame_lengths"),
        (_wire(frame_lengths=5), "frame_lengths"),
        (_wire(frame_lengths=[1] * (MAX_FRAMES + 1)), "frame_lengths"),
        (_wire(frame_lengths=[1] * 4), "4 frames listed"),
        (_wire(frame_hashes=bytes(32 * 4)), "128 bytes of frame hashes"),
        (_wire(created=math.nan), "created"),
        (_wire(created=math.inf), "created"),
        (_wire(created=-1.0), "created"),
        (_wire(facts={}), "facts"),
        (_facts(site="North Hospital"), "site"),
        (_facts(base_version=-1), "base_version"),
        (_facts(base_version=True), "base_version"),
        (_facts(base_digest=""), "base_digest"),
        (_facts(examples=0), "examples"),
        (_facts(examples=1_000_000_001), "examples"),
        (_facts(metrics={"loss": math.nan}), "metrics"),
        (_facts(metrics={"Patient: X": 1.0}), "metrics"),
        (_facts(metrics={"loss": "low"}), "metrics"),
        (_facts(metrics={f"m{number}": 1.0 for number in range(MAX_METRICS + 1)}), "more than 64 metrics"),
        ([], "whole"),
        (None, "whole"),
        ("manifest", "whole"),
    ],
)
def test_what_is_not_a_manifest_is_refused_by_the_name_of_its_field(wire: object, field: str) -> None:
    """One rule for all of it; the words name what is wrong."""
    with pytest.raises(RefusedError) as refused:
        parse_manifest(wire)
    assert refused.value.rule == "bad-manifest"
    assert field in refused.value.message


@pytest.mark.parametrize(
    "wire",
    [
        _wire(codec="John Doe, 1950"),
        _facts(metrics={"John Doe, 1950": 1.0}),
        _wire(**{"John Doe, 1950": 1}),
        _wire(facts={"John Doe, 1950": 1}),
        _wire(**{"1950" * 30: 1}),
    ],
)
def test_a_refusal_never_repeats_what_the_peer_chose(wire: object) -> None:
    """Neither values nor keys: who knows what they hold."""
    with pytest.raises(RefusedError) as refused:
        parse_manifest(wire)
    assert "Doe" not in str(refused.value)
    assert "1950" not in str(refused.value)


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x81\xa1", msgpack.packb([1]), msgpack.packb({1: 2})])
def test_bytes_that_are_no_manifest_are_refused(data: bytes) -> None:
    """Cut off, not msgpack, or not a map with names as keys."""
    with pytest.raises(RefusedError) as refused:
        manifest_from_bytes(data)
    assert refused.value.rule == "bad-manifest"


def test_the_longest_manifest_fits_a_control_message() -> None:
    """24,000 frames with 64 metrics: an offer stays under the packet limit of common brokers."""
    wire = _facts(metrics={f"{number:064d}": 1.5 for number in range(MAX_METRICS)})
    frames = {
        "file_size": SLICE * MAX_FRAMES,
        "frame_lengths": [MAX_FRAME_BYTES] * MAX_FRAMES,
        "frame_hashes": bytes(32 * MAX_FRAMES),
    }
    longest = parse_manifest({**wire, **frames})
    announce = Announce(
        boot="0" * 16,
        fingerprint=digest("f"),
        config_sha256=digest("c"),
        frozen_sha256=digest("w"),
        manifest=parse_manifest({**STATE.to_wire(), **frames}),
        final=False,
        target=3,
    )
    assert len(encode(Offer(manifest=longest))) < MAX_CONTROL_BYTES
    assert len(encode(announce)) < MAX_CONTROL_BYTES
