"""Broker URLs and the credentials and certificates that go with them; all of it is read once, before dialling."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from shared.config import BrokerSection
from shared.errors import ConfigError

PORTS = {"mqtt": 1883, "mqtts": 8883}


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One broker address."""

    host: str
    port: int
    tls: bool

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_endpoints(url: str) -> tuple[Endpoint, ...]:
    """Split `mqtt://a:1883,b:1883`; the scheme of an entry without one is that of the entry before it."""
    found: list[Endpoint] = []
    scheme = ""
    for entry in url.split(","):
        text = entry.strip()
        if "://" in text:
            scheme, _, text = text.partition("://")
        found.append(_endpoint(url, scheme, text))
    return tuple(found)


def _endpoint(url: str, scheme: str, place: str) -> Endpoint:
    wrong = ConfigError(
        f"broker.url {_without_secrets(url)!r} is not a list of broker addresses",
        hint="write mqtt://host:port, or mqtts:// for TLS; several as mqtt://a:1883,b:1883",
    )
    if scheme not in PORTS:
        raise wrong
    try:
        parts = urlsplit(f"//{place}")
        host, port = parts.hostname, parts.port
        (host or "").encode("idna")
    except ValueError:  # UnicodeError is one
        raise wrong from None
    if parts.username is not None or parts.password is not None:
        raise ConfigError(
            "broker.url carries a user name or password",
            hint="set broker.username and broker.password_file; a URL ends up in logs",
        )
    if not host or parts.path not in {"", "/"} or parts.query or parts.fragment or port == 0:
        raise wrong
    return Endpoint(host, port if port is not None else PORTS[scheme], scheme == "mqtts")


def _without_secrets(url: str) -> str:
    return ",".join(entry.rpartition("@")[2] for entry in url.split(","))


def read_password(section: BrokerSection) -> str | None:
    """The first line of broker.password_file, None without one."""
    if section.password_file is None:
        return None
    text = _read(section.password_file, "password_file")
    try:
        return text.decode().splitlines()[0] if text else ""
    except UnicodeDecodeError:
        raise ConfigError(f"{section.password_file}: not UTF-8", hint="save the password as UTF-8 text") from None


def tls_context(section: BrokerSection) -> ssl.SSLContext:
    """TLS that verifies the broker's certificate and name, and shows ours where one is configured."""
    for key in ("ca_file", "cert_file", "key_file"):
        path = getattr(section, key)
        if path is not None:
            _read(path, key)
    try:
        context = ssl.create_default_context(cafile=section.ca_file)
    except ssl.SSLError as error:
        raise _not_pem(section.ca_file, error) from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if section.cert_file is not None:
        try:
            context.load_cert_chain(section.cert_file, section.key_file, password=_no_passphrase(section.key_file))
        except ssl.SSLError as error:
            raise _not_pem(section.cert_file, error) from None
    return context


def _read(path: Path, key: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read: {error.strerror}", hint=f"broker.{key} must name a readable file"
        ) from None


def _not_pem(path: Path | None, error: ssl.SSLError) -> ConfigError:
    return ConfigError(
        f"{path}: not usable for TLS: {error.reason or error}",
        hint="ca_file and cert_file are PEM certificates, and key_file is the key of cert_file",
    )


def _no_passphrase(path: Path | None) -> Callable[[], str]:
    def refuse() -> str:
        raise ConfigError(
            f"{path}: the key is encrypted", hint="a service has nobody to ask; store it unencrypted with mode 0600"
        )

    return refuse
