"""How each hostile file was made: `python -m tests.hostile.make` writes those that are missing, and changes none.

The files themselves are what the tests read, so that a change of these recipes, or of the libraries that they use,
cannot make a file harmless unnoticed.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import zstandard

from shared.manifest import MAX_FRAME_BYTES
from shared.messages import MAX_CONTROL_BYTES, chunk_header
from shared.slices import compress_slice
from tests.hostile.updates import steps, updates

HERE = Path(__file__).parent
RAW_BYTES = 4096
"""Size of the one slice that the frames pretend to hold."""
ID = "ab" * 16
HUGE = 2**62


def _packed(value: Any) -> bytes:
    data: bytes = msgpack.packb(value, use_bin_type=True)
    return data


def _nested(depth: int) -> bytes:
    return b"\x91" * depth + b"\x00"


# -- control messages ---


def _enveloped(body: bytes) -> bytes:
    return _packed({"b": body, "k": "", "s": b""})


def _message(kind: str, **fields: Any) -> bytes:
    return _enveloped(_packed({"v": 2, "t": kind, **fields}))


def _hello(**changes: Any) -> bytes:
    fields = {
        "site": "north",
        "session": "0" * 16,
        "fingerprint": "0f" * 32,
        "config_sha256": "0f" * 32,
        "frozen_sha256": "0f" * 32,
        "software": "hostile",
        "clock": 1.0,
    }
    return _message("hello", **{**fields, **changes})


def messages() -> Iterator[tuple[str, bytes]]:
    """For `shared.messages.decode`."""
    yield "bad-envelope--empty", b""
    yield "bad-envelope--not-a-map", _packed([1, 2, 3])
    yield "bad-envelope--nested-100000-deep", _nested(100_000)
    yield "bad-envelope--says-4-GB-follow", b"\xdf\xff\xff\xff\xff"
    yield "bad-envelope--one-field-more", _packed({"b": b"", "k": "", "s": b"", "x": 1})
    yield "bad-envelope--longer-than-allowed", _packed({"b": bytes(MAX_CONTROL_BYTES), "k": "", "s": b""})
    yield "bad-envelope--cut-in-half", _hello()[:100]
    yield "bad-message--body-cut-in-half", _enveloped(_packed({"v": 2, "t": "probe", "session": "0" * 16})[:20])
    yield "bad-message--body-nested-100000-deep", _enveloped(_nested(100_000))
    yield "bad-message--name-like-a-path", _hello(site="../../../etc/passwd")
    yield "bad-message--name-with-fullwidth-letters", _hello(site="\uff4e\uff4f\uff52\uff54\uff48")
    yield "bad-message--name-with-a-right-to-left-mark", _hello(site="nor\u202eth")
    yield "bad-message--name-with-a-newline", _hello(site="north\n")
    yield "bad-message--clock-is-nan", _hello(clock=float("nan"))
    yield "bad-message--clock-is-infinite", _hello(clock=float("inf"))
    yield "bad-message--clock-before-1970", _hello(clock=-1.0)
    yield "bad-message--unknown-field", _hello(admin=True)
    yield "bad-message--session-like-a-path", _hello(session="../../../../../x")
    yield (
        "bad-message--window-is-negative",
        _message("want", transfer_id=ID, have=b"", window=-1, restart=False, retry_s=0.0),
    )
    yield (
        "bad-message--bitmap-of-a-megabyte",
        _message("want", transfer_id=ID, have=bytes(900_000), window=1, restart=False, retry_s=0.0),
    )
    yield "bad-schema-version--of-the-year-9999", _enveloped(_packed({"v": 9999, "t": "hello"}))
    yield "bad-schema-version--not-a-number", _enveloped(_packed({"v": "1", "t": "hello"}))
    yield "bad-message--grant-is-empty", _message("renewal", grant=b"")
    yield "bad-message--grant-is-text", _message("renewal", grant="{}")
    answer = {"session": "0123456789abcdef", "grant_sha256": "5b" * 32, "detail": ""}
    yield "bad-message--rule-with-a-newline", _message("renewed", **answer, rule="not-newer\n")
    yield "unknown-message--no-such-type", _message("shutdown")
    yield "bad-manifest--offer-without-frames", _message("offer", manifest=_manifest(frame_lengths=[]))
    yield "bad-manifest--announced-step-without-frames", _announce(_step_of(1, frame_lengths=[]))
    yield "bad-message--steps-with-a-gap", _announce(_step_of(1), _step_of(3))
    yield "bad-message--steps-in-a-circle", _announce(_step_of(1), _step_of(2), _step_of(1))
    yield "bad-message--steps-from-nowhere", _announce(_step_of(2))
    yield "bad-message--an-update-among-the-steps", _announce(_manifest())


def _state_digest(version: int) -> str:
    return f"{version:064x}"


def _step_of(version: int, **changes: Any) -> dict[str, Any]:
    facts = {"version": version, "base_digest": _state_digest(version - 1), "state_digest": _state_digest(version)}
    return _manifest(facts=facts, **changes)


def _announce(*steps: dict[str, Any]) -> bytes:
    digests = dict.fromkeys(("fingerprint", "config_sha256", "frozen_sha256"), "0f" * 32)
    whole = _manifest(facts={"version": 0}, file_digest=_state_digest(0))
    fields = {"boot": "0" * 16, "manifest": whole, "final": False, "target": 9, "steps": list(steps)}
    return _message("announce", **digests, **fields)


# -- manifests ---


def _manifest(**changes: Any) -> dict[str, Any]:
    facts = {"site": "north", "base_version": 0, "base_digest": "0f" * 32, "examples": 10, "metrics": {}}
    facts.update({name: changes.pop(name) for name in list(changes) if name in facts})
    fields = {
        "transfer_id": ID,
        "federation": "ward",
        "fingerprint": "0f" * 32,
        "codec": "f32",
        "group": 4,
        "slice_size": RAW_BYTES,
        "file_size": 100,
        "file_digest": "0f" * 32,
        "frame_lengths": [50],
        "frame_hashes": bytes(32),
        "created": 1.0,
        "facts": facts,
    }
    return {**fields, **changes}


def manifests() -> Iterator[tuple[str, bytes]]:
    """For `shared.manifest.manifest_from_bytes`; each breaks one field of a sound one."""
    broken: dict[str, dict[str, Any]] = {
        "id-like-a-path": {"transfer_id": "../" * 10 + "ab"},
        "examples-are-negative": {"examples": -5},
        "examples-without-end": {"examples": HUGE},
        "base-version-is-negative": {"base_version": -1},
        "metric-is-nan": {"metrics": {"loss": float("nan")}},
        "metric-named-like-a-path": {"metrics": {"../loss": 1.0}},
        "metrics-without-end": {"metrics": {f"m{number}": 1.0 for number in range(1000)}},
        "file-of-4-exabytes": {"file_size": HUGE},
        "frame-of-a-gigabyte": {"frame_lengths": [2**30]},
        "frame-of-nothing": {"frame_lengths": [0]},
        "frame-longer-than-a-packet": {"frame_lengths": [MAX_FRAME_BYTES + 1]},
        "frames-that-the-size-does-not-need": {"frame_lengths": [50] * 1000, "frame_hashes": bytes(32_000)},
        "hashes-missing": {"frame_hashes": b""},
        "slices-of-nothing": {"slice_size": 0},
        "slices-of-a-gigabyte": {"slice_size": 2**30},
        "group-of-three": {"group": 3},
        "created-at-infinity": {"created": float("inf")},
        "codec-like-a-path": {"codec": "../../pickle"},
        "site-like-a-path": {"site": "..\\..\\north"},
        "step-to-version-0": {"facts": {"version": 0, "base_digest": "0f" * 32, "state_digest": "0f" * 32}},
        "step-from-nothing": {"facts": {"version": 1, "base_digest": "", "state_digest": "0f" * 32}},
        "step-of-a-site": {
            "facts": {"version": 1, "base_digest": "0f" * 32, "state_digest": "0f" * 32, "site": "north"}
        },
        "witness-of-a-step": {
            "facts": {"version": 1, "base_digest": "0f" * 32, "state_digest": "0f" * 32},
            "witness": {"seq": 1, "head": "0f" * 32, "signature": bytes(64)},
        },
        "witness-of-a-byte": {"witness": {"seq": 1, "head": "0f" * 32, "signature": b"x"}},
    }
    for what, changes in broken.items():
        yield f"bad-manifest--{what}", _packed(_manifest(**changes))
    yield "bad-manifest--cut-in-half", _packed(_manifest())[:100]
    yield "bad-manifest--nested-100000-deep", _nested(100_000)


# -- safetensors headers; the file's size stands behind, as eight bytes ---


def _headed(text: bytes, data: int = 0, size: int | None = None) -> bytes:
    head = struct.pack("<Q", len(text)) + text
    return head + struct.pack("<Q", len(head) + data if size is None else size)


def _entries(*tensors: tuple[str, str, list[Any], list[Any]]) -> bytes:
    entries = {
        name: {"dtype": dtype, "shape": shape, "data_offsets": offsets} for name, dtype, shape, offsets in tensors
    }
    return json.dumps(entries).encode()


def headers() -> Iterator[tuple[str, bytes]]:
    """For `shared.tensorfile.header_size` and `parse_header`."""
    one = ("w", "F32", [4], [0, 16])
    entry = json.dumps({"dtype": "F32", "shape": [4], "data_offsets": [0, 16]})
    yield "header-truncated--four-bytes", b"\x10\x00\x00\x00" + struct.pack("<Q", 4)
    yield "header-size--of-9-exabytes", struct.pack("<QQ", 2**63, 2**40)
    yield "header-size--of-half-a-gigabyte", struct.pack("<QQ", 2**29, 2**40)
    yield "header-truncated--longer-than-the-file", struct.pack("<Q", 1000) + b"{}" + struct.pack("<Q", 10)
    yield "header-json--not-json", _headed(b"{not json}")
    yield "header-json--list", _headed(b"[1, 2]")
    yield "header-json--nan", _headed(b'{"w": NaN}')
    yield "header-json--nested-50000-deep", _headed(b'{"w": ' + b"[" * 50_000 + b"]" * 50_000 + b"}")
    yield "header-json--number-of-5000-digits", _headed(b'{"w": ' + b"9" * 5000 + b"}")
    yield "header-json--bad-utf-8", _headed(b'{"\xff\xfe": 1}')
    yield "header-duplicate--one-name-twice", _headed(f'{{"w": {entry}, "w": {entry}}}'.encode(), 16)
    yield "header-metadata--number", _headed(b'{"__metadata__": {"a": 1}}')
    yield "tensor-name--path", _headed(_entries(("../../w", "F32", [4], [0, 16])), 16)
    yield "tensor-name--empty", _headed(_entries(("", "F32", [4], [0, 16])), 16)
    yield "tensor-name--cyrillic-letter", _headed(_entries(("\u0430.weight", "F32", [4], [0, 16])), 16)
    yield "tensor-name--300-letters", _headed(_entries(("w" * 300, "F32", [4], [0, 16])), 16)
    yield "tensor-entry--no-offsets", _headed(b'{"w": {"dtype": "F32", "shape": [4]}}', 16)
    yield "tensor-dtype--object", _headed(_entries(("w", "O", [4], [0, 16])), 16)
    yield "tensor-dtype--list", _headed(b'{"w": {"dtype": ["F32"], "shape": [4], "data_offsets": [0, 16]}}', 16)
    yield "tensor-shape--huge", _headed(_entries(("w", "F32", [HUGE], [0, 16])), 16)
    yield "tensor-shape--huge-product", _headed(_entries(("w", "F32", [2**31, 2**31], [0, 16])), 16)
    yield "tensor-shape--zero-beside-huge", _headed(_entries(("w", "F32", [0, HUGE], [0, 0])))
    yield "tensor-shape--negative", _headed(_entries(("w", "F32", [-4], [0, 16])), 16)
    yield "tensor-shape--true", _headed(_entries(("w", "F32", [True, 4], [0, 16])), 16)
    yield "tensor-shape--thousand-dimensions", _headed(_entries(("w", "F32", [1] * 1000, [0, 4])), 4)
    yield "tensor-offsets--backwards", _headed(_entries(("w", "F32", [4], [16, 0])), 16)
    yield "tensor-offsets--negative", _headed(_entries(("w", "F32", [4], [-16, 0])), 16)
    yield "tensor-offsets--beyond-everything", _headed(_entries(("w", "F32", [4], [HUGE, HUGE + 16])), 16)
    yield "tensor-size--offsets-too-short", _headed(_entries(("w", "F32", [4], [0, 8])), 8)
    yield "tensor-overlap--same-bytes-twice", _headed(_entries(one, ("x", "F32", [4], [8, 24])), 24)
    yield "tensor-hole--bytes-of-nobody", _headed(_entries(one, ("x", "F32", [4], [32, 48])), 48)
    yield "file-size--bytes-behind", _headed(_entries(one), 16 + 1000)


# -- frames of one slice of RAW_BYTES, byte-grouped by four ---


def _declaring(descriptor: int, fields: bytes) -> bytes:
    """A frame of RAW_BYTES zeros under a header of one's own: RFC 8878, 3.1.1.1."""
    sound = zstandard.ZstdCompressor(write_content_size=True).compress(bytes(RAW_BYTES))
    assert sound[4] == 0b0110_0000, "one segment, two bytes of content size, and then the blocks"
    return sound[:4] + bytes([descriptor]) + fields + sound[7:]


def frames() -> Iterator[tuple[str, bytes]]:
    """For `shared.slices.expand_into`."""
    sound = compress_slice(bytes(range(256)) * 16, 4)
    yield "frame-format--empty", b""
    yield "frame-format--garbage", bytes(range(100))
    yield "frame-format--skippable", b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"
    yield "frame-format--header-cut", sound[:5]
    yield "frame-format--dictionary", _declaring(0b0110_0001, b"\x07" + struct.pack("<H", RAW_BYTES - 256))
    yield "frame-format--one-segment-of-4-exabytes", _declaring(0b1110_0000, struct.pack("<Q", HUGE))
    yield "frame-format--window-of-3-terabytes", _declaring(0b1100_0000, b"\xff" + struct.pack("<Q", RAW_BYTES))
    yield "frame-format--checksum", zstandard.ZstdCompressor(write_checksum=True).compress(bytes(RAW_BYTES))
    yield "frame-size--bomb-of-64-MiB", zstandard.compress(bytes(64 * 1024 * 1024), 19)
    yield "frame-size--declares-4-exabytes", _declaring(0b1100_0000, b"\x00" + struct.pack("<Q", HUGE))
    yield "frame-size--declares-nothing", zstandard.ZstdCompressor(write_content_size=False).compress(bytes(RAW_BYTES))
    yield "frame-size--one-byte-short", zstandard.compress(bytes(RAW_BYTES - 1))
    yield "frame-data--cut", sound[:-10]
    yield "frame-data--second-frame-behind", sound + sound
    yield "frame-data--byte-behind", sound + b"\x00"
    yield "frame-data--changed", sound[:20] + bytes([sound[20] ^ 0xFF]) + sound[21:40] + bytes(40) + sound[80:]


# -- data packets ---


def chunks() -> Iterator[tuple[str, bytes]]:
    """For `shared.messages.parse_chunk`."""
    sound = chunk_header(ID, 0, 100) + bytes(100)
    yield "bad-chunk--empty", b""
    yield "bad-chunk--header-cut", sound[:20]
    yield "bad-chunk--magic", b"XX" + sound[2:]
    yield "bad-chunk--version-of-tomorrow", sound[:2] + b"\x63" + sound[3:]
    yield "bad-chunk--reserved-byte-set", sound[:3] + b"\x01" + sound[4:]
    yield "bad-chunk--says-4-GB", sound[:24] + b"\xff\xff\xff\xff" + sound[28:]
    yield "bad-chunk--body-cut", sound[:-1]
    yield "bad-chunk--byte-behind", sound + b"\x00"


# -- envelopes of a sealed federation ---


def _sealed(**changes: Any) -> bytes:
    """A sound one by its form; nobody has signed it."""
    fields = {
        "k": "0123456789abcdef",
        "n": 1_800_000_000_000_000_000,
        "x": 1_800_000_600,
        "f": bytes(32),
        "e": "pair",
        "b": bytes(100),
        "s": bytes(64),
    }
    return _packed({**fields, **changes})


def envelopes() -> Iterator[tuple[str, bytes]]:
    """For `shared.trust.envelope.parse`."""
    broken: dict[str, dict[str, Any]] = {
        "counter-is-negative": {"n": -1},
        "counter-is-true": {"n": True},
        "counter-is-a-float": {"n": 1.8e18},
        "counter-is-text": {"n": "1800000000000000000"},
        "expiry-is-negative": {"x": -1},
        "expiry-is-nan": {"x": float("nan")},
        "key-id-like-a-path": {"k": "../../etc/passwd/"},
        "key-id-of-a-megabyte": {"k": "0" * 800_000},
        "fingerprint-cut": {"f": bytes(31)},
        "signature-cut": {"s": bytes(63)},
        "signature-is-text": {"s": "0" * 64},
        "body-is-a-list": {"b": [0] * 1000},
        "one-field-more": {"admin": True},
    }
    for what, changes in broken.items():
        yield f"bad-envelope--{what}", _sealed(**changes)
    yield "bad-envelope--empty", b""
    yield "bad-envelope--cut-in-half", _sealed()[:100]
    yield "bad-envelope--nested-100000-deep", _nested(100_000)
    yield "bad-envelope--longer-than-allowed", _sealed(b=bytes(MAX_CONTROL_BYTES))
    yield "unsigned--of-an-open-federation", _hello()


KINDS: dict[str, Callable[[], Iterator[tuple[str, bytes]]]] = {
    "message": messages,
    "envelope": envelopes,
    "manifest": manifests,
    "header": headers,
    "frame": frames,
    "chunk": chunks,
    "update": updates,
    "step": steps,
}


def main() -> None:
    """Write what is missing."""
    for kind, recipes in KINDS.items():
        (HERE / kind).mkdir(exist_ok=True)
        for name, data in recipes():
            path = HERE / kind / f"{name}.bin"
            if not path.exists():
                path.write_bytes(data)


if __name__ == "__main__":
    main()
