"""What a site asks for when it enrols, and the fingerprints that two people read to each other.

A request is JSON, holds no secret, and may travel by any road, as the grant does that answers it (shared.trust.grant).
Each is signed, and each has a fingerprint that is compared over the telephone, because a signature alone does not say
whose it is.

    request   name, public keys, TLS signing request; signed by the site's own key
"""

from __future__ import annotations

import re
from typing import Literal

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from broker.provision import key_bytes, request_key
from shared.config import SiteName
from shared.errors import RefusedError
from shared.manifest import WireModel
from shared.trust.document import Key, Signature, parse_json
from shared.trust.membership import public_bytes
from shared.trust.signing import framed, readable, sign, verifies

REQUEST_DOMAIN = "mailboat request v1"

_NOT_HEX = re.compile(r"[^0-9a-f]")


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


def make_request(name: str, sign_key: Ed25519PrivateKey, box_key: bytes, csr: bytes) -> Request:
    """Sign and return a site's request; `box_key` is the public half, `csr` PEM."""
    publics = public_bytes(sign_key), box_key
    signature = sign(sign_key, REQUEST_DOMAIN, name.encode(), *publics, csr)
    return Request(name=name, sign_key=publics[0], box_key=publics[1], csr=csr.decode(), signature=signature)


def parse_request(data: bytes) -> Request:
    """Return a request whose sender holds the signing key and the TLS key that it names; RefusedError otherwise."""
    request = parse_json(Request, data, "request")
    parts = (request.name.encode(), request.sign_key, request.box_key, request.csr.encode())
    if not verifies(request.sign_key, request.signature, REQUEST_DOMAIN, *parts):
        raise RefusedError(f"the request of {request.name} was altered after it was signed", rule="bad-signature")
    assert request.tls_key is not None
    return request


def same_fingerprint(given: str, right: str) -> bool:
    """Whether two fingerprints are equal, however they are spaced or capitalised."""
    return _NOT_HEX.sub("", given.lower()) == _NOT_HEX.sub("", right)
