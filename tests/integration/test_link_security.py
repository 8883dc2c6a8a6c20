"""The link with TLS, certificates, passwords and access lists of a real Mosquitto."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from broker.launcher import find_mosquitto
from shared.config import BrokerSection, LinkSection
from shared.errors import ConfigError, RefusedError
from shared.link import Connected, Link, LinkOptions
from tests.helpers import AS_MYSELF, run_async

pytestmark = [
    pytest.mark.integration,
    pytest.mark.usefixtures("patient_links"),
    pytest.mark.skipif(find_mosquitto() is None, reason="Mosquitto is not installed: apt-get install mosquitto"),
    pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed: apt-get install openssl"),
]


def openssl(folder: Path, *arguments: str) -> None:
    """Run openssl in `folder`."""
    program = shutil.which("openssl")
    assert program is not None
    subprocess.run([program, *arguments], cwd=folder, check=True, capture_output=True)


def authority(folder: Path, name: str) -> None:
    """A self-signed authority: `<name>.pem` and `<name>.key`."""
    new_key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    openssl(folder, "req", "-x509", *new_key, "-keyout", f"{name}.key", "-out", f"{name}.pem", "-subj", f"/CN={name}")


def certificate(folder: Path, name: str, ca: str, alt: str = "IP:127.0.0.1") -> None:
    """A certificate signed by `ca`: `<name>.pem` and `<name>.key`."""
    new_key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    openssl(folder, "req", *new_key, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
    (folder / f"{name}.ext").write_text(f"subjectAltName={alt}\n")
    sign = ("-CA", f"{ca}.pem", "-CAkey", f"{ca}.key", "-CAcreateserial", "-extfile", f"{name}.ext")
    openssl(folder, "x509", "-req", "-in", f"{name}.csr", *sign, "-out", f"{name}.pem", "-days", "2")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two authorities, a broker and a site of the first one, a site of the other."""
    folder = tmp_path_factory.mktemp("keys")
    authority(folder, "ca")
    authority(folder, "other-ca")
    certificate(folder, "broker", "ca")
    certificate(folder, "elsewhere", "ca", alt="DNS:broker.example")
    certificate(folder, "site", "ca")
    certificate(folder, "stranger", "other-ca")
    return folder


@contextmanager
def mosquitto_with(folder: Path, port: int, lines: list[str]) -> Iterator[None]:
    """Mosquitto on a loopback port with these settings."""
    program = find_mosquitto()
    assert program is not None
    settings = [f"listener {port} 127.0.0.1", AS_MYSELF, "log_dest stderr", *lines]
    (folder / "mosquitto.conf").write_text("\n".join(settings) + "\n")
    process = subprocess.Popen(
        [program, "-c", folder / "mosquitto.conf"], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if b"running" in line:
                break
        yield
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def tls_lines(keys: Path, server: str = "broker") -> list[str]:
    """Settings of a broker that asks for certificates."""
    return [
        f"cafile {keys}/ca.pem",
        f"certfile {keys}/{server}.pem",
        f"keyfile {keys}/{server}.key",
        "require_certificate true",
        "use_identity_as_username true",
    ]


def connect(section: BrokerSection, *subscriptions: str) -> Connected:
    """The first event of a link."""

    async def run() -> Connected:
        async with Link(LinkOptions(section, LinkSection(), "site", subscriptions)) as link:
            event = await anext(link.events())
            await link.publish("t", b"x")
            assert isinstance(event, Connected)
            return event

    return run_async(run(), timeout_s=15)


def tls(port: int, keys: Path, **changes: Path | None) -> BrokerSection:
    """A section with the right authority, certificate and key, but for the changes."""
    fields = {"ca_file": keys / "ca.pem", "cert_file": keys / "site.pem", "key_file": keys / "site.key", **changes}
    return BrokerSection.model_validate({"url": f"mqtts://127.0.0.1:{port}", **fields})


def refused(section: BrokerSection) -> str:
    """The rule under which the link ends, instead of trying for ever."""
    with pytest.raises(RefusedError) as caught:
        connect(section)
    assert caught.value.hint
    return caught.value.rule


class TestTls:
    def test_certificates(self, keys: Path, tmp_path: Path, free_port: int) -> None:
        """With certificates of one authority on both sides the connection stands, and large messages pass."""
        with mosquitto_with(tmp_path, free_port, tls_lines(keys)):
            assert connect(tls(free_port, keys)).protocol == "5"

            async def run() -> None:
                async with Link(LinkOptions(tls(free_port, keys), LinkSection(), "site", ("big",))) as link:
                    events = link.events()
                    await anext(events)
                    payload = bytes(range(256)) * 3000

                    async def take() -> list[bytes]:
                        return [getattr(await anext(events), "payload", b"") for _ in range(8)]

                    taken, *_ = await asyncio.gather(take(), *(link.publish("big", payload) for _ in range(8)))
                    assert taken == [payload] * 8

            run_async(run())

    def test_broker_of_another_authority(self, keys: Path, tmp_path: Path, free_port: int) -> None:
        """A broker whose certificate does not verify is not spoken to."""
        with mosquitto_with(tmp_path, free_port, tls_lines(keys)):
            assert refused(tls(free_port, keys, ca_file=keys / "other-ca.pem")) == "broker-certificate"

    def test_broker_of_another_name(self, keys: Path, tmp_path: Path, free_port: int) -> None:
        """A certificate for another host is not accepted."""
        with mosquitto_with(tmp_path, free_port, tls_lines(keys, "elsewhere")):
            assert refused(tls(free_port, keys)) == "broker-certificate"

    @pytest.mark.parametrize("name", ["stranger", None])
    def test_certificate_that_the_broker_does_not_know(
        self, keys: Path, tmp_path: Path, free_port: int, name: str | None
    ) -> None:
        """A client without a certificate of the broker's authority is told so, although TLS 1.3 tells it late."""
        cert, key = (keys / f"{name}.pem", keys / f"{name}.key") if name else (None, None)
        with mosquitto_with(tmp_path, free_port, tls_lines(keys)):
            assert refused(tls(free_port, keys, cert_file=cert, key_file=key)) == "client-certificate"

    def test_key_of_another_certificate(self, keys: Path) -> None:
        """A key that does not belong to the certificate is a configuration error."""
        with pytest.raises(ConfigError, match=r"site\.pem"):
            connect(tls(1, keys, key_file=keys / "stranger.key"))

    def test_encrypted_key(self, keys: Path, tmp_path: Path) -> None:
        """A key with a passphrase is refused, not asked for."""
        openssl(tmp_path, "ec", "-in", str(keys / "site.key"), "-out", "locked.key", "-aes128", "-passout", "pass:abcd")
        with pytest.raises(ConfigError, match="encrypted"):
            connect(tls(1, keys, key_file=tmp_path / "locked.key"))


class TestPassword:
    @pytest.fixture
    def guarded(self, tmp_path: Path, free_port: int) -> Iterator[int]:
        """A broker that knows user `me` with password `right`, who may write `t` alone."""
        (tmp_path / "users").write_text("me:right\n")
        (tmp_path / "users").chmod(0o600)
        tool = shutil.which("mosquitto_passwd")
        if tool is None:
            pytest.skip("mosquitto_passwd is not installed: apt-get install mosquitto")
        subprocess.run([tool, "-U", tmp_path / "users"], check=True)
        (tmp_path / "acl").write_text("user me\ntopic readwrite t\n")
        lines = [f"password_file {tmp_path}/users", f"acl_file {tmp_path}/acl", "allow_anonymous false"]
        with mosquitto_with(tmp_path, free_port, lines):
            yield free_port

    @staticmethod
    def section(port: int, folder: Path, password: str) -> BrokerSection:
        """User `me` with that password."""
        (folder / "password").write_text(password + "\n")
        return BrokerSection(url=f"mqtt://127.0.0.1:{port}", username="me", password_file=folder / "password")

    def test_right(self, guarded: int, tmp_path: Path) -> None:
        """The right password connects and may publish."""
        assert connect(self.section(guarded, tmp_path, "right")).protocol == "5"

    def test_wrong(self, guarded: int, tmp_path: Path) -> None:
        """A wrong password ends the link at once and does not appear in the message."""
        with pytest.raises(RefusedError, match="password") as caught:
            connect(self.section(guarded, tmp_path, "wrong-word"))
        assert "wrong-word" not in str(caught.value)

    def test_topic_that_the_access_list_does_not_admit(self, guarded: int, tmp_path: Path) -> None:
        """Publishing where the access list does not admit it is an error that names the topic."""

        async def run() -> None:
            section = self.section(guarded, tmp_path, "right")
            async with Link(LinkOptions(section, LinkSection(), "site")) as link:
                await anext(link.events())
                await link.publish("elsewhere", b"x")

        with pytest.raises(RefusedError, match="elsewhere"):
            run_async(run())
