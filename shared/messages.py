"""Control messages: frozen, validated at the door, msgpack inside an envelope.

The conversation is the same in both directions. The sender *offers* (a site by `Offer`, the coordinator by the
retained `Announce`); the receiver says what it *wants* (`Want`: bitmap of what it has, chunks it allows in flight);
chunks flow; the receiver wants again. An update ends with a `Receipt`. Every message may be repeated or lost: each
means the same the second time, and the site, which is the one that comes and goes, owns all the timers.

The envelope here is the one of a federation without trust: the signature stays empty. Sealed federations put the same
bodies into `shared.trust.envelope`.

Bodies carry `v` (schema version) and `t` (type). An unknown type is skipped by the caller (`UnknownMessageError`), so
that a newer peer may say new things; a known type with an unknown or wrong field is refused.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal, Self

import msgpack
from pydantic import Field, ValidationError, model_validator

from shared.errors import RefusedError
from shared.ids import Ident, SessionId, Sha256Hex, TransferId
from shared.manifest import (
    MAX_FRAMES,
    Manifest,
    Metrics,
    NonNegative,
    StateFacts,
    StepFacts,
    WireModel,
    describe_invalid,
    parse_manifest,
)

SCHEMA_VERSION = 2
MAX_CONTROL_BYTES = 990_000
MAX_TEXT = 500
MAX_GRANT_BYTES = 100_000

Rule = Annotated[str, Field(pattern=r"^[a-z0-9-]{1,48}$")]
Text = Annotated[str, Field(max_length=MAX_TEXT)]
Version = Annotated[int, Field(ge=0)]


class UnknownMessageError(RefusedError):
    """A message of a type that this release does not know; skip it."""


class Message(WireModel):
    """Base of all control messages; `kind` is the wire's `t`."""

    kind: ClassVar[str]


class Hello(Message):
    """Site to coordinator on each connection: who I am and which federation I think this is."""

    kind: ClassVar[str] = "hello"
    site: Ident
    session: SessionId
    fingerprint: Sha256Hex
    config_sha256: Sha256Hex
    frozen_sha256: Sha256Hex
    software: Text
    clock: NonNegative
    heard: TransferId | None = None
    """`state_id` of the last announcement that reached us; the coordinator repeats to us alone what we missed."""
    heard_final: bool = False


class Probe(Message):
    """Coordinator to site: if you are session `session`, say hello now; another process claims your name."""

    kind: ClassVar[str] = "probe"
    session: SessionId


class Welcome(Message):
    """Coordinator to site: hello accepted for `session`."""

    kind: ClassVar[str] = "welcome"
    session: SessionId
    boot: SessionId
    clock: NonNegative


class Refused(Message):
    """Coordinator to site: session `session` may not take part, under the named rule."""

    kind: ClassVar[str] = "refused"
    session: SessionId
    rule: Rule
    detail: Text


class Offer(Message):
    """Site to coordinator: this sealed update is ready."""

    kind: ClassVar[str] = "offer"
    manifest: Manifest


class Want(Message):
    """Receiver to sender: what I hold durably of a transfer, and how many chunks may be in flight."""

    kind: ClassVar[str] = "want"
    transfer_id: TransferId
    have: Annotated[bytes, Field(max_length=MAX_FRAMES // 8)]
    window: int = Field(ge=0, le=4096)
    """Chunks; 0 means wait, `retry_s` says how long."""
    restart: bool = False
    """Nothing is in flight to me any more: send again whatever I lack."""
    retry_s: NonNegative = 0.0


Outcome = Literal["accepted", "rejected", "merged", "dropped"]


class Wait(Message):
    """Coordinator to site: this update is not taken now, under the named rule; keep it, and offer it again later."""

    kind: ClassVar[str] = "wait"
    transfer_id: TransferId
    rule: Rule
    detail: Text
    retry_s: NonNegative


LOST = "lost-at-rest"
"""Rule under which an accepted update is dropped that the coordinator's disk has lost, and no backup has."""


class Receipt(Message):
    """Coordinator to site: the update is durable, and what became of it so far."""

    kind: ClassVar[str] = "receipt"
    update_id: TransferId
    manifest_sha256: Sha256Hex
    outcome: Outcome
    rule: Rule | None = None
    """Why rejected or dropped."""
    detail: Text = ""
    version: Version | None = None
    """The version it was merged into."""
    staleness: Version | None = None
    weight: NonNegative | None = None


Phase = Literal["starting", "waiting", "pulling", "training", "held", "uploading", "done", "stopped", "failed"]
"""`held`: the disk has no room for another update, or the privacy budget none for another training."""


class Status(Message):
    """Site to coordinator, for people: what the site is doing. Losing one costs nothing."""

    kind: ClassVar[str] = "status"
    site: Ident
    session: SessionId
    phase: Phase
    version: Version | None
    progress: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the phase that is done."""
    metrics: Metrics = Field(default_factory=dict)
    bytes_up: int = Field(default=0, ge=0)
    bytes_down: int = Field(default=0, ge=0)
    outbox: int = Field(default=0, ge=0)
    reconnects: int = Field(default=0, ge=0)


class Announce(Message):
    """Coordinator to everybody, retained: the newest version and the ways to it."""

    kind: ClassVar[str] = "announce"
    boot: SessionId
    fingerprint: Sha256Hex
    config_sha256: Sha256Hex
    frozen_sha256: Sha256Hex
    manifest: Manifest
    """The newest state that can be had whole."""
    final: bool
    """No version follows; the run is complete."""
    target: Version
    steps: tuple[Manifest, ...] = ()
    """One after the other up to the newest version, from that state on or from an earlier one; none in a federation
    whose versions travel whole, and then no field of the message."""

    @model_validator(mode="after")
    def _joined(self) -> Self:
        sound = isinstance(self.manifest.facts, StateFacts)
        sound = sound and all(isinstance(step.facts, StepFacts) for step in self.steps)
        if not sound or any(
            (one.version + 1, one.leads_to) != (two.version, two.step.base_digest) for one, two in pairwise(self.steps)
        ):
            msg = "not a state, and steps of which each leads on from the one before"
            raise ValueError(msg)
        passed = [step.step.base_digest for step in self.steps[:1]] + [step.leads_to for step in self.steps]
        if passed and self.manifest.file_digest not in passed:
            msg = "the steps do not pass the state"
            raise ValueError(msg)
        return self

    @property
    def version(self) -> int:
        """The newest version."""
        return (self.manifest, *self.steps)[-1].version

    @property
    def state_digest(self) -> str:
        """Digest of its state, in hex."""
        return (self.manifest, *self.steps)[-1].leads_to

    @property
    def state_id(self) -> TransferId:
        """The id under which that state travels, or would travel, whole."""
        return self.state_digest[:32]


class Head(Message):
    """Coordinator to site, in sealed federations: its word that row `seq` has hash `head`, for the site to keep."""

    kind: ClassVar[str] = "head"
    version: Version
    """The newest version then."""
    seq: int = Field(ge=1, lt=2**63)
    head: Sha256Hex
    signature: Annotated[bytes, Field(min_length=64, max_length=64)]


class Renewal(Message):
    """Coordinator to site, in sealed federations: a newer grant of the authority's, as it signed it."""

    kind: ClassVar[str] = "renewal"
    grant: Annotated[bytes, Field(min_length=1, max_length=MAX_GRANT_BYTES)]


class Renewed(Message):
    """Site to coordinator: that grant is in this site's kit, or it was refused under the named rule."""

    kind: ClassVar[str] = "renewed"
    session: SessionId
    grant_sha256: Sha256Hex
    rule: Rule | None = None
    detail: Text = ""


class Presence(Message):
    """Site to everybody who may read it, retained; the broker says online=False for us by the last will."""

    kind: ClassVar[str] = "presence"
    site: Ident
    session: SessionId
    online: bool


_TYPES: dict[str, type[Message]] = {
    kind.kind: kind
    for kind in (
        *(Hello, Probe, Welcome, Refused, Offer, Want, Wait, Receipt, Status),
        *(Announce, Head, Renewal, Renewed, Presence),
    )
}


@dataclass(frozen=True, slots=True)
class Envelope:
    """A body, and the places for who signed it, which stay empty in a federation without trust."""

    body: bytes
    key_id: str
    signature: bytes


def encode(message: Message) -> bytes:
    """Return the enveloped bytes of a message, unsigned; equal messages give equal bytes."""
    packed: bytes = msgpack.packb({"b": encode_body(message), "k": "", "s": b""}, use_bin_type=True)
    return packed


def encode_body(message: Message) -> bytes:
    """Return the bytes of a message's body alone; equal messages give equal bytes."""
    fields: dict[str, Any] = {**vars(message)}
    manifest, steps = fields.pop("manifest", None), fields.pop("steps", ())
    if manifest is not None:
        fields["manifest"] = manifest.to_wire()
    if steps:
        fields["steps"] = [step.to_wire() for step in steps]
    body: bytes = msgpack.packb({"v": SCHEMA_VERSION, "t": message.kind, **fields}, use_bin_type=True)
    return body


def open_envelope(data: bytes) -> Envelope:
    """Split the envelope; RefusedError(rule='bad-envelope') on anything but the three fields of the right types.

    The rule is 'sealed' for the envelope of a sealed federation.
    """
    outer = _unpack(data, "bad-envelope")
    match outer:
        case {"b": bytes(body), "k": str(key_id), "s": bytes(signature)} if len(outer) == 3:
            return Envelope(body, key_id, signature)
        case {"e": str(), "f": bytes(), "s": bytes()}:
            raise RefusedError("a sealed message, and this end's federation.toml says nothing of trust", rule="sealed")
        case _:
            pass
    raise RefusedError("the envelope does not hold exactly body, key id and signature", rule="bad-envelope")


def decode(data: bytes) -> Message:
    """Parse and validate one enveloped message; errors as `decode_body`, and RefusedError(rule='bad-envelope')."""
    return decode_body(open_envelope(data).body)


def decode_body(data: bytes) -> Message:
    """Parse and validate one message's body.

    Raises RefusedError with rule 'bad-schema-version', 'bad-message' or 'bad-manifest', and UnknownMessageError for a
    type that this release does not know.
    """
    body = _unpack(data, "bad-message")
    version, kind = body.pop("v", None), body.pop("t", None)
    if version != SCHEMA_VERSION:
        newer = isinstance(version, int) and version > SCHEMA_VERSION
        raise RefusedError(
            f"a message of schema version {version if isinstance(version, int) else '?'}, this release speaks "
            f"{SCHEMA_VERSION}",
            rule="bad-schema-version",
            hint=f"update the release at {'this' if newer else 'the other'} end",
        )
    if not isinstance(kind, str) or kind not in _TYPES:
        raise UnknownMessageError("a message of unknown type", rule="unknown-message")
    if "manifest" in body:
        body["manifest"] = parse_manifest(body["manifest"])
    if isinstance(body.get("steps"), list):
        body["steps"] = tuple(parse_manifest(step) for step in body["steps"])
    try:
        return _TYPES[kind].model_validate(body)
    except ValidationError as error:
        raise RefusedError(describe_invalid(kind, error), rule="bad-message") from None


def _unpack(data: bytes, rule: str) -> dict[str, Any]:
    if len(data) > MAX_CONTROL_BYTES:
        raise RefusedError(f"a control message of {len(data)} bytes, at most {MAX_CONTROL_BYTES} allowed", rule=rule)
    try:
        value = msgpack.unpackb(data, raw=False, strict_map_key=True)
    except (ValueError, msgpack.UnpackException, RecursionError):
        raise RefusedError("a control message is not msgpack", rule=rule) from None
    if not isinstance(value, dict):
        raise RefusedError("a control message is not a map", rule=rule)
    return value


# -- data plane ---

_CHUNK = struct.Struct(">2sBx16sII")
CHUNK_HEADER_BYTES = _CHUNK.size
"""28: magic 'MB', version, one zero byte, transfer id, index, length."""


def chunk_header(transfer_id: str, index: int, length: int) -> bytes:
    """The fixed binary header that stands before a frame."""
    return _CHUNK.pack(b"MB", SCHEMA_VERSION, bytes.fromhex(transfer_id), index, length)


@dataclass(frozen=True, slots=True)
class Chunk:
    """One frame of a transfer, as it came; the frame is a view of the packet, not a copy."""

    transfer_id: str
    index: int
    frame: memoryview


def parse_chunk(packet: bytes) -> Chunk:
    """Split a data packet; RefusedError(rule='bad-chunk') when magic, version or length do not fit."""
    if len(packet) < CHUNK_HEADER_BYTES:
        raise RefusedError("a data packet shorter than its header", rule="bad-chunk")
    magic, version, transfer_id, index, length = _CHUNK.unpack_from(packet)
    if magic != b"MB" or version != SCHEMA_VERSION or packet[3] != 0:
        raise RefusedError("a data packet with another magic or version", rule="bad-chunk")
    if length != len(packet) - CHUNK_HEADER_BYTES:
        raise RefusedError("a data packet whose length field is wrong", rule="bad-chunk")
    return Chunk(transfer_id.hex(), index, memoryview(packet)[CHUNK_HEADER_BYTES:])
