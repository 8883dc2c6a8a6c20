"""One key of the authority after another: each introduces the next, so that nobody has to be called by telephone.

    introduction   Ed25519 of the key before over framed("mailboat introduction v1", federation, next key)

A grant brings the introductions of its authority along. A site whose kit knows one of the keys believes those that
follow it, and none that went before: once its kit holds a key, what earlier ones sign counts for nothing there.

An introduction is worth as much as the key that made it. Whoever has stolen a key can introduce another to a kit that
knows the stolen one, and to no other; so a roll-over after a theft is finished when the sites have taken their grants.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from shared.manifest import WireModel
from shared.trust.document import Key, Signature
from shared.trust.membership import public_bytes
from shared.trust.signing import sign, verifies

INTRODUCTION_DOMAIN = "mailboat introduction v1"
MAX_INTRODUCTIONS = 32
"""The newest ones: a kit that slept through more roll-overs than that is made anew."""


class Introduction(WireModel):
    """The word of one key of an authority for the next; true only with its signature, which `introduced` checks."""

    by: Key
    key: Key
    signature: Signature


def introduce(by: Ed25519PrivateKey, key: bytes, federation: str) -> Introduction:
    """Sign that `key` (32 raw bytes) is a key of this federation's authority."""
    signature = sign(by, INTRODUCTION_DOMAIN, federation.encode(), key)
    return Introduction(by=public_bytes(by), key=key, signature=signature)


def introduced(known: Sequence[bytes], introductions: Iterable[Introduction], federation: str) -> tuple[bytes, ...]:
    """Return the known keys and those that they introduce, one through the other in the order given."""
    found = list(known)
    for each in introductions:
        fits = each.by in found and each.key not in found
        if fits and verifies(each.by, each.signature, INTRODUCTION_DOMAIN, federation.encode(), each.key):
            found.append(each.key)
    return tuple(found)
