"""Control messages and data packets: golden bytes, round trips, and a named rule for whatever else comes."""

from __future__ import annotations

import contextlib
from pathlib import Path

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import RefusedError
from shared.manifest import Manifest
from shared.messages import (
    CHUNK_HEADER_BYTES,
    MAX_CONTROL_BYTES,
    Announce,
    Head,
    Hello,
    Message,
    Offer,
    Presence,
    Probe,
    Receipt,
    Refused,
    Renewal,
    Renewed,
    Status,
    UnknownMessageError,
    Wait,
    Want,
    Welcome,
    chunk_header,
    decode,
    encode,
    open_envelope,
    parse_chunk,
)
from tests.factories import digest, make_federation, make_plan, make_state, make_step, make_update

PLAN = make_plan(make_federation())
# The golden bytes must not follow what a configuration happens to hold.
AGREED = {"fingerprint": digest("f")}
STATE = make_state(PLAN, 0).model_copy(update=AGREED)
UPDATE = make_update(PLAN, "north", STATE, update_id="0" * 31 + "1").model_copy(update=AGREED)
SESSION = "0123456789abcdef"
ID = "0" * 31 + "1"

EXAMPLES: list[Message] = [
    Hello(
        site="north",
        session=SESSION,
        fingerprint=digest("f"),
        config_sha256=digest("c"),
        frozen_sha256=digest("w"),
        software="mailboat 0.1",
        clock=1.5,
        heard=ID,
        heard_final=False,
    ),
    Probe(session=SESSION),
    Welcome(session=SESSION, boot=SESSION, clock=2.5),
    Refused(session=SESSION, rule="other-config", detail="federation.toml differs"),
    Offer(manifest=UPDATE),
    Want(transfer_id=ID, have=b"\x05", window=16, restart=True),
    Wait(transfer_id=ID, rule="no-room", detail="12.0 MiB free on the disk", retry_s=15.0),
    Receipt(update_id=ID, manifest_sha256=digest("m"), outcome="merged", version=3, staleness=1, weight=0.25),
    Status(site="north", session=SESSION, phase="training", version=2, progress=0.5, metrics={"loss": 0.25}),
    Announce(
        boot=SESSION,
        fingerprint=digest("f"),
        config_sha256=digest("c"),
        frozen_sha256=digest("w"),
        manifest=STATE,
        final=False,
        target=3,
    ),
    Head(version=3, seq=27, head="5b" * 32, signature=bytes(range(64))),
    Renewal(grant=b'{"v": 1}'),
    Renewed(session=SESSION, grant_sha256=digest("g"), rule="not-newer", detail="made before"),
    Presence(site="north", session=SESSION, online=True),
]
STEPS = tuple(make_step(PLAN, version).model_copy(update=AGREED) for version in (1, 2, 3))
STEPPED = Announce(
    boot=SESSION,
    fingerprint=digest("f"),
    config_sha256=digest("c"),
    frozen_sha256=digest("w"),
    manifest=make_state(PLAN, 2).model_copy(update=AGREED),
    final=False,
    target=9,
    steps=STEPS,
)
GOLDEN = Path(__file__).parents[2] / "golden" / "messages"


def _body(message: Message) -> dict[str, object]:
    body: dict[str, object] = msgpack.unpackb(open_envelope(encode(message)).body)
    return body


def _sealed(body: object) -> bytes:
    packed: bytes = msgpack.packb({"b": msgpack.packb(body), "k": "", "s": b""})
    return packed


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: message.kind)
def test_the_bytes_of_each_message_are_the_published_ones(message: Message) -> None:
    """A change of the wire format must be meant: these files are read by releases that are out there."""
    assert encode(message) == (GOLDEN / f"{message.kind}.msgpack").read_bytes()


def test_an_announcement_of_steps_has_the_published_bytes() -> None:
    """One of a federation whose versions travel whole has no such field, as before there were steps."""
    assert encode(STEPPED) == (GOLDEN / "announce_steps.msgpack").read_bytes()
    assert "steps" not in _body(STEPPED.model_copy(update={"steps": ()}))


@pytest.mark.parametrize("message", [*EXAMPLES, STEPPED], ids=lambda message: message.kind)
def test_a_message_survives_the_wire(message: Message) -> None:
    """Decoding what was encoded gives an equal message."""
    assert decode(encode(message)) == message


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: message.kind)
def test_an_unknown_field_is_refused(message: Message) -> None:
    """A known type with a field that this release does not know breaks a rule; nothing is guessed."""
    with pytest.raises(RefusedError) as refused:
        decode(_sealed({**_body(message), "extra": 1}))
    assert refused.value.rule == "bad-message"


def test_an_announcement_names_the_newest_state_however_it_travels() -> None:
    """Version, digest and id are those of the state behind the last step; without steps, of the whole one."""
    third = make_state(PLAN, 3)
    assert (STEPPED.version, STEPPED.state_digest, STEPPED.state_id) == (3, third.file_digest, third.transfer_id)
    whole = STEPPED.model_copy(update={"steps": ()})
    assert (whole.version, whole.state_id) == (2, make_state(PLAN, 2).transfer_id)


@pytest.mark.parametrize(
    ("manifest", "steps"),
    [
        pytest.param(STATE, (STEPS[0], STEPS[2]), id="a gap"),
        pytest.param(STATE, (STEPS[1], STEPS[0]), id="backwards"),
        pytest.param(STATE, (STEPS[0], make_step(PLAN, 2, salt="other")), id="from another state"),
        pytest.param(STATE, STEPS[1:], id="begin behind the state"),
        pytest.param(make_state(PLAN, 9), STEPS, id="end before the state"),
        pytest.param(make_state(PLAN, 2, salt="other"), STEPS, id="pass another state"),
        pytest.param(STATE, (make_state(PLAN, 1),), id="a state among them"),
        pytest.param(STEPS[0], STEPS, id="a step in the state's place"),
        pytest.param(UPDATE, (), id="an update in the state's place"),
    ],
)
def test_steps_that_lead_nowhere_are_refused(manifest: Manifest, steps: tuple[Manifest, ...]) -> None:
    """Each step leads on from the one before, and all of them from the state that can be had whole."""
    body = {**_body(STEPPED), "manifest": manifest.to_wire(), "steps": [step.to_wire() for step in steps]}
    with pytest.raises(RefusedError) as refused:
        decode(_sealed(body))
    assert refused.value.rule == "bad-message"


def test_an_unknown_type_is_told_apart() -> None:
    """A newer peer may say new things; the caller skips them."""
    with pytest.raises(UnknownMessageError):
        decode(_sealed({"v": 2, "t": "telepathy"}))


@pytest.mark.parametrize(
    ("data", "rule"),
    [
        (b"", "bad-envelope"),
        (b"\xc1", "bad-envelope"),
        (msgpack.packb([1, 2]), "bad-envelope"),
        (msgpack.packb({"b": b"", "k": ""}), "bad-envelope"),
        (msgpack.packb({"b": "text", "k": "", "s": b""}), "bad-envelope"),
        (b"x" * (MAX_CONTROL_BYTES + 1), "bad-envelope"),
        (_sealed([1]), "bad-message"),
        (_sealed({"v": 3, "t": "probe", "session": SESSION}), "bad-schema-version"),
        (_sealed({"v": 2, "t": "probe", "session": "../../etc"}), "bad-message"),
        (_sealed({"v": 2, "t": "probe", "session": SESSION + "\n"}), "bad-message"),
        (_sealed({"v": 2, "t": "renewal", "grant": b""}), "bad-message"),
        (_sealed({"v": 2, "t": "renewal", "grant": b"x" * 100_001}), "bad-message"),
        (_sealed({"v": 2, "t": "renewed", "session": SESSION, "grant_sha256": ID}), "bad-message"),
        (_sealed({"v": 2, "t": "offer", "manifest": {"kind": "x"}}), "bad-manifest"),
        (_sealed({**_body(STEPPED), "steps": [{"kind": "x"}]}), "bad-manifest"),
        (_sealed({**_body(STEPPED), "steps": b"none"}), "bad-message"),
        (_sealed({"v": 2, "t": "want", "transfer_id": ID, "have": b"", "window": -1}), "bad-message"),
        (_sealed({"v": 2, "t": "presence", "site": "A B", "session": SESSION, "online": True}), "bad-message"),
    ],
)
def test_what_is_not_a_message_breaks_a_named_rule(data: bytes, rule: str) -> None:
    """Each kind of nonsense has its rule, and the error never repeats the bytes."""
    with pytest.raises(RefusedError) as refused:
        decode(data)
    assert refused.value.rule == rule
    assert "etc" not in str(refused.value)


@given(st.binary(max_size=400))
def test_no_bytes_crash_the_decoder(data: bytes) -> None:
    """Whatever comes is a message or a RefusedError."""
    with contextlib.suppress(RefusedError):
        decode(data)


def test_a_chunk_survives_the_wire_without_a_copy() -> None:
    """Header and frame come apart as they went together; the frame is a view of the packet."""
    packet = chunk_header(ID, 7, 3) + b"abc"
    chunk = parse_chunk(packet)
    assert (chunk.transfer_id, chunk.index, bytes(chunk.frame)) == (ID, 7, b"abc")
    assert chunk.frame.obj is packet


@pytest.mark.parametrize(
    "packet",
    [
        b"",
        chunk_header(ID, 0, 3)[: CHUNK_HEADER_BYTES - 1],
        chunk_header(ID, 0, 3) + b"ab",
        chunk_header(ID, 0, 3) + b"abcd",
        b"XX" + chunk_header(ID, 0, 0)[2:],
        b"MB\x03" + chunk_header(ID, 0, 0)[3:],
        b"MB\x02\x01" + chunk_header(ID, 0, 0)[4:],
    ],
)
def test_what_is_not_a_chunk_is_refused(packet: bytes) -> None:
    """Wrong magic, version, padding or length: one rule."""
    with pytest.raises(RefusedError) as refused:
        parse_chunk(packet)
    assert refused.value.rule == "bad-chunk"
