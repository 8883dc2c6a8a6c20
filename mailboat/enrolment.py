"""The two documents of an enrolment: what a site asks for, and what the authority grants.

Both are JSON, hold no secret, and may travel by any road; each is signed, and each has a fingerprint that two people
read to each other over the telephone, because a signature alone does not say whose it is.

    request   name, public keys, TLS signing request; signed by the site's own key
    grant     memberships, certificate, CA, the authority's keys; signed by the authority
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import BeforeValidator, Field, PlainSerializer, ValidationError

from broker.provision import key_bytes, request_key
from shared.config import SiteName
from shared.errors import RefusedError
from shared.ids import Ident
from shared.manifest import WireModel, describe_invalid
from shared.trust.membership import Membership, public_bytes, verify_membership
from shared.trust.signing import KEY_BYTES, SIGNATURE_BYTES, framed, sign, verifies

REQUEST_DOMAIN = "mailboat request v1"
GRANT_DOMAIN = "mailboat grant v1"
AUTHORITY_DOMAIN = "mailboat authority v1"
MAX_DOCUMENT_BYTES = 100_000

_NOT_HEX = re.compile(r"[^0-9a-f]")


def _decode(value: object) -> object:
    return base64.b64decode(value, validate=True) if isinstance(value, str) else value


Base64 = Annotated[
    bytes,
    BeforeValidator(_decode),
    PlainSerializer(lambda data: base64.b64encode(data).decode(), return_type=str, when_used="json"),
]
Key = Annotated[Base64, Field(min_length=KEY_BYTES, max_length=KEY_BYTES)]
Signature = Annotated[Base64, Field(min_length=SIGNATURE_BYTES, max_length=SIGNATURE_BYTES)]


class Request(WireModel):
    """What a site asks for; made by `make_request`, believed after `parse_request` and a telephone call."""

    v: Literal[1] = 1
    name: SiteName
    sign_key: Key
    """Ed25519."""
    box_key: Key
    """X25519."""
    csr: str
    """PEM, for the TLS key."""
    signature: Signature

    @property
    def tls_key(self) -> ec.EllipticCurvePublicKey:
        """The key of the signing request; RefusedError as `request_key`."""
        return request_key(self.csr.encode(), name=self.name)

    @property
    def fingerprint(self) -> str:
        """32 hex digits over name and all three keys."""
        parts = (self.name.encode(), self.sign_key, self.box_key, key_bytes(self.tls_key))
        return readable(framed(REQUEST_DOMAIN, *parts))


class Grant(WireModel):
    """What the authority hands to a site; believed after `parse_grant` and a telephone call."""

    v: Literal[1] = 1
    name: Ident
    federation: Ident
    member: Base64
    """The site's membership, signed."""
    coordinator: Base64
    """The coordinator's membership, signed."""
    certificate: str
    """PEM."""
    ca: str
    """PEM, one certificate or two."""
    authorities: str
    """PEM, the public keys of the authority, one or two; the first has signed the grant."""
    authority: Key
    signature: Signature


def make_request(name: str, sign_key: Ed25519PrivateKey, box_key: bytes, csr: bytes) -> Request:
    """Sign and return a site's request; `box_key` is the public half, `csr` PEM."""
    publics = public_bytes(sign_key), box_key
    signature = sign(sign_key, REQUEST_DOMAIN, name.encode(), *publics, csr)
    return Request(name=name, sign_key=publics[0], box_key=publics[1], csr=csr.decode(), signature=signature)


def parse_request(data: bytes) -> Request:
    """Return a request whose sender holds the signing key and the TLS key that it names; RefusedError otherwise."""
    request = _parsed(Request, data, "request")
    parts = (request.name.encode(), request.sign_key, request.box_key, request.csr.encode())
    if not verifies(request.sign_key, request.signature, REQUEST_DOMAIN, *parts):
        raise RefusedError(f"the request of {request.name} was altered after it was signed", rule="bad-signature")
    assert request.tls_key is not None
    return request


def make_grant(authority: Ed25519PrivateKey, **fields: Any) -> Grant:
    """Sign and return a grant of these fields (all but `authority` and `signature`)."""
    unsigned = Grant(**fields, authority=public_bytes(authority), signature=bytes(SIGNATURE_BYTES))
    signature = sign(authority, GRANT_DOMAIN, *_granted(unsigned))
    return unsigned.model_copy(update={"signature": signature})


def parse_grant(data: bytes) -> Grant:
    """Return a grant that the authority which it names has signed; RefusedError otherwise.

    Whether that authority is the right one is not known here.
    """
    grant = _parsed(Grant, data, "grant")
    if not verifies(grant.authority, grant.signature, GRANT_DOMAIN, *_granted(grant)):
        raise RefusedError(f"the grant for {grant.name} was altered after it was signed", rule="bad-signature")
    return grant


@dataclass(frozen=True, slots=True)
class Granted:
    """The memberships in a grant, verified."""

    member: Membership
    coordinator: Membership


def trusted_by(grant: Grant) -> Granted:
    """Return the grant's memberships; RefusedError unless the authority that signed the grant signed them too."""
    publics = [grant.authority]
    return Granted(
        verify_membership(grant.member, publics, federation=grant.federation),
        verify_membership(grant.coordinator, publics, federation=grant.federation),
    )


def to_json(document: Request | Grant) -> bytes:
    """The document as it travels."""
    return document.model_dump_json(indent=2).encode() + b"\n"


def authority_fingerprint(public: bytes) -> str:
    """32 hex digits of an authority's public key (32 raw bytes)."""
    return readable(framed(AUTHORITY_DOMAIN, public))


def readable(data: bytes) -> str:
    """The first 128 bits of the SHA-256 in eight groups of four digits, to be read aloud."""
    digits = hashlib.sha256(data).hexdigest()[:32]
    return " ".join(digits[start : start + 4] for start in range(0, 32, 4))


def same_fingerprint(given: str, right: str) -> bool:
    """Whether two fingerprints are equal, however they are spaced or capitalised."""
    return _NOT_HEX.sub("", given.lower()) == _NOT_HEX.sub("", right)


_D = TypeVar("_D", Request, Grant)


def _parsed(kind: type[_D], data: bytes, what: str) -> _D:
    try:
        fields = json.loads(data) if len(data) <= MAX_DOCUMENT_BYTES else None
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise RefusedError(f"not a {what}", rule="bad-document")
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise RefusedError(describe_invalid(what, error), rule="bad-document") from None


def _granted(grant: Grant) -> tuple[bytes, ...]:
    texts = (grant.certificate, grant.ca, grant.authorities)
    return (
        *(text.encode() for text in (grant.name, grant.federation)),
        *(grant.member, grant.coordinator),
        *(text.encode() for text in texts),
    )
