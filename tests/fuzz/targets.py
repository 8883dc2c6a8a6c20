"""The decoders of foreign bytes, each with sound samples, the mutation that fits it, and what calls it.

A target returns or raises an error of the project's own; anything else is a crash.
"""

from __future__ import annotations

import functools
import random
import ssl
import struct
import tempfile
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import msgpack
import numpy as np
import zstandard
from blake3 import blake3
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from coordinator import records, snapshots
from coordinator.intake import Intake
from coordinator.offers import check_id, check_offer
from mailboat.enrolment import parse_request
from shared import messages
from shared.codec import Codec, decode_add, encode, part_specs
from shared.config import AdmissionSection, CodecName, CoordinatorConfig, FederationConfig, SiteConfig
from shared.configfile import parse_config
from shared.errors import ConfigError, RefusedError
from shared.link.packets import MalformedPublishError, parse_publish
from shared.manifest import Manifest, manifest_from_bytes
from shared.plan import BLOCKS_KEY, blocks_from
from shared.reader import TensorReader
from shared.slices import compress_slice
from shared.states import State
from shared.tensorfile import NUMPY_DTYPES, build_header, header_size, parse_header, tensor_bytes
from shared.topics import Channel
from shared.transfer import Bitmap, Sender
from shared.trust import envelope, payload
from shared.trust.document import to_json
from shared.trust.grant import Holder, check_renewal, make_grant, parse_grant
from shared.trust.kit import PublicKeys, authority_pem
from shared.trust.membership import (
    public_bytes,
    sign_membership,
    stated_membership,
    verify_endorsements,
    verify_membership,
    verify_revocations,
)
from shared.trust.succession import Introduction, introduce
from tests.factories import make_federation, make_plan, make_state, make_step, make_update
from tests.fuzz.auditors import AUDITORS
from tests.fuzz.mutate import mutated_bytes, mutated_json, mutated_msgpack, mutated_value, packed
from tests.fuzz.target import Target
from tests.unit.shared.transfers import SLICE_BYTES, transfer_of
from tests.unit.shared.trust.sealed_world import OFFER, World, hello

GOLDEN = Path(__file__).parents[1] / "golden"
FEDERATION = make_federation()
PLAN = make_plan(FEDERATION)
STATE = make_state(PLAN, 0)
STEP = make_step(PLAN, 1)
UPDATE = make_update(PLAN, "north", STATE)
AUTHORITY = bytes(range(32))
TOPIC = "mb/v1/ward/site/north/up/ctl"


def _golden(folder: str, pattern: str = "*.msgpack") -> list[bytes]:
    return [path.read_bytes() for path in sorted((GOLDEN / folder).glob(pattern))]


def _inner(data: bytes, rng: random.Random) -> bytes:
    """An envelope whose body is spoilt, and which is sound otherwise."""
    outer = msgpack.unpackb(data, raw=False)
    outer["b"] = mutated_msgpack(outer["b"], rng)
    return packed(outer, data, rng)


# -- what calls each ---


def _message(data: bytes) -> None:
    message = messages.decode(data)
    if isinstance(message, messages.Offer):
        _offer(message.manifest)
    if isinstance(message, messages.Want):
        Sender(5).on_want(message.have, message.window)


def _offer(manifest: Manifest) -> None:
    if hasattr(manifest.facts, "site"):
        check_id(manifest, site="north")
        check_offer(manifest, site="north", plan=PLAN, federation=FEDERATION)
        Intake(AdmissionSection()).put_off("north", manifest, 0.0)


def _manifest(data: bytes) -> None:
    manifest = manifest_from_bytes(data)
    assert manifest_from_bytes(manifest.to_bytes()) == manifest
    _offer(manifest)


def _chunk(data: bytes) -> None:
    chunk = messages.parse_chunk(data)
    payload.open_chunk(_CIPHER, UPDATE, chunk)


_CIPHER = payload.cipher(bytes(32), payload.UPDATE_DOMAIN, UPDATE.transfer_id)


def _document(data: bytes) -> None:
    for read in (stated_membership, _verified, _listed, _endorsed):
        try:
            read(data)
        except RefusedError:
            continue


def _verified(data: bytes) -> object:
    return verify_membership(data, [AUTHORITY], federation="north")


def _listed(data: bytes) -> object:
    return verify_revocations(data, [AUTHORITY], federation="north")


def _endorsed(data: bytes) -> object:
    return verify_endorsements(data, [AUTHORITY], federation="north")


def _header(data: bytes) -> None:
    size = int.from_bytes(data[-8:], "little") % (1 << 40)
    head = data[:-8]
    if len(head) >= 8 and header_size(head[:8], size) == len(head) - 8:
        blocks_from(parse_header(head, size).metadata)


def _bitmap(data: bytes) -> None:
    size = 1 + data[0] * 93 if data else 1
    have = Bitmap.from_bytes(size, data[1:])
    assert len(have) <= size
    assert all(index < size for index in have.missing())


def _config(kind: type[Any]) -> Callable[[bytes], object]:
    def run(data: bytes) -> object:
        try:
            tree = tomllib.loads(data.decode())
        except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError):
            raise ConfigError("not TOML", hint="") from None  # as load_config says it
        return parse_config(tree, kind, "fuzz")

    return run


def _packet(data: bytes) -> None:
    try:
        found = parse_publish(data[0] if data else 0, data[1:], modern=bool(len(data) % 2))
    except MalformedPublishError:
        return
    assert len(found.topic) + len(found.payload) <= len(data)


def _packet_sample(qos: int, properties: bytes) -> bytes:
    topic = TOPIC.encode()
    packet_id = b"\0\7" if qos else b""
    return bytes([0x30 | qos << 1]) + struct.pack(">H", len(topic)) + topic + packet_id + properties + b"payload"


_PLACE = tempfile.TemporaryDirectory(prefix="mailboat-fuzz-")


@functools.cache
def _world() -> World:
    return World(Path(_PLACE.name))


def _member(data: bytes) -> None:
    """What a member may put into an envelope that is its own in all else: signed, encrypted, next in order."""
    world = _world()
    kit = world.north.kit
    world.now += 1e-3
    header = envelope.Header(
        TOPIC, kit.member.key_id, int(world.now * 1e9), int(world.now) + 600, bytes.fromhex(PLAN.fingerprint), "pair"
    )
    body = envelope.encrypt_for(world.coordinator.kit.member.box_key, header, data)
    message = world.coordinator.open(envelope.pack(header, body, kit.sign_key), Channel.UP_CTL, "north", world.now)
    if isinstance(message, messages.Offer):
        _offer(message.manifest)


def _member_sample(message: messages.Message) -> bytes:
    return envelope.Content(messages.encode_body(message), bytes(32)).to_bytes()


def _content_mutated(data: bytes, rng: random.Random) -> bytes:
    return _inner(data, rng) if rng.random() < 0.7 else mutated_msgpack(data, rng)


# -- transfers: a manifest that fits, and frames that hold something else ---


def _transfer_sample(codec: Any) -> bytes:
    manifest, frames = transfer_of({"w": np.linspace(-1, 1, 3000, dtype=np.float32)}, codec)
    packed: bytes = msgpack.packb([manifest.to_bytes(), frames])
    return packed


@functools.cache
def _zeros(size: int) -> bytes:
    return zstandard.compress(bytes(size))


def _transfer_mutated(data: bytes, rng: random.Random) -> bytes:
    raw, frames = msgpack.unpackb(data)
    at = rng.randrange(len(frames))
    match rng.randrange(4):
        case 0:
            frames[at] = mutated_bytes(frames[at], rng)
        case 1:  # a bomb: much more than a slice, or a lie about it
            size = rng.choice((SLICE_BYTES - 1, SLICE_BYTES + 1, 10_000_000, 0))
            frames[at] = _zeros(size)
        case 2:  # the same slice with other content, soundly compressed
            size = rng.choice((SLICE_BYTES, 1, 100))
            frames[at] = compress_slice(rng.randbytes(size), rng.choice((1, 2, 4)))
        case _:  # another header, soundly compressed, as long as the first slice
            entries = [("w", rng.choice(("F32", "BF16", "I8", "F64")), (rng.choice((3000, 0, 2**40)),))]
            try:
                first = build_header(entries, {})  # type: ignore[arg-type]
            except (KeyError, AssertionError, ValueError, RefusedError):
                first = struct.pack("<Q", rng.choice((0, 2**63, 100))) + rng.randbytes(92)
            frames[0] = compress_slice((first + bytes(SLICE_BYTES))[:SLICE_BYTES], 2)
    manifest = msgpack.unpackb(raw, raw=False)
    manifest["frame_lengths"] = [max(1, len(frame)) for frame in frames]
    manifest["frame_hashes"] = b"".join(blake3(frame).digest() for frame in frames)
    if rng.random() < 0.2:
        manifest = mutated_value(manifest, rng)
    return packed([packed(manifest, raw, rng), frames], data, rng)


def _transfer(data: bytes) -> None:
    try:
        raw, frames = msgpack.unpackb(data)
        manifest = manifest_from_bytes(raw)
    except (ValueError, TypeError):
        return
    if len(frames) != manifest.frames:
        return
    reader = TensorReader(manifest, lambda index: frames[index], verify=True)
    for _name, values in reader.tensors():
        assert values.dtype == np.float32
    reader.verify_file()


_WHOLE, _WHOLE_FRAMES = transfer_of({"w": np.linspace(-1, 1, 3000, dtype=np.float32)}, "f32")


def _step(data: bytes) -> None:
    """The same transfers, added to a sound state of the tensors that they say they hold."""
    try:
        raw, frames = msgpack.unpackb(data)
        manifest = manifest_from_bytes(raw)
    except (ValueError, TypeError):
        return
    if len(frames) != manifest.frames or hasattr(manifest.facts, "site"):
        return
    whole = TensorReader(_WHOLE, lambda index: _WHOLE_FRAMES[index], verify=False)
    state = State(whole, [TensorReader(manifest, lambda index: frames[index], verify=False)])
    with np.errstate(over="ignore", invalid="ignore"):
        assert {name: values.dtype for name, values in state.items()} == {"w": np.float32}


# -- the stored parts of one tensor, as they come out of a sound file ---

_VALUES = ((np.arange(5000) * 7919 % 5000 - 2500) / 512).astype(np.float32)


def _parts_target(codec: Codec) -> Target:
    sample = b"".join(array.tobytes() for _, _, array in encode("w", _VALUES, codec))
    return Target(f"parts-{codec}", [sample], mutated_bytes, lambda data: _parts(data, codec), 2)


def _parts(data: bytes, codec: Codec) -> None:
    parts = []
    for _, dtype, shape in part_specs("w", _VALUES.shape, codec):
        size = tensor_bytes(dtype, shape)
        parts.append(np.frombuffer(data[:size].ljust(size, b"\0"), dtype=NUMPY_DTYPES[dtype]).reshape(shape))
        data = data[size:]
    accumulator = np.zeros_like(_VALUES)
    try:
        decode_add(parts, codec, 0.5, accumulator)
    except RefusedError:
        assert not accumulator.any(), "refused, and added all the same"
        raise
    assert np.isfinite(accumulator).all()


# -- files ---


_TOML = {
    FederationConfig: b'[federation]\nname = "ward"\nversions = 3\n[model]\nbase = "b"\n[codec]\nup = "bf16"\n'
    b'[aggregation]\nmode = "fedbuff"\n[aggregation.staleness]\nkind = "hinge"\n[trust]\nmode = "sealed"\n',
    CoordinatorConfig: b'federation = "f"\nstorage = "s"\n[broker]\nurl = "mqtts://h:1"\n[admission]\nnorm_max = 1.5\n',
    SiteConfig: b'name = "north"\nfederation = "f"\nstorage = "s"\n[data]\nnotes = "n"\n[link]\nwindow = 4\n',
}

# -- renewals: signed by the right authority around certificates that are not what they should be ---

_BEFORE, _AUTHORITY = (Ed25519PrivateKey.from_private_bytes(bytes([n] * 32)) for n in (1, 2))
_INTRODUCTION = introduce(_BEFORE, public_bytes(_AUTHORITY), "ward")
_GRANT = parse_grant((GOLDEN / "trust" / "north-2.grant").read_bytes())
"""Its certificates are taken, which nobody can make twice the same: signing them is random."""
_MEMBER = stated_membership(_GRANT.member)
_ISSUED = _MEMBER.not_before
_CERTIFICATE, _CA = (x509.load_pem_x509_certificate(each.encode()) for each in (_GRANT.certificate, _GRANT.ca))
_COORDINATOR = _MEMBER.model_copy(update={"role": "coordinator", "name": "coordinator"})
_HOLDER = Holder(
    _MEMBER.model_copy(update={"not_before": 0}),
    PublicKeys(_MEMBER.sign_key, _MEMBER.box_key),
    _CERTIFICATE.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint),
    (public_bytes(_BEFORE),),
)
_RENEWAL: bytes = msgpack.packb(
    [
        [_INTRODUCTION.by, _INTRODUCTION.key, _INTRODUCTION.signature],
        sign_membership(_AUTHORITY, _MEMBER),
        *(each.public_bytes(Encoding.DER) for each in (_CERTIFICATE, _CA, _CA)),
    ]
)


def _renewal(data: bytes) -> None:
    try:
        word, member, certificate, *cas = msgpack.unpackb(data)
        introduction = Introduction(by=word[0], key=word[1], signature=word[2])
        pems = [ssl.DER_cert_to_PEM_cert(each) for each in (certificate, *cas)]
        grant = make_grant(
            _AUTHORITY,
            name="north",
            federation="ward",
            member=member,
            coordinator=sign_membership(_AUTHORITY, _COORDINATOR),
            certificate=pems[0],
            ca="".join(pems[1:]),
            authorities=authority_pem([public_bytes(_AUTHORITY)]).decode(),
            introductions=(introduction,),
        )
    except (ValueError, TypeError, LookupError):  # not those strings of bytes: this target is about them
        return
    check_renewal(to_json(grant), _HOLDER, _ISSUED)


_PARTS = [("a", "F32", (3, 4)), ("b", "BF16", (7,)), ("c", "I8", (300,))]
_HEADER = build_header(_PARTS, {"mailboat": "state", BLOCKS_KEY: "2,3,5"})  # type: ignore[arg-type]


def _header_sample() -> bytes:
    return _HEADER + (len(_HEADER) + 48 + 14 + 300).to_bytes(8, "little")


def _header_mutated(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.3:
        return mutated_bytes(data, rng)
    text = mutated_json(data[8:-8], rng)
    return struct.pack("<Q", len(text)) + text + data[-8:]


ENVELOPES = _golden("trust", "*.envelope")
CONTENT = [envelope.Content(b"body", bytes(32)).to_bytes()]
DOCUMENTS = [*_golden("trust", "*.member"), *_golden("trust", "revocations"), *_golden("trust", "endorsements")]


def _envelope(data: bytes) -> None:
    envelope.parse(data, TOPIC).signed_by(AUTHORITY)


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("message", _golden("messages"), mutated_msgpack, _message, 15),
        Target("body", _golden("messages"), _inner, _message, 20),
        Target(
            "envelope", _golden("trust", "*.envelope"), mutated_msgpack, lambda data: envelope.parse(data, TOPIC), 10
        ),
        Target(
            "packet",
            [_packet_sample(1, b"\0"), _packet_sample(0, b""), _packet_sample(1, b"\x80\1" + bytes(128))],
            mutated_bytes,
            _packet,
            5,
        ),
        Target("member", [_member_sample(OFFER), _member_sample(hello())], _content_mutated, _member, 3),
        Target("content", CONTENT, mutated_msgpack, envelope.parse_content, 5),
        Target("manifest", [UPDATE.to_bytes(), STATE.to_bytes(), STEP.to_bytes()], mutated_msgpack, _manifest, 10),
        Target("chunk", _golden("trust", "*.chunk"), mutated_bytes, _chunk, 10),
        Target("document", DOCUMENTS, mutated_msgpack, _document, 5),
        Target("header", [_header_sample()], _header_mutated, _header, 10),
        Target("bitmap", [b"\x01" + bytes(12)], mutated_bytes, _bitmap, 3),
        *(
            Target(f"{what}-{codec}", [_transfer_sample(codec)], _transfer_mutated, run, 2)
            for what, run in (("transfer", _transfer), ("step", _step))
            for codec in get_args(CodecName)
        ),
        *(_parts_target(codec) for codec in ("int8", "int4", "ternary", "topk2", "topk2x4")),
        Target("record", _golden("journal"), mutated_msgpack, records.from_bytes, 5),
        Target("snapshot", _golden("storage", "*.zst"), mutated_bytes, snapshots.from_bytes, 1),
        Target("request", _golden("trust", "*.request"), mutated_json, parse_request, 1),
        Target("grant", _golden("trust", "*.grant"), mutated_json, parse_grant, 1),
        Target("renewal", [_RENEWAL], mutated_msgpack, _renewal, 2),
        *AUDITORS,
        *(Target(kind.__name__, [text], mutated_bytes, _config(kind), 1) for kind, text in _TOML.items()),
    )
}
