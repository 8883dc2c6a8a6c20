"""Who has seen which history: the coordinator's signature over the head of its hash chain, and the sites' over theirs.

    head      Ed25519 of the coordinator over framed("mailboat head v1", federation, fingerprint, version, seq, hash)
    witness   Ed25519 of a site over framed("mailboat witness v1", SHA-256 of the manifest without it, seq, hash)

A site signs each of its updates together with the last head that it has seen (seq 0 and 32 zero bytes: none yet), and
the signature travels in the manifest. So nobody else can make an update in its name, and who writes history anew from
before that head can keep none of the updates that came after it.
"""

from __future__ import annotations

import hashlib
import json
import struct

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from shared.errors import CorruptError
from shared.manifest import Manifest, Witness
from shared.messages import Head
from shared.trust.signing import sign, verifies

HEAD_DOMAIN = "mailboat head v1"
WITNESS_DOMAIN = "mailboat witness v1"
HEADS = "heads.jsonl"
"""A site's file of the heads that it was told, in its receipts folder."""
NOTHING_SEEN = Witness(seq=0, head="00" * 32, signature=bytes(64))
"""What is signed before a head has arrived."""


def signed_head(key: Ed25519PrivateKey, federation: str, fingerprint: str, at: tuple[int, int, str]) -> Head:
    """Return the coordinator's word that `at` (version, seq and hash of a row) is the head of its chain."""
    version, seq, head = at
    signature = sign(key, HEAD_DOMAIN, *_head_parts(federation, fingerprint, version, seq, head))
    return Head(version=version, seq=seq, head=head, signature=signature)


def head_fits(public: bytes, federation: str, fingerprint: str, head: Head) -> bool:
    """Whether the holder of this key (32 raw bytes) signed that head, of that federation's plan."""
    parts = _head_parts(federation, fingerprint, head.version, head.seq, head.head)
    return verifies(public, head.signature, HEAD_DOMAIN, *parts)


def witnessed(key: Ed25519PrivateKey, manifest: Manifest, head: Head | None) -> Manifest:
    """Return the manifest with its site's signature over itself and the last head that the site has seen."""
    seq, seen = (head.seq, head.head) if head else (NOTHING_SEEN.seq, NOTHING_SEEN.head)
    signature = sign(key, WITNESS_DOMAIN, *_witness_parts(bare_sha256(manifest), seq, seen))
    return manifest.model_copy(update={"witness": Witness(seq=seq, head=seen, signature=signature)})


def witness_fits(public: bytes, bare: str, witness: Witness) -> bool:
    """Whether the holder of this key (32 raw bytes) signed the manifest whose digest without witness is `bare`."""
    return verifies(public, witness.signature, WITNESS_DOMAIN, *_witness_parts(bare, witness.seq, witness.head))


def bare_sha256(manifest: Manifest) -> str:
    """SHA-256 (hex) of a manifest's canonical bytes without its witness."""
    return hashlib.sha256(manifest.model_copy(update={"witness": None}).to_bytes()).hexdigest()


def head_line(head: Head) -> bytes:
    """A head as a site keeps it: one line of JSON."""
    fields = {"version": head.version, "seq": head.seq, "head": head.head, "signature": head.signature.hex()}
    return json.dumps(fields).encode() + b"\n"


def parse_head(line: bytes, where: str) -> Head:
    """Inverse of `head_line`; CorruptError names `where`."""
    try:
        fields = dict(json.loads(line))
        return Head.model_validate({**fields, "signature": bytes.fromhex(fields["signature"])})
    except (ValueError, TypeError, KeyError, RecursionError):
        raise CorruptError(f"{where} is not what was written", hint="keep a copy, then move it away") from None


def _head_parts(federation: str, fingerprint: str, version: int, seq: int, head: str) -> tuple[bytes, ...]:
    numbers = struct.pack(">Q", version), struct.pack(">Q", seq)
    return (federation.encode(), bytes.fromhex(fingerprint), *numbers, bytes.fromhex(head))


def _witness_parts(bare: str, seq: int, head: str) -> tuple[bytes, ...]:
    return (bytes.fromhex(bare), struct.pack(">Q", seq), bytes.fromhex(head))
