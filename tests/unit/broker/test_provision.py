"""The broker's certificates, verified by the library's own verifier, and the production configuration."""

from __future__ import annotations

import datetime as dt
from pathlib import PurePosixPath

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from broker import provision
from broker.production import production_config, production_settings
from shared.errors import ConfigError, RefusedError
from tests.grants import of_strange_version

NOW = 1_800_000_000
CaPair = tuple[ec.EllipticCurvePrivateKey, x509.Certificate]


def new_key() -> ec.EllipticCurvePrivateKey:
    """A P-256 key."""
    return ec.generate_private_key(ec.SECP256R1())


@pytest.fixture
def ca() -> CaPair:
    """An authority of a hundred days."""
    key = new_key()
    return key, provision.make_ca(key, name="ward", serial=1, now=NOW, days=100)


def policy(ca: CaPair, at: int) -> PolicyBuilder:
    """A verifier that believes this authority alone."""
    return PolicyBuilder().store(Store([ca[1]])).time(dt.datetime.fromtimestamp(at, tz=dt.UTC))


def test_a_server_certificate_is_for_its_hosts_and_dates(ca: CaPair) -> None:
    """It verifies for a name and an address that it was made for, for no other, and not after its last day."""
    hosts = ["broker.example", "192.0.2.7"]
    made = provision.issue_server(ca, new_key().public_key(), hosts=hosts, serial=2, now=NOW, days=10)
    policy(ca, NOW).build_server_verifier(x509.DNSName("broker.example")).verify(made, [])
    with pytest.raises(VerificationError):
        policy(ca, NOW).build_server_verifier(x509.DNSName("other.example")).verify(made, [])
    with pytest.raises(VerificationError):
        policy(ca, NOW + 11 * 86_400).build_server_verifier(x509.DNSName("broker.example")).verify(made, [])
    names = made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["192.0.2.7"]


def test_a_client_certificate_is_no_server(ca: CaPair) -> None:
    """A site cannot pass for the broker, and its certificate says its name and the serial that was asked for."""
    key = new_key().public_key()
    made = provision.issue_client(ca, key, name="site-1", serial=77, now=NOW, days=10)
    assert made.subject.rfc4514_string() == "CN=site-1"
    assert made.serial_number == 77
    assert provision.same_key(made.public_key(), key)
    assert not provision.same_key(made.public_key(), new_key().public_key())
    made.verify_directly_issued_by(ca[1])
    with pytest.raises(VerificationError):
        policy(ca, NOW).build_server_verifier(x509.DNSName("site-1")).verify(made, [])


@pytest.mark.parametrize("host", ["", "a b", "mqtts://broker", "broker:8883", "-x", "*.example"])
def test_what_is_no_host_is_refused(ca: CaPair, host: str) -> None:
    """A URL, a port or a wildcard in the place of a host name is a configuration error."""
    with pytest.raises(ConfigError):
        provision.issue_server(ca, new_key().public_key(), hosts=[host], serial=2, now=NOW, days=1)


def test_a_request_proves_key_and_name() -> None:
    """The key comes back; another name, an altered signature, another curve, and other bytes are refused."""
    key = new_key()
    pem = provision.make_request(key, name="site-1")
    assert provision.same_key(provision.request_key(pem, name="site-1"), key.public_key())
    other_curve = provision.make_request(ec.generate_private_key(ec.SECP384R1()), name="site-1")
    der = bytearray(x509.load_pem_x509_csr(pem).public_bytes(Encoding.DER))
    der[-1] ^= 1
    altered = x509.load_der_x509_csr(bytes(der)).public_bytes(Encoding.PEM)
    for data, name in ((pem, "site-2"), (other_curve, "site-1"), (altered, "site-1"), (b"nothing", "site-1")):
        with pytest.raises(RefusedError) as refused:
            provision.request_key(data, name=name)
        assert refused.value.rule == "bad-request"


def test_a_list_names_what_was_revoked(ca: CaPair) -> None:
    """Serials, number and dates are those given, and the authority's key has signed it."""
    crl = x509.load_pem_x509_crl(provision.make_crl(ca, {5: NOW, 9: NOW + 1}, number=3, at=NOW, days=50))
    public = ca[1].public_key()
    assert isinstance(public, ec.EllipticCurvePublicKey)
    assert crl.is_signature_valid(public)
    assert {entry.serial_number for entry in crl} == {5, 9}
    assert crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number == 3
    assert crl.last_update_utc.timestamp() == NOW
    assert crl.next_update_utc is not None
    assert crl.next_update_utc.timestamp() == NOW + 50 * 86_400


def test_keys_and_certificates_that_are_none_are_named(ca: CaPair) -> None:
    """A wrong file is a configuration error that names it."""
    other = ec.generate_private_key(ec.SECP384R1()).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    for data in (b"x", other):
        with pytest.raises(ConfigError, match="here"):
            provision.load_p256(data, where="here")
    with pytest.raises(ConfigError, match="here"):
        provision.load_certificate(b"x", where="here")
    strange = of_strange_version(provision.certificate_pem(ca[1]).decode())
    with pytest.raises(ConfigError, match="here"):
        provision.load_certificate(strange.encode(), where="here")


def test_the_production_configuration_admits_certificates_alone() -> None:
    """One TLS listener, certificates asked for, names from them, the list in force, nothing unlimited."""
    settings = {setting.key: setting.value for setting in production_settings(PurePosixPath("/srv/b"), 8883)}
    assert settings["listener"] == "8883"
    for key in ("require_certificate", "use_identity_as_username", "use_username_as_clientid"):
        assert settings[key] == "true"
    assert settings["allow_anonymous"] == "false"
    assert settings["crlfile"] == "/srv/b/crl.pem"
    assert "0" not in {settings[key] for key in settings if key.startswith("max_") or key == "memory_limit"}
    assert production_config(PurePosixPath("/srv/b")).count("\nlistener ") == 1
