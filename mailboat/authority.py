"""The authority's folder: who was admitted, until when, and everything that follows from it.

    authority.key  ca.key  ca.crt       the two keys that nothing else may hold; a backup of them is kept apart
    register.json                       every membership ever issued; all else below follows from it and the keys
    coordinator-kit/                    the coordinator's kit, with roster and revocations
    broker/                             what the broker needs: configuration, rules, certificate, CRL
    grants/NAME.grant                   what a site is handed

Each change is written to the register first; then `publish` brings everything else in line with it. Interrupted between
the two, the next command, of any kind, does it.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Literal

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import ValidationError

from broker import provision
from broker.acl import render_acl
from broker.production import production_config
from mailboat.enrolment import Grant, Request, make_grant, to_json
from mailboat.register import Entry, Register
from shared import durable
from shared.config import COORDINATOR_USER
from shared.errors import ConfigError, CorruptError, RefusedError
from shared.topics import Role
from shared.trust import kit as kits
from shared.trust.membership import (
    Membership,
    Revocations,
    public_bytes,
    sign_membership,
    sign_revocations,
)

AUTHORITY_KEY = "authority.key"
CA_KEY = "ca.key"
CA_CERT = "ca.crt"
REGISTER = "register.json"
COORDINATOR_KIT = "coordinator-kit"
BROKER = "broker"
GRANTS = "grants"
SERVER_KEY, SERVER_CERT, CRL, ACL = "server.key", "server.crt", "crl.pem", "acl"

AUTHORITY_DAYS = 3650
"""CA, coordinator's membership and CRL: their end is the federation's."""
COORDINATOR_DAYS = 365
"""The certificates of coordinator and broker; renewed with one command and no word to the sites."""
SITE_DAYS = 90


@dataclass(frozen=True, slots=True)
class Authority:
    """The opened folder."""

    folder: Path
    key: Ed25519PrivateKey
    ca_key: ec.EllipticCurvePrivateKey
    ca: x509.Certificate
    register: Register

    @property
    def public(self) -> bytes:
        """The public key that memberships are verified with: 32 raw bytes."""
        return public_bytes(self.key)


# -- opening ---


def create(
    folder: Path, federation: str, hosts: Sequence[str], *, port: int, broker_folder: PurePath, now: int
) -> Authority:
    """Make an authority with coordinator's kit and broker's folder; ConfigError when there is something in `folder`."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is not an empty folder", hint="an authority is made once; name a new folder")
    ca_key, server_key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca = provision.make_ca(
        ca_key, name=f"Mailboat federation {federation}", serial=_serial(), now=now, days=AUTHORITY_DAYS
    )
    server = provision.issue_server(  # before anything is written, because a host may be wrong
        (ca_key, ca), server_key.public_key(), hosts=hosts, serial=_serial(), now=now, days=COORDINATOR_DAYS
    )
    for made in (folder, folder / BROKER, folder / GRANTS):
        kits.make_private_folder(made)
    key = kits.generate_authority(folder / AUTHORITY_KEY)
    kits.write_private(folder / CA_KEY, kits.private_pem(ca_key))
    kits.write_private(folder / CA_CERT, provision.certificate_pem(ca))
    kits.write_private(folder / BROKER / SERVER_KEY, kits.private_pem(server_key))
    kits.write_private(folder / BROKER / "mosquitto.conf", production_config(broker_folder, port).encode())
    kit = folder / COORDINATOR_KIT
    kits.generate_keys(kit)
    kits.make_private_folder(kit / kits.ROSTER)
    kits.write_private(kit / kits.AUTHORITY, kits.authority_pem([public_bytes(key)]))
    register = Register(
        federation=federation, hosts=tuple(hosts), port=port, listed_at=now - provision.BACKDATED_S, number=1
    )
    authority = Authority(folder, key, ca_key, ca, register)
    kits.write_private(kit / kits.MEMBER, _coordinators_membership(authority, now))
    authority = _renew_end(authority, "broker", server_key.public_key(), now=now, certificate=server)
    return rotate_end(authority, "coordinator", now=now)


def open_authority(folder: Path) -> Authority:
    """Read an authority's folder and bring what follows from its register in line; ConfigError, CorruptError."""
    if not (folder / REGISTER).exists():
        raise ConfigError(f"{folder} holds no authority", hint="`mailboat provision init` makes one")
    kits.check_private(folder)
    ca_pem, ca_key = (kits.read_private(folder / name) for name in (CA_CERT, CA_KEY))
    try:
        register = Register.model_validate_json(kits.read_private(folder / REGISTER))
    except ValidationError:
        raise CorruptError(f"{folder / REGISTER} is not a register", hint="restore it from the backup") from None
    authority = Authority(
        folder,
        kits.load_authority(folder / AUTHORITY_KEY),
        provision.load_p256(ca_key, where=str(folder / CA_KEY)),
        provision.load_certificate(ca_pem, where=str(folder / CA_CERT)),
        register,
    )
    publish(authority)
    return authority


# -- changing ---


def approve(authority: Authority, request: Request, *, days: int, now: int, replace: bool) -> tuple[Authority, Path]:
    """Admit a site, or renew it when it asks with the keys that it had; returns the grant's path.

    RefusedError when the name is taken by other keys (unless `replace`, which revokes those), or when one of the keys
    was revoked, whoever brings it.
    """
    if request.name == BROKER:
        raise RefusedError(f"no site may be named {BROKER}", rule="name-taken", hint="the site chooses another name")
    before = authority.register.current(request.name)
    keys = (request.sign_key, request.box_key, provision.key_bytes(request.tls_key))
    for entry in authority.register.entries:
        if entry.state == "revoked" and {entry.sign_key, entry.box_key, entry.tls_key} & set(keys):
            raise RefusedError(
                f"a key of this request was revoked with {entry.name}",
                rule="revoked",
                hint="the site makes a new kit: `mailboat site enroll`",
            )
    same = before is not None and (before.sign_key, before.box_key, before.tls_key) == keys
    if before is not None and not same:
        if not replace:
            raise RefusedError(
                f"{request.name} is admitted with other keys",
                rule="name-taken",
                hint="--replace revokes those and admits these, if the site has lost its kit or renews its keys",
            )
        authority = revoke(authority, request.name, now=now)
    return _admit(authority, request.name, keys, days=days, now=now)


def rotate_site(authority: Authority, name: str, *, days: int, now: int) -> tuple[Authority, Path]:
    """Renew an admitted site's membership and certificate for the keys that it has; returns the grant's path."""
    entry = _admitted(authority, name)
    if entry.role != "site" or entry.sign_key is None or entry.box_key is None:
        raise ConfigError(f"{name} is not a site", hint="`mailboat provision list` names the sites")
    return _admit(authority, name, (entry.sign_key, entry.box_key, entry.tls_key), days=days, now=now)


def rotate_end(authority: Authority, name: Literal["coordinator", "broker"], *, now: int) -> Authority:
    """Renew the certificate of the coordinator or of the broker for the key that it has."""
    path = authority.folder / (COORDINATOR_KIT if name == "coordinator" else BROKER)
    path /= kits.TLS_KEY if name == "coordinator" else SERVER_KEY
    key = provision.load_p256(kits.read_private(path), where=str(path)).public_key()
    return _renew_end(authority, name, key, now=now)


def rotate_federation_key(authority: Authority, *, now: int) -> Authority:
    """Sign the revocations anew: at the next number a running coordinator draws a new federation key."""
    return _commit(authority, authority.register.entries, now=now, listed=True)


def revoke(authority: Authority, name: str, *, now: int) -> Authority:
    """Take back everything that was ever issued to a site."""
    if _admitted(authority, name).role != "site":
        raise ConfigError(
            f"{name} is not a site", hint=f"a {name} whose key is lost needs a new authority: `provision init`"
        )
    taken = {"state": "revoked", "revoked_at": now}
    entries = [
        entry.model_copy(update=taken) if entry.name == name and entry.state != "revoked" else entry
        for entry in authority.register.entries
    ]
    return _commit(authority, entries, now=now, listed=True)


def publish(authority: Authority) -> None:
    """Write what follows from the register: revocations, CRL and access rules, the coordinator's roster."""
    register = authority.register
    revoked = {entry.serial: entry.revoked_at for entry in register.entries if entry.state == "revoked"}
    crl = provision.make_crl(
        (authority.ca_key, authority.ca),
        revoked,
        number=register.number,
        at=register.listed_at,
        days=AUTHORITY_DAYS,
    )
    listed = Revocations(federation=register.federation, number=register.number, serials=tuple(revoked))
    kit, broker = authority.folder / COORDINATOR_KIT, authority.folder / BROKER
    ca = provision.certificate_pem(authority.ca)
    signed = sign_revocations(authority.key, listed)
    if not _has(kit / kits.REVOCATIONS, signed):
        kits.write_private(broker / CRL, crl)  # first: what is compared is the list below, equal signatures each time
        kits.write_private(kit / kits.REVOCATIONS, signed)
    gone = {entry.name for entry in register.entries if entry.state == "revoked" and not register.current(entry.name)}
    rules = render_acl(register.federation, COORDINATOR_USER, barred=gone).encode()
    if not _has(broker / ACL, rules):
        kits.write_private(broker / ACL, rules)
    for folder in (kit, broker):
        if not _has(folder / CA_CERT, ca):
            kits.write_private(folder / CA_CERT, ca)
    roster = {
        f"{entry.name}{kits.MEMBER_SUFFIX}": entry.member
        for entry in register.entries
        if entry.role == "site" and entry.state == "admitted"
    }
    for path in (kit / kits.ROSTER).glob(f"*{kits.MEMBER_SUFFIX}"):
        if path.name not in roster:
            durable.remove(path)
    for file, member in roster.items():
        if not _has(kit / kits.ROSTER / file, member):
            kits.write_private(kit / kits.ROSTER / file, member)


def _admit(
    authority: Authority, name: str, keys: tuple[bytes, bytes, bytes], *, days: int, now: int
) -> tuple[Authority, Path]:
    serial = _serial()
    member = _membership(authority, name, "site", (keys[0], keys[1]), serial=serial, now=now, days=days)
    certificate = provision.issue_client(
        (authority.ca_key, authority.ca),
        provision.key_from_bytes(keys[2]),
        name=name,
        serial=serial,
        now=now,
        days=days,
    )
    entry = Entry(
        name=name,
        role="site",
        serial=serial,
        state="admitted",
        not_after=now + days * 86_400,
        sign_key=keys[0],
        box_key=keys[1],
        tls_key=keys[2],
        member=member,
    )
    authority = _commit(authority, [*_superseded(authority, name), entry], now=now, listed=False)
    path = authority.folder / GRANTS / f"{name}.grant"
    kits.write_private(path, to_json(_grant(authority, entry, certificate)))
    return authority, path


def _grant(authority: Authority, entry: Entry, certificate: x509.Certificate) -> Grant:
    return make_grant(
        authority.key,
        name=entry.name,
        federation=authority.register.federation,
        member=entry.member,
        coordinator=kits.read_private(authority.folder / COORDINATOR_KIT / kits.MEMBER),
        certificate=provision.certificate_pem(certificate).decode(),
        ca=provision.certificate_pem(authority.ca).decode(),
        authorities=kits.authority_pem([authority.public]).decode(),
    )


def _renew_end(
    authority: Authority,
    name: Literal["coordinator", "broker"],
    key: ec.EllipticCurvePublicKey,
    *,
    now: int,
    certificate: x509.Certificate | None = None,
) -> Authority:
    issuer = (authority.ca_key, authority.ca)
    dates = {"serial": _serial(), "now": now, "days": COORDINATOR_DAYS}
    if name == "coordinator":
        made = provision.issue_client(issuer, key, name=COORDINATOR_USER, **dates)
        path = authority.folder / COORDINATOR_KIT / kits.TLS_CERT
    else:
        made = certificate or provision.issue_server(issuer, key, hosts=authority.register.hosts, **dates)
        path = authority.folder / BROKER / SERVER_CERT
    entry = Entry(
        name=name,
        role=name,
        serial=made.serial_number,
        state="admitted",
        not_after=now + COORDINATOR_DAYS * 86_400,
        tls_key=provision.key_bytes(key),
    )
    authority = _commit(authority, [*_superseded(authority, name), entry], now=now, listed=False)
    kits.write_private(path, provision.certificate_pem(made))
    return authority


def _superseded(authority: Authority, name: str) -> list[Entry]:
    return [
        entry.model_copy(update={"state": "superseded"}) if entry.name == name and entry.state == "admitted" else entry
        for entry in authority.register.entries
    ]


def _commit(authority: Authority, entries: Sequence[Entry], *, now: int, listed: bool) -> Authority:
    """Write the register with these entries, with the next revocation list if `listed`, and publish."""
    changed: dict[str, object] = {"entries": tuple(entries)}
    if listed:
        changed["number"] = authority.register.number + 1
        changed["listed_at"] = max(now - provision.BACKDATED_S, authority.register.listed_at + 1)
    register = authority.register.model_copy(update=changed)
    kits.write_private(authority.folder / REGISTER, register.model_dump_json(indent=1).encode())
    authority = Authority(authority.folder, authority.key, authority.ca_key, authority.ca, register)
    publish(authority)
    return authority


def _admitted(authority: Authority, name: str) -> Entry:
    entry = authority.register.current(name)
    if entry is None:
        raise ConfigError(f"{name} is not admitted", hint="`mailboat provision list` names who is")
    return entry


def _coordinators_membership(authority: Authority, now: int) -> bytes:
    keys = kits.public_keys(authority.folder / COORDINATOR_KIT)
    return _membership(
        authority,
        COORDINATOR_USER,
        "coordinator",
        (keys.sign, keys.box),
        serial=_serial(),
        now=now,
        days=AUTHORITY_DAYS,
    )


def _membership(
    authority: Authority, name: str, role: Role, keys: tuple[bytes, bytes], *, serial: int, now: int, days: int
) -> bytes:
    membership = Membership(
        role=role,
        name=name,
        federation=authority.register.federation,
        sign_key=keys[0],
        box_key=keys[1],
        serial=serial,
        not_before=now - provision.BACKDATED_S,
        not_after=now + days * 86_400,
    )
    return sign_membership(authority.key, membership)


def _serial() -> int:
    """63 random bits: unique without a counter that a restored backup could set back."""
    return secrets.randbelow(2**63 - 1) + 1


def _has(path: Path, data: bytes) -> bool:
    return path.exists() and path.read_bytes() == data


def unix_now() -> int:
    """The time in whole seconds."""
    return int(time.time())
