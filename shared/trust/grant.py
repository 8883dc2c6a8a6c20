"""The grant: all that the authority hands to a site, and what a site asks of one before it takes it.

    grant     JSON: memberships of site and coordinator, certificate, CA, the authority's key; signed by the authority
    signed    framed("mailboat grant v1", name, federation, member, coordinator, certificate, ca, authorities), and
              from the authority's second key on, three parts more for each introduction: by, key, signature

It holds no secret and may travel by any road: as a file to a new site, through the coordinator to one that is renewed.
What comes over the channel is taken without a person, so `check_renewal` wants more of it than `accept` does of a file:
an authority that the kit knows or that was introduced to it, its own name and keys, a date that is later than what is
there. Pure, but `holder_of`, `is_here` and `install`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import NameOID
from pydantic import Field, model_validator

from shared.errors import RefusedError
from shared.ids import Ident
from shared.manifest import WireModel
from shared.trust import kit as kits
from shared.trust.document import Base64, Key, Signature, parse_json
from shared.trust.kit import PublicKeys
from shared.trust.membership import Membership, public_bytes, verify_membership
from shared.trust.signing import SIGNATURE_BYTES, sign, verifies
from shared.trust.succession import MAX_INTRODUCTIONS, Introduction, introduced

GRANT_DOMAIN = "mailboat grant v1"
GRANT_SUFFIX = ".grant"
CAS_MAX = 2
"""One CA, or two during a roll-over."""
CLOCKS_S = 300
"""How far this machine's clock may be behind the authority's."""


class Grant(WireModel):
    """What the authority hands to a site; believed after `parse_grant` and a telephone call, or `check_renewal`."""

    v: Literal[1, 2] = 1
    """2 with introductions, which an authority makes that has had more than one key."""
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
    """PEM, what the kit believes from now on: the key that has signed the grant."""
    introductions: Annotated[tuple[Introduction, ...], Field(max_length=MAX_INTRODUCTIONS)] = Field(
        default=(), exclude_if=lambda value: not value
    )
    """How the authority came to that key, from the earliest on."""
    authority: Key
    signature: Signature

    @model_validator(mode="after")
    def _of_its_version(self) -> Self:
        if (self.v == 2) != bool(self.introductions):
            msg = f"version {self.v} with {len(self.introductions)} introductions"
            raise ValueError(msg)
        return self


@dataclass(frozen=True, slots=True)
class Granted:
    """The memberships in a grant, verified."""

    member: Membership
    coordinator: Membership


@dataclass(frozen=True, slots=True)
class Holder:
    """A site as its kit shows it: whom a renewal must be for."""

    member: Membership
    """The one that it has."""
    keys: PublicKeys
    tls_key: bytes
    """P-256, 65 bytes, uncompressed point."""
    authorities: tuple[bytes, ...]
    """32 raw bytes each."""


def make_grant(authority: Ed25519PrivateKey, **fields: Any) -> Grant:
    """Sign and return a grant of these fields (all but `v`, `authority` and `signature`)."""
    version: Literal[1, 2] = 2 if fields.get("introductions") else 1
    unsigned = Grant(v=version, **fields, authority=public_bytes(authority), signature=bytes(SIGNATURE_BYTES))
    signature = sign(authority, GRANT_DOMAIN, *_granted(unsigned))
    return unsigned.model_copy(update={"signature": signature})


def parse_grant(data: bytes) -> Grant:
    """Return a grant that the authority which it names has signed; RefusedError otherwise.

    The rule is 'bad-document' or 'bad-signature'. Whether that authority is the right one is not known here.
    """
    grant = parse_json(Grant, data, "grant")
    if not verifies(grant.authority, grant.signature, GRANT_DOMAIN, *_granted(grant)):
        raise RefusedError(f"the grant for {grant.name} was altered after it was signed", rule="bad-signature")
    return grant


def check_grant(grant: Grant, keys: PublicKeys, tls_key: bytes) -> Granted:
    """Return the memberships of a grant that is for exactly these keys.

    RefusedError with a rule of `verify_membership`, or 'other-keys', 'mixed-up' (roles or names do not fit together),
    'bad-certificate' (none that those CAs have issued to that name under the membership's serial).
    """
    publics = [grant.authority]
    member = verify_membership(grant.member, publics, federation=grant.federation)
    coordinator = verify_membership(grant.coordinator, publics, federation=grant.federation)
    if (member.role, coordinator.role, member.name) != ("site", "coordinator", grant.name):
        raise RefusedError(f"the grant for {grant.name} mixes up roles or names", rule="mixed-up")
    if (member.sign_key, member.box_key) != (keys.sign, keys.box):
        raise RefusedError(f"the grant for {grant.name} names other keys than this kit's", rule="other-keys")
    with _certificates(grant.name):
        certificate = x509.load_pem_x509_certificate(grant.certificate.encode())
        cas = x509.load_pem_x509_certificates(grant.ca.encode())
        _check_certificate(certificate, cas, member)
        _check_key(certificate, tls_key, grant.name)
    return Granted(member, coordinator)


def check_renewal(data: bytes, holder: Holder, now: float) -> Grant:
    """Return a grant that may take the place of what `holder` has, or is that already; `now` is unix seconds.

    RefusedError with a rule of `parse_grant` or `check_grant`, or 'unknown-authority' (signed by a key that the kit
    neither knows nor was introduced to), 'other-authorities' (it would have the kit believe others than who signed it),
    'other-federation', 'other-site', 'not-valid-now', or 'not-newer'.
    """
    grant = parse_grant(data)
    if not is_known(grant, holder.authorities):
        raise RefusedError("a grant that another authority than this kit's has signed", rule="unknown-authority")
    if grant.authorities.encode() != kits.authority_pem([grant.authority]):
        raise RefusedError("a grant that names other keys than the one that signed it", rule="other-authorities")
    if grant.federation != holder.member.federation:
        raise RefusedError(f"a grant of federation {grant.federation}", rule="other-federation")
    if grant.name != holder.member.name:
        raise RefusedError(f"a grant for {grant.name}", rule="other-site")
    granted = check_grant(grant, holder.keys, holder.tls_key)
    for member in (granted.member, granted.coordinator):
        if not member.not_before - CLOCKS_S <= now <= member.not_after:
            raise RefusedError(
                f"the membership of {member.name} counts from {member.not_before} to {member.not_after} (unix "
                f"seconds), it is {now:.0f} now",
                rule="not-valid-now",
            )
    if granted.member != holder.member and granted.member.not_before <= holder.member.not_before:
        raise RefusedError("a grant that was not made after the one that is here", rule="not-newer")
    return grant


def is_known(grant: Grant, authorities: Sequence[bytes]) -> bool:
    """Whether one of these keys (32 raw bytes each), or one that they introduce, has signed a grant."""
    return grant.authority in introduced(authorities, grant.introductions, grant.federation)


def _check_certificate(certificate: x509.Certificate, cas: list[x509.Certificate], member: Membership) -> None:
    names = [each.value for each in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    if names != [member.name] or certificate.serial_number != member.serial:
        raise RefusedError(
            f"a certificate for another name or under another serial than the membership of {member.name}",
            rule="bad-certificate",
        )
    if not 1 <= len(cas) <= CAS_MAX or not any(_issued(certificate, ca) for ca in cas):
        raise RefusedError(
            f"the certificate of {member.name} is not issued by the CA that comes with it", rule="bad-certificate"
        )


def _check_key(certificate: x509.Certificate, tls_key: bytes, name: str) -> None:
    key = certificate.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or kits.point(key) != tls_key:
        raise RefusedError(f"the certificate for {name} is for another key than this kit's", rule="other-keys")


def _issued(certificate: x509.Certificate, ca: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):  # another issuer, a key of another kind
        return False
    return True


@contextlib.contextmanager
def _certificates(name: str) -> Iterator[None]:
    try:
        yield
    # No PEM, or what this library does not know; a strange version is no ValueError to it.
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion):
        raise RefusedError(f"the grant for {name} holds no certificates in PEM", rule="bad-certificate") from None


def _granted(grant: Grant) -> tuple[bytes, ...]:
    texts = (grant.certificate, grant.ca, grant.authorities)
    return (
        *(text.encode() for text in (grant.name, grant.federation)),
        *(grant.member, grant.coordinator),
        *(text.encode() for text in texts),
        *(part for each in grant.introductions for part in (each.by, each.key, each.signature)),
    )


# -- the kit's files ---


def holder_of(folder: Path, federation: str) -> Holder:
    """Read whom a renewal of this kit must be for; ConfigError when the kit is not whole, RefusedError as `member`."""
    authorities = kits.load_authorities(folder / kits.AUTHORITY)
    member = verify_membership(kits.read_private(folder / kits.MEMBER), authorities, federation=federation)
    return Holder(member, kits.public_keys(folder), kits.tls_point(folder), authorities)


def is_here(folder: Path, grant: Grant) -> bool:
    """Whether a kit holds this grant already, whole."""
    files = {folder / name: data for name, data in _files(grant).items()}
    return all(path.exists() and kits.read_private(path) == data for path, data in files.items())


def install(folder: Path, grant: Grant) -> None:
    """Put a grant that was checked into a kit, each file whole and 0600; interrupted, it is to be done again.

    In this order every moment leaves a kit that works: another key of the authority is believed beside those that are
    there before anything comes that it has signed, and alone when nothing is left of theirs. The authority's keys come
    last, too, because without them a new kit asks its person again.
    """
    path = folder / kits.AUTHORITY
    known = kits.load_authorities(path) if path.exists() else (grant.authority,)
    if grant.authority not in known:
        kits.write_private(path, kits.authority_pem([*known, grant.authority][-kits.AUTHORITIES_MAX :]))
    for name, data in _files(grant).items():
        kits.write_private(folder / name, data)


def _files(grant: Grant) -> dict[str, bytes]:
    """What a grant is in a kit, in the order in which it is written."""
    return {
        kits.CA_CERT: grant.ca.encode(),
        kits.TLS_CERT: grant.certificate.encode(),
        kits.COORDINATOR: grant.coordinator,
        kits.MEMBER: grant.member,
        kits.AUTHORITY: grant.authorities.encode(),
    }
