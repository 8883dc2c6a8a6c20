"""Memberships, revocations and endorsements: small documents that the federation's authority signs.

A membership says: these two public keys belong to this name, in this role, in this federation, from then to then. A
revocation list says which serials no longer count; its number only rises, so an older list cannot replace a newer one.
Endorsements say which memberships the authority has signed with keys that it has given up; for auditors.

    document     msgpack map {"a": authority's key id, "d": msgpack of the fields, "s": Ed25519 signature}
    signed       framed("mailboat membership v1", d), framed("mailboat revocations v1", d) or
                 framed("mailboat endorsements v1", d)

Everything here is pure: bytes in, values out. Files are kit.py's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal, Self, TypeVar

import msgpack
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import Field, ValidationError, model_validator

from shared.errors import RefusedError
from shared.ids import Ident
from shared.manifest import WireModel, describe_invalid
from shared.topics import Role
from shared.trust.signing import KEY_BYTES, key_id, sign, verifies

MEMBERSHIP_DOMAIN = "mailboat membership v1"
REVOCATIONS_DOMAIN = "mailboat revocations v1"
ENDORSEMENTS_DOMAIN = "mailboat endorsements v1"
MAX_DOCUMENT_BYTES = 1_000_000
MAX_REVOKED = 50_000
MAX_ENDORSED = 25_000
"""A hundred sites, renewed each month for twenty years; 34 bytes each."""

PublicKey = Annotated[bytes, Field(min_length=KEY_BYTES, max_length=KEY_BYTES)]
Sha256 = Annotated[bytes, Field(min_length=32, max_length=32)]
Serial = Annotated[int, Field(ge=1, lt=2**63)]
UnixSeconds = Annotated[int, Field(ge=0, lt=2**63)]


class Membership(WireModel):
    """Who holds which keys; true only with the authority's signature, which `verify_membership` checks."""

    v: Literal[1] = 1
    role: Role
    name: Ident
    """The site's name; for the coordinator, whatever it is called."""
    federation: Ident
    sign_key: PublicKey
    """Ed25519."""
    box_key: PublicKey
    """X25519."""
    serial: Serial
    not_before: UnixSeconds
    not_after: UnixSeconds

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.not_after <= self.not_before:
            msg = "not_after is not after not_before"
            raise ValueError(msg)
        return self

    @property
    def key_id(self) -> str:
        """Id of the signing key: 16 hex digits."""
        return key_id(self.sign_key)

    def valid_at(self, now: float) -> bool:
        """Whether `now` (unix seconds) lies between the two dates, which are inclusive."""
        return self.not_before <= now <= self.not_after

    def ends_soon(self, now: float) -> bool:
        """Whether less than a third of its life is left: it is time to renew it."""
        return ends_soon(self.not_before, self.not_after, now)


def ends_soon(begin: float, end: float, now: float) -> bool:
    """Whether of the time between two dates (unix seconds) less than a third is left."""
    return 3 * (end - now) < end - begin


class Revocations(WireModel):
    """Serials that no longer count, of memberships and of the certificates that go with them.

    A higher number makes a running coordinator also draw a new federation key: to rotate on command, sign the same
    serials under the next number.
    """

    v: Literal[1] = 1
    federation: Ident
    number: int = Field(ge=0, lt=2**63)
    serials: Annotated[tuple[Serial, ...], Field(max_length=MAX_REVOKED)] = ()

    @cached_property
    def revoked(self) -> frozenset[int]:
        """The serials, to be asked for one of them with each message."""
        return frozenset(self.serials)


class Endorsements(WireModel):
    """Memberships that were signed with earlier keys of this authority: all that there are, revoked ones too.

    Each is named by the SHA-256 of its document. So whoever holds an earlier key, which may have been stolen, can add
    none, whatever date it bears.
    """

    v: Literal[1] = 1
    federation: Ident
    sha256: Annotated[tuple[Sha256, ...], Field(max_length=MAX_ENDORSED)]


@dataclass(frozen=True, slots=True)
class Believed:
    """Whom a verifier believes about memberships."""

    authorities: tuple[bytes, ...]
    """The authority's keys, 32 raw bytes each."""
    endorsed: frozenset[bytes] = frozenset()
    """SHA-256 of documents that one of them has endorsed."""

    def membership(self, data: bytes, *, federation: str) -> Membership:
        """Return what a document says that was signed or endorsed; RefusedError as `verify_membership`."""
        if hashlib.sha256(data).digest() in self.endorsed:
            return _federations_own(stated_membership(data), federation)
        return verify_membership(data, self.authorities, federation=federation)


_W = TypeVar("_W", bound=WireModel)


def sign_membership(authority: Ed25519PrivateKey, membership: Membership) -> bytes:
    """Return the signed document; equal memberships give equal bytes."""
    return _signed(authority, MEMBERSHIP_DOMAIN, membership)


def sign_revocations(authority: Ed25519PrivateKey, revocations: Revocations) -> bytes:
    """Return the signed document; the serials are sorted, so equal lists give equal bytes."""
    ordered = revocations.model_copy(update={"serials": tuple(sorted(set(revocations.serials)))})
    return _signed(authority, REVOCATIONS_DOMAIN, ordered)


def sign_endorsements(authority: Ed25519PrivateKey, federation: str, documents: Iterable[bytes]) -> bytes:
    """Return the signed list of these memberships, which are documents as they were signed; sorted, each once."""
    digests = sorted({hashlib.sha256(document).digest() for document in documents})
    return _signed(authority, ENDORSEMENTS_DOMAIN, Endorsements(federation=federation, sha256=tuple(digests)))


def verify_membership(data: bytes, authorities: Iterable[bytes], *, federation: str) -> Membership:
    """Return what a document says when one of the authority's keys (32 raw bytes each) has signed it.

    RefusedError with rule 'bad-document' (not such a document), 'unknown-authority' (signed by another key),
    'bad-signature' (altered) or 'other-federation'. Dates are not looked at: see `Membership.valid_at`.
    """
    return _federations_own(_verified(data, authorities, MEMBERSHIP_DOMAIN, Membership), federation)


def stated_membership(data: bytes) -> Membership:
    """Return what a document says, whoever signed it; RefusedError(rule='bad-document') when it is none."""
    return _read(_split(data)[1], Membership)


def verify_revocations(data: bytes, authorities: Iterable[bytes], *, federation: str) -> Revocations:
    """Return the list when one of the authority's keys has signed it; RefusedError as `verify_membership`."""
    return _federations_own(_verified(data, authorities, REVOCATIONS_DOMAIN, Revocations), federation)


def verify_endorsements(data: bytes, authorities: Iterable[bytes], *, federation: str) -> Endorsements:
    """Return the list when one of the authority's keys has signed it; RefusedError as `verify_membership`."""
    return _federations_own(_verified(data, authorities, ENDORSEMENTS_DOMAIN, Endorsements), federation)


def public_bytes(key: Ed25519PrivateKey) -> bytes:
    """The 32 raw bytes of the public half."""
    return key.public_key().public_bytes_raw()


def _signed(authority: Ed25519PrivateKey, domain: str, document: WireModel) -> bytes:
    fields = {name: list(value) if isinstance(value, tuple) else value for name, value in document}
    body: bytes = msgpack.packb(fields, use_bin_type=True)
    signature = sign(authority, domain, body)
    packed: bytes = msgpack.packb({"a": key_id(public_bytes(authority)), "d": body, "s": signature}, use_bin_type=True)
    return packed


def _verified(data: bytes, authorities: Iterable[bytes], domain: str, model: type[_W]) -> _W:
    signer, body, signature = _split(data)
    known = {key_id(public): public for public in authorities}
    if signer not in known:
        raise RefusedError(f"a document signed by {signer[:16]!a}, no authority of ours", rule="unknown-authority")
    if not verifies(known[signer], signature, domain, body):
        raise RefusedError("a document whose signature does not fit its content", rule="bad-signature")
    return _read(body, model)


def _split(data: bytes) -> tuple[str, bytes, bytes]:
    outer = _map(data)
    match outer:
        case {"a": str(signer), "d": bytes(body), "s": bytes(signature)} if len(outer) == 3:
            return signer, body, signature
    raise RefusedError("a document without signer, body and signature", rule="bad-document")


def _read(body: bytes, model: type[_W]) -> _W:
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in _map(body).items()}
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise RefusedError(describe_invalid("document", error), rule="bad-document") from None


def _federations_own(document: _W, federation: str) -> _W:
    named = getattr(document, "federation", None)
    if named != federation:
        raise RefusedError(f"a document of federation {named}, this one is {federation}", rule="other-federation")
    return document


def _map(data: bytes) -> dict[str, Any]:
    if len(data) > MAX_DOCUMENT_BYTES:
        raise RefusedError(f"a document of {len(data)} bytes", rule="bad-document")
    try:
        value = msgpack.unpackb(data, raw=False, strict_map_key=True)
    except (ValueError, msgpack.UnpackException, RecursionError):
        raise RefusedError("a document that is not msgpack", rule="bad-document") from None
    if not isinstance(value, dict):
        raise RefusedError("a document that is not a map", rule="bad-document")
    return value
