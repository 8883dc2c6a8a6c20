"""The broker's certificates: an authority (CA) of the federation's own, what it issues, and what it takes back.

All keys are P-256, all signatures ECDSA with SHA-256. A client's common name becomes its user name at the broker. Dates
are unix seconds. Everything here is pure: keys and bytes in, certificates out; which files they go to is the caller's.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
import re
from collections.abc import Iterable, Mapping, Sequence

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from shared.errors import ConfigError, RefusedError

BACKDATED_S = 300
"""Certificates and lists count from this long before they are made: the clocks of a broker and its clients differ."""

_HOST_NAME = re.compile(r"(?=.{1,253}$)[A-Za-z0-9]([A-Za-z0-9-]{0,62})(\.[A-Za-z0-9]([A-Za-z0-9-]{0,62}))*")


def make_ca(key: ec.EllipticCurvePrivateKey, *, name: str, serial: int, now: int, days: int) -> x509.Certificate:
    """Return the authority's self-signed certificate; it can sign certificates of ends, not of other authorities."""
    usage = _usage(sign=False, authority=True)
    subject = _name(name)
    builder = _dated(subject, subject, key.public_key(), serial, now, days)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    return builder.add_extension(usage, critical=True).sign(key, SHA256())


def make_request(key: ec.EllipticCurvePrivateKey, *, name: str) -> bytes:
    """Return a signing request (PEM) for a client of this name; it proves that its sender holds the key."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(_name(name))
    return builder.sign(key, SHA256()).public_bytes(Encoding.PEM)


def request_key(pem: bytes, *, name: str) -> ec.EllipticCurvePublicKey:
    """Return the key of a signing request; RefusedError(rule='bad-request') unless it is P-256, signed, and of `name`.

    Nothing else of the request is looked at: what a certificate says is the authority's choice, not the applicant's.
    """
    try:
        request = x509.load_pem_x509_csr(pem)
        key = request.public_key()
        sound = request.is_signature_valid
    except (ValueError, UnsupportedAlgorithm, x509.InvalidVersion):
        raise RefusedError(f"the signing request of {name} is not one", rule="bad-request") from None
    if not sound or not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise RefusedError(f"the signing request of {name} is not signed by a P-256 key of its own", rule="bad-request")
    if request.subject != _name(name):
        raise RefusedError(f"the signing request of {name} is for another name", rule="bad-request")
    return key


def issue_client(
    authority: tuple[ec.EllipticCurvePrivateKey, x509.Certificate],
    key: ec.EllipticCurvePublicKey,
    *,
    name: str,
    serial: int,
    now: int,
    days: int,
) -> x509.Certificate:
    """Return a certificate by which a client shows that it is `name`; a server cannot use it."""
    return _issue(authority, key, (name, serial, now, days), ExtendedKeyUsageOID.CLIENT_AUTH, ())


def issue_server(
    authority: tuple[ec.EllipticCurvePrivateKey, x509.Certificate],
    key: ec.EllipticCurvePublicKey,
    *,
    hosts: Sequence[str],
    serial: int,
    now: int,
    days: int,
) -> x509.Certificate:
    """Return the broker's certificate for these host names or addresses; ConfigError for what is neither."""
    return _issue(authority, key, ("broker", serial, now, days), ExtendedKeyUsageOID.SERVER_AUTH, check_hosts(hosts))


def check_hosts(hosts: Sequence[str]) -> list[x509.GeneralName]:
    """Return these host names or addresses as a certificate says them; ConfigError for what is neither."""
    names = [_host(host) for host in hosts]
    if not names:
        raise ConfigError("the broker has no host name", hint="name one, as clients will dial it")
    return names


def make_crl(
    authority: tuple[ec.EllipticCurvePrivateKey, x509.Certificate],
    revoked: Mapping[int, int],
    *,
    number: int,
    at: int,
    days: int,
) -> bytes:
    """Return the revocation list (PEM): serial to the time it was revoked.

    `at` is the list's date and must rise from list to list: a broker that reads a new list beside an old one believes
    the younger. After `days` a list has expired, and with it everybody's access: make it last as long as the authority.
    """
    key, certificate = authority
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(certificate.subject)
        .last_update(_utc(at))
        .next_update(_utc(at + days * 86_400))
        .add_extension(x509.CRLNumber(number), critical=False)
        .add_extension(_authority_id(certificate), critical=False)
    )
    for serial in sorted(revoked):
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(_utc(revoked[serial]))
        builder = builder.add_revoked_certificate(entry.build())
    return builder.sign(key, SHA256()).public_bytes(Encoding.PEM)


def crl_numbers(pem: bytes) -> list[tuple[x509.Name, int]]:
    """Issuer and number of each list in a file of `make_crl`'s; empty when it is none."""
    end = b"-----END X509 CRL-----"
    blocks = [block + end for block in pem.split(end) if block.strip()]
    try:
        lists = [x509.load_pem_x509_crl(block) for block in blocks]
        return [
            (each.issuer, each.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number) for each in lists
        ]
    except (ValueError, x509.InvalidVersion, x509.ExtensionNotFound):
        return []


def certificate_pem(certificate: x509.Certificate) -> bytes:
    """The certificate as PEM."""
    return certificate.public_bytes(Encoding.PEM)


def load_certificate(pem: bytes, *, where: str) -> x509.Certificate:
    """Read one PEM certificate; ConfigError names `where`."""
    try:
        return x509.load_pem_x509_certificate(pem)
    except (ValueError, x509.InvalidVersion):
        raise ConfigError(f"{where} is not a certificate in PEM", hint="restore it from the backup") from None


def load_p256(pem: bytes, *, where: str) -> ec.EllipticCurvePrivateKey:
    """Read a P-256 private key; ConfigError names `where`."""
    try:
        key = load_pem_private_key(pem, password=None)
    except (ValueError, TypeError):
        raise ConfigError(f"{where} is not a private key in PEM", hint="restore it from the backup") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ConfigError(f"{where} holds no P-256 key", hint="restore it from the backup")
    return key


def same_key(one: object, other: ec.EllipticCurvePublicKey) -> bool:
    """Whether a certificate's key is this one."""
    return isinstance(one, ec.EllipticCurvePublicKey) and key_bytes(one) == key_bytes(other)


def key_bytes(key: ec.EllipticCurvePublicKey) -> bytes:
    """The public key as 65 raw bytes (uncompressed point)."""
    return key.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)


def key_from_bytes(data: bytes) -> ec.EllipticCurvePublicKey:
    """Inverse of `key_bytes`; ValueError for what is no point of P-256."""
    return ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), data)


def _issue(
    authority: tuple[ec.EllipticCurvePrivateKey, x509.Certificate],
    key: ec.EllipticCurvePublicKey,
    dated: tuple[str, int, int, int],
    purpose: x509.ObjectIdentifier,
    hosts: Iterable[x509.GeneralName],
) -> x509.Certificate:
    ca_key, ca = authority
    name, serial, now, days = dated
    builder = (
        _dated(_name(name), ca.subject, key, serial, now, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(sign=True, authority=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .add_extension(_authority_id(ca), critical=False)
    )
    if names := list(hosts):
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(ca_key, SHA256())


def _dated(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, serial: int, now: int, days: int
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(serial)
        .not_valid_before(_utc(now - BACKDATED_S))
        .not_valid_after(_utc(now + days * 86_400))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(*, sign: bool, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=authority,
        crl_sign=authority,
        encipher_only=False,
        decipher_only=False,
    )


def _authority_id(ca: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    subject = ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(subject)


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    if _HOST_NAME.fullmatch(host) is None:
        raise ConfigError(f"{host!r} is no host name", hint="name the broker as clients will dial it, without a port")
    return x509.DNSName(host)


def _utc(at: int) -> dt.datetime:
    return dt.datetime.fromtimestamp(at, tz=dt.UTC)
