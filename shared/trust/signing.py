"""What a signature, an HPKE info or an associated data is taken over: a domain and parts, each length-prefixed.

The domain says what kind of statement it is, so that a signature made for one purpose never serves another. The
lengths make the encoding injective: no two different lists of parts give the same bytes, so a byte cannot be moved from
one field to its neighbour without breaking the signature.
"""

from __future__ import annotations

import hashlib
import struct

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

AUTHORITY_DOMAIN = "mailboat authority v1"
SIGNATURE_BYTES = 64
KEY_BYTES = 32


def framed(domain: str, *parts: bytes) -> bytes:
    """Return domain and parts, each behind its length (4 bytes, big-endian)."""
    return b"".join(struct.pack(">I", len(part)) + part for part in (domain.encode(), *parts))


def sign(key: Ed25519PrivateKey, domain: str, *parts: bytes) -> bytes:
    """Return the 64-byte Ed25519 signature over `framed(domain, *parts)`; equal inputs give equal signatures."""
    return key.sign(framed(domain, *parts))


def verifies(public: bytes, signature: bytes, domain: str, *parts: bytes) -> bool:
    """Whether `signature` was made by the private half of `public` (32 raw bytes) over these parts."""
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, framed(domain, *parts))
    except (InvalidSignature, ValueError):  # ValueError: the 32 bytes are no point of the curve
        return False
    return True


def key_id(public: bytes) -> str:
    """First 16 hex digits of a key's SHA-256: names a key, proves nothing."""
    return hashlib.sha256(public).hexdigest()[:16]


def authority_fingerprint(public: bytes) -> str:
    """32 hex digits of an authority's public key (32 raw bytes), to be compared over the telephone."""
    return readable(framed(AUTHORITY_DOMAIN, public))


def readable(data: bytes) -> str:
    """The first 128 bits of the SHA-256 in eight groups of four digits, to be read aloud."""
    digits = hashlib.sha256(data).hexdigest()[:32]
    return " ".join(digits[start : start + 4] for start in range(0, 32, 4))
