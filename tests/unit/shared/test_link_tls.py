"""Certificates of a link are read again when they were renewed, and kept when what is there cannot be used."""

from __future__ import annotations

import ssl
import time
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from structlog.testing import capture_logs

from broker import provision
from shared import durable
from shared.config import BrokerSection
from shared.errors import ConfigError
from shared.link.tls import Certificates
from shared.trust.kit import private_pem


class Files:
    """A CA, a key and its certificate in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ca_key, self.key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
        self.section = BrokerSection(
            ca_file=folder / "ca.crt", cert_file=folder / "tls.crt", key_file=folder / "tls.key"
        )
        durable.replace_atomic(folder / "tls.key", private_pem(self.key))
        self.issue("north", "ward")

    def issue(self, name: str, ca_name: str) -> None:
        """Another certificate for the key that is there, of another CA."""
        now = int(time.time())
        ca = provision.make_ca(self.ca_key, name=ca_name, serial=1, now=now, days=1)
        made = provision.issue_client((self.ca_key, ca), self.key.public_key(), name=name, serial=2, now=now, days=1)
        durable.replace_atomic(self.folder / "ca.crt", provision.certificate_pem(ca))
        durable.replace_atomic(self.folder / "tls.crt", provision.certificate_pem(made))


def authorities(context: ssl.SSLContext) -> set[str]:
    """Common names of the CAs that a context believes."""
    return {str(ca["subject"][0][0][1]) for ca in context.get_ca_certs()}


def test_renewed_files_count_from_the_next_connection_on(tmp_path: Path) -> None:
    """As long as nothing changes it is one context; a new bundle makes another, which is told once."""
    files = Files(tmp_path)
    made = Certificates(files.section)
    first = made.context()
    assert made.context() is first
    files.issue("north", "ward 2")
    with capture_logs() as logs:
        second = made.context()
        assert made.context() is second
    assert second is not first
    assert authorities(second) == {"ward 2"}
    assert [line["event"] for line in logs] == ["read the certificates again"]


@pytest.mark.parametrize("broken", [b"", b"x", None])
def test_files_that_cannot_be_used_change_nothing(tmp_path: Path, broken: bytes | None) -> None:
    """A process that runs is not ended by a file that is being exchanged; one that starts is."""
    files = Files(tmp_path)
    made = Certificates(files.section)
    first = made.context()
    durable.remove(tmp_path / "tls.crt")
    if broken is not None:
        durable.replace_atomic(tmp_path / "tls.crt", broken)
    with capture_logs() as logs:
        assert made.context() is first
        assert made.context() is first
    assert [line["event"] for line in logs] == ["kept the certificates as they were"]
    with pytest.raises(ConfigError):
        Certificates(files.section)
    files.issue("north", "ward 2")
    assert authorities(made.context()) == {"ward 2"}
