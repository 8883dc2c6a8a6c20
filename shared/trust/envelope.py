"""One control message on the wire of a sealed federation: signed by its sender, readable by its receivers alone.

    envelope   msgpack map, exactly these fields:
      k   key id of the sender (16 hex digits)
      n   counter, rises with every message of the sender
      x   expiry, unix seconds
      f   fingerprint of the sender's plan, 32 bytes
      e   how `b` is encrypted: "pair", "fed:<id of the federation key>", or "" (presence alone)
      b   the content, encrypted as `e` says
      s   Ed25519 over framed("mailboat envelope v1", topic, k, n, x, f, e, b)
    content    msgpack map {"b": body, "g": grant}; the grant is a 32-byte key that goes with this message, or empty

The topic is signed, and with it federation, channel and site. The fingerprint stands in the envelope instead of being
mixed into keys, so that a site whose plan differs can still be told so.

"pair" is HPKE (RFC 9180; X25519, HKDF-SHA256, ChaCha20-Poly1305) to the receiver's box key, with the framed header as
info. Each message has an ephemeral key pair of its own, so no nonce can ever repeat: not after a restart, not under a
clock that jumped back, not in a virtual machine that was restored. (A static pairwise key with the counter as nonce
would rest on that counter being kept for ever.) "fed" is ChaCha20-Poly1305 under HKDF(federation key, 32 random bytes),
which has the same property; the random bytes stand before the ciphertext.

Counters order messages; they protect nothing but that order.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import Any

import msgpack
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from shared.errors import RefusedError
from shared.messages import MAX_CONTROL_BYTES
from shared.trust.signing import KEY_BYTES, SIGNATURE_BYTES, framed, key_id, sign, verifies

ENVELOPE_DOMAIN = "mailboat envelope v1"
PAIR_DOMAIN = "mailboat pair v1"
FEDERATION_DOMAIN = "mailboat federation v1"
PAIR = "pair"
CLEAR = ""
UINT64_MAX = 2**64 - 1

_SUITE = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.CHACHA20_POLY1305)
_NONCE = bytes(12)
"""Under a key that is used once, any nonce will do."""


@dataclass(frozen=True, slots=True)
class Header:
    """Everything of an envelope that is signed besides its content, and the topic, which does not travel inside."""

    topic: str
    key_id: str
    counter: int
    expiry: int
    fingerprint: bytes
    encryption: str

    def parts(self) -> tuple[bytes, ...]:
        """The fields as they are framed; integers take 8 bytes, big-endian."""
        return (
            self.topic.encode(),
            self.key_id.encode(),
            struct.pack(">Q", self.counter),
            struct.pack(">Q", self.expiry),
            self.fingerprint,
            self.encryption.encode(),
        )


@dataclass(frozen=True, slots=True)
class SealedEnvelope:
    """A parsed envelope; nothing in it is believed before `signed_by`."""

    header: Header
    body: bytes
    signature: bytes

    def signed_by(self, sign_key: bytes) -> bool:
        """Whether the holder of this public key (32 raw bytes) signed exactly this, for exactly this topic."""
        return verifies(sign_key, self.signature, ENVELOPE_DOMAIN, *self.header.parts(), self.body)


@dataclass(frozen=True, slots=True)
class Content:
    """What is inside: the message's body, and a key that is handed over with it (32 bytes, or empty)."""

    body: bytes
    grant: bytes

    def to_bytes(self) -> bytes:
        """Canonical msgpack bytes."""
        packed: bytes = msgpack.packb({"b": self.body, "g": self.grant}, use_bin_type=True)
        return packed


def pack(header: Header, body: bytes, sign_key: Ed25519PrivateKey) -> bytes:
    """Sign and return an envelope's bytes; `body` is encrypted already, as the header says."""
    fields = {
        "k": header.key_id,
        "n": header.counter,
        "x": header.expiry,
        "f": header.fingerprint,
        "e": header.encryption,
        "b": body,
        "s": sign(sign_key, ENVELOPE_DOMAIN, *header.parts(), body),
    }
    packed: bytes = msgpack.packb(fields, use_bin_type=True)
    return packed


def parse(data: bytes, topic: str) -> SealedEnvelope:
    """Split an envelope that came in on `topic`.

    RefusedError with rule 'unsigned' for an envelope of a federation without trust, 'bad-envelope' for anything else
    that has not exactly the seven fields with their types.
    """
    outer = _unpack(data)
    match outer:
        case {
            "k": str(sender),
            "n": int(counter),
            "x": int(expiry),
            "f": bytes(fingerprint),
            "e": str(encryption),
            "b": bytes(body),
            "s": bytes(signature),
        } if len(outer) == 7:
            lengths = (len(sender), len(fingerprint), len(signature)) == (16, KEY_BYTES, SIGNATURE_BYTES)
            numbers = not isinstance(counter, bool) and not isinstance(expiry, bool)
            if lengths and numbers and min(counter, expiry) >= 0 and max(counter, expiry) <= UINT64_MAX:
                return SealedEnvelope(Header(topic, sender, counter, expiry, fingerprint, encryption), body, signature)
        case {"b": _, "k": _, "s": _} if len(outer) == 3:
            raise RefusedError("an unsigned message; this federation is sealed", rule="unsigned")
        case _:
            pass
    raise RefusedError("not the envelope of a sealed message", rule="bad-envelope")


def parse_content(data: bytes) -> Content:
    """Split what was decrypted; RefusedError(rule='bad-message') when it is not body and grant."""
    inner = _unpack(data)
    match inner:
        case {"b": bytes(body), "g": bytes(grant)} if len(inner) == 2 and len(grant) in {0, KEY_BYTES}:
            return Content(body, grant)
    raise RefusedError("a sealed message without body and grant", rule="bad-message")


# -- for one receiver ---


def encrypt_for(box_key: bytes, header: Header, content: bytes) -> bytes:
    """Encrypt for the holder of an X25519 public key (32 raw bytes): ephemeral key, ciphertext, tag."""
    return _SUITE.encrypt(content, X25519PublicKey.from_public_bytes(box_key), framed(PAIR_DOMAIN, *header.parts()))


def decrypt_own(box_key: X25519PrivateKey, header: Header, data: bytes) -> bytes:
    """Inverse of `encrypt_for`; RefusedError(rule='undecipherable'), which does not say why."""
    try:
        return _SUITE.decrypt(data, box_key, framed(PAIR_DOMAIN, *header.parts()))
    except (InvalidTag, ValueError):  # ValueError: an ephemeral key that is no point, or gives the zero secret
        raise _undecipherable() from None


# -- for the federation ---


class FederationKey:
    """The key that all admitted sites hold; 32 random bytes, told apart by `id`."""

    def __init__(self, key: bytes) -> None:
        assert len(key) == KEY_BYTES
        self.key = key
        self.id = key_id(key)

    @classmethod
    def new(cls) -> FederationKey:
        """Draw one."""
        return cls(os.urandom(KEY_BYTES))

    @property
    def encryption(self) -> str:
        """What an envelope's `e` says of it."""
        return f"fed:{self.id}"

    def encrypt(self, header: Header, content: bytes) -> bytes:
        """Encrypt for whoever holds this key: 32 random bytes, ciphertext, tag."""
        salt = os.urandom(KEY_BYTES)
        sealed = ChaCha20Poly1305(self._once(salt)).encrypt(_NONCE, content, framed(FEDERATION_DOMAIN, *header.parts()))
        return salt + sealed

    def decrypt(self, header: Header, data: bytes) -> bytes:
        """Inverse of `encrypt`; RefusedError(rule='undecipherable'), which does not say why."""
        salt, sealed = data[:KEY_BYTES], data[KEY_BYTES:]
        try:
            cipher = ChaCha20Poly1305(self._once(salt))
            return cipher.decrypt(_NONCE, sealed, framed(FEDERATION_DOMAIN, *header.parts()))
        except InvalidTag:
            raise _undecipherable() from None

    def _once(self, salt: bytes) -> bytes:
        return derive(self.key, salt, FEDERATION_DOMAIN)


def derive(key: bytes, salt: bytes, domain: str) -> bytes:
    """HKDF-SHA256 (RFC 5869): 32 bytes from a uniform key, a salt and what they are for."""
    return HKDF(SHA256(), KEY_BYTES, salt=salt, info=domain.encode()).derive(key)


def _undecipherable() -> RefusedError:
    return RefusedError("a message that does not decrypt under our key", rule="undecipherable")


def _unpack(data: bytes) -> dict[str, Any]:
    if len(data) > MAX_CONTROL_BYTES:
        raise RefusedError(
            f"a control message of {len(data)} bytes, at most {MAX_CONTROL_BYTES} allowed", rule="bad-envelope"
        )
    try:
        value = msgpack.unpackb(data, raw=False, strict_map_key=True)
    except (ValueError, msgpack.UnpackException, RecursionError):
        raise RefusedError("a control message is not msgpack", rule="bad-envelope") from None
    if not isinstance(value, dict):
        raise RefusedError("a control message is not a map", rule="bad-envelope")
    return value
