"""An authority's folder, open: its keys and register, what it signs, and what follows from the register.

    authority.key                       the Ed25519 key under which memberships, lists and grants are signed
    ca.key  ca.crt                      the TLS CA
                                        of both, authority-2.key, ca-2.key and so on after a roll-over, two during one
    register.json                       every membership ever issued; all else below follows from it and the keys
    coordinator-kit/                    the coordinator's kit, with roster, revocations and the sites' newest grants
    broker/                             what the broker needs: configuration, rules, certificate, CRL
    grants/NAME.grant                   what a site is handed

Each change is written to the register first; then `publish` brings everything else in line with it. Interrupted between
the two, the next command, of any kind, does it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from broker import provision
from broker.acl import render_acl
from mailboat.register import Entry, Register
from shared import durable
from shared.config import COORDINATOR_USER
from shared.errors import ConfigError, RefusedError
from shared.topics import Role
from shared.trust import kit as kits
from shared.trust.document import to_json
from shared.trust.grant import GRANT_SUFFIX, make_grant, parse_grant
from shared.trust.membership import (
    Membership,
    Revocations,
    public_bytes,
    sign_endorsements,
    sign_membership,
    sign_revocations,
    stated_membership,
)

AUTHORITY_KEY = "authority.key"
CA_CERT = kits.CA_CERT
"""In the broker's folder: the CA, or both during a roll-over, as in each kit."""
REGISTER = "register.json"
COORDINATOR_KIT = "coordinator-kit"
BROKER = "broker"
GRANTS = kits.GRANTS
SERVER_KEY, SERVER_CERT, CRL, ACL = "server.key", "server.crt", "crl.pem", "acl"

AUTHORITY_DAYS = 3650
"""CA, coordinator's membership and CRL: their end is the federation's."""
COORDINATOR_DAYS = 365
"""The certificates of coordinator and broker, which are files that somebody copies."""
DAY_S = 86_400
SAME_TIME_S = 60
"""How far renewals that follow each other at once may come to be dated ahead."""

_GENERATION_FILE = re.compile(r"(authority|ca)(-\d+)?\.(key|crt)")

Ca = tuple[ec.EllipticCurvePrivateKey, x509.Certificate]
End = Literal["coordinator", "broker"]


@dataclass(frozen=True, slots=True)
class Authority:
    """The opened folder."""

    folder: Path
    keys: tuple[Ed25519PrivateKey, ...]
    """The one that signs, and during a roll-over the one that is believed beside it."""
    cas: tuple[Ca, ...]
    """The one that issues, and during a roll-over the one that is trusted beside it."""
    register: Register

    @property
    def key(self) -> Ed25519PrivateKey:
        """The one that signs."""
        return self.keys[0]

    @property
    def public(self) -> bytes:
        """The public key that memberships are verified with: 32 raw bytes."""
        return public_bytes(self.key)

    @property
    def bundle(self) -> bytes:
        """Whom to believe about certificates, as kits and the broker hold it: PEM."""
        return b"".join(provision.certificate_pem(certificate) for _key, certificate in self.cas)


def ca_files(generation: int) -> tuple[str, str]:
    """Names of key and certificate of the first, second, ... CA of this authority."""
    stem = "ca" if generation == 1 else f"ca-{generation}"
    return f"{stem}.key", f"{stem}.crt"


def key_file(generation: int) -> str:
    """Name of the first, second, ... key of this authority."""
    return AUTHORITY_KEY if generation == 1 else f"authority-{generation}.key"


def make_ca(folder: Path, federation: str, generation: int, now: int) -> Ca:
    """Make a CA and write it to the folder; a roll-over's has a name of its own, so that no two are taken for one."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = f"Mailboat federation {federation}" + ("" if generation == 1 else f" {generation}")
    certificate = provision.make_ca(key, name=name, serial=new_serial(), now=now, days=AUTHORITY_DAYS)
    for file, data in zip(
        ca_files(generation), (kits.private_pem(key), provision.certificate_pem(certificate)), strict=True
    ):
        kits.write_private(folder / file, data)
    return key, certificate


def load_ca(folder: Path, generation: int) -> Ca:
    """Read one CA; ConfigError when it is not there, or not what it should be."""
    key, certificate = (folder / name for name in ca_files(generation))
    return (
        provision.load_p256(kits.read_private(key), where=str(key)),
        provision.load_certificate(kits.read_private(certificate), where=str(certificate)),
    )


# -- issuing ---


def admit(
    authority: Authority, name: str, keys: tuple[bytes, bytes, bytes], *, days: int, now: int
) -> tuple[Authority, Path]:
    """Issue membership and certificate for a site's signing, box and TLS key; returns the path of its grant.

    Two of one second are dated one after the other, because a site takes later ones alone. One that a clock which was
    ahead has dated far in the future does not count: no site has taken it, and this one takes its place.
    """
    serial = new_serial()
    before = [
        stated_membership(each.member) for each in authority.register.entries if each.name == name and each.member
    ]
    issued = [each.not_before + provision.BACKDATED_S for each in before]
    now = max([now, *(at + 1 for at in issued if at <= now + SAME_TIME_S)])
    member = membership(authority, name, "site", (keys[0], keys[1]), serial=serial, now=now, days=days)
    certificate = provision.issue_client(
        authority.cas[0], provision.key_from_bytes(keys[2]), name=name, serial=serial, now=now, days=days
    )
    entry = Entry(
        name=name,
        role="site",
        serial=serial,
        state="admitted",
        not_after=now + days * DAY_S,
        sign_key=keys[0],
        box_key=keys[1],
        tls_key=keys[2],
        member=member,
        ca=authority.register.ca,
        key=authority.register.key,
    )
    authority = commit(authority, [*superseded(authority, name), entry], now=now)
    grant = make_grant(
        authority.key,
        name=name,
        federation=authority.register.federation,
        member=member,
        coordinator=coordinators_document(authority, admitted(authority, "coordinator")),
        certificate=provision.certificate_pem(certificate).decode(),
        ca=authority.bundle.decode(),
        authorities=kits.authority_pem([authority.public]).decode(),
        introductions=authority.register.introductions,
    )
    path = authority.folder / GRANTS / f"{name}{GRANT_SUFFIX}"
    kits.write_private(path, to_json(grant))
    publish(authority)
    return authority, path


def renew_end(
    authority: Authority,
    name: End,
    key: ec.EllipticCurvePublicKey,
    *,
    now: int,
) -> Authority:
    """Issue the certificate of the coordinator or of the broker for a key; the coordinator's membership stays."""
    before = authority.register.current(name)
    member = b""
    if name == "coordinator":
        member = coordinators_document(authority, before) if before else coordinators_membership(authority, now)
    dates = {"serial": new_serial(), "now": now, "days": COORDINATOR_DAYS}
    if name == "coordinator":
        made = provision.issue_client(authority.cas[0], key, name=COORDINATOR_USER, **dates)
        path = authority.folder / COORDINATOR_KIT / kits.TLS_CERT
    else:
        made = provision.issue_server(authority.cas[0], key, hosts=authority.register.hosts, **dates)
        path = authority.folder / BROKER / SERVER_CERT
    entry = Entry(
        name=name,
        role=name,
        serial=made.serial_number,
        state="admitted",
        not_after=now + COORDINATOR_DAYS * DAY_S,
        tls_key=provision.key_bytes(key),
        member=member,
        ca=authority.register.ca,
        key=authority.register.key,
    )
    authority = commit(authority, [*superseded(authority, name), entry], now=now)
    kits.write_private(path, provision.certificate_pem(made))
    return authority


def coordinators_membership(authority: Authority, now: int) -> bytes:
    """Sign the coordinator's membership; it ends with the federation."""
    keys = kits.public_keys(authority.folder / COORDINATOR_KIT)
    both = (keys.sign, keys.box)
    return membership(
        authority, COORDINATOR_USER, "coordinator", both, serial=new_serial(), now=now, days=AUTHORITY_DAYS
    )


def coordinators_document(authority: Authority, entry: Entry) -> bytes:
    """The coordinator's membership as it was signed; an earlier release kept it in the kit alone."""
    return entry.member or kits.read_private(authority.folder / COORDINATOR_KIT / kits.MEMBER)


def membership(
    authority: Authority, name: str, role: Role, keys: tuple[bytes, bytes], *, serial: int, now: int, days: int
) -> bytes:
    """Sign a membership for a signing and a box key."""
    document = Membership(
        role=role,
        name=name,
        federation=authority.register.federation,
        sign_key=keys[0],
        box_key=keys[1],
        serial=serial,
        not_before=now - provision.BACKDATED_S,
        not_after=now + days * DAY_S,
    )
    return sign_membership(authority.key, document)


def admitted(authority: Authority, name: str) -> Entry:
    """The entry that counts for this name; ConfigError when there is none."""
    entry = authority.register.current(name)
    if entry is None:
        raise ConfigError(f"{name} is not admitted", hint="`mailboat provision list` names who is")
    return entry


def grant_of(authority: Authority, entry: Entry) -> bytes | None:
    """The grant of an entry as it was made; None when its making was interrupted, or the file is of another time."""
    path = authority.folder / GRANTS / f"{entry.name}{GRANT_SUFFIX}"
    with contextlib.suppress(RefusedError, FileNotFoundError):
        data = path.read_bytes()
        if parse_grant(data).member == entry.member:
            return data
    return None


def new_serial() -> int:
    """63 random bits: unique without a counter that a restored backup could set back."""
    return secrets.randbelow(2**63 - 1) + 1


def superseded(authority: Authority, name: str) -> list[Entry]:
    """The register's entries, with the one that counts for this name in the past."""
    return [
        entry.model_copy(update={"state": "superseded"}) if entry.name == name and entry.state == "admitted" else entry
        for entry in authority.register.entries
    ]


# -- register, and what follows from it ---


def commit(
    authority: Authority, entries: Sequence[Entry], *, now: int, listed: bool = False, **changes: Any
) -> Authority:
    """Write the register with these entries and changes, with the next revocation list if `listed`, and publish."""
    changes["entries"] = tuple(entries)
    if listed:
        changes["number"] = authority.register.number + 1
        changes["listed_at"] = max(now - provision.BACKDATED_S, authority.register.listed_at + 1)
    register = authority.register.model_copy(update=changes)
    kits.write_private(authority.folder / REGISTER, register.model_dump_json(indent=1).encode())
    authority = dataclasses.replace(authority, register=register)
    publish(authority)
    return authority


def publish(authority: Authority) -> None:
    """Write what follows from the register: keys, lists, access rules, CAs, and the coordinator's roster and grants.

    Whom to believe comes first: nothing is published that is signed with a key which is not.
    """
    register = authority.register
    kit, broker = authority.folder / COORDINATOR_KIT, authority.folder / BROKER
    _write_new(kit / kits.AUTHORITY, kits.authority_pem(public_bytes(key) for key in authority.keys))
    if entry := register.current("coordinator"):
        _write_new(kit / kits.MEMBER, coordinators_document(authority, entry))
    revoked = {entry.serial: entry.revoked_at for entry in register.entries if entry.state == "revoked"}
    listed = Revocations(federation=register.federation, number=register.number, serials=tuple(revoked))
    _publish_crl(authority, broker / CRL, revoked)
    _write_new(kit / kits.REVOCATIONS, sign_revocations(authority.key, listed))
    if earlier := [entry.member for entry in register.entries if entry.member and entry.key < register.key]:
        _write_new(kit / kits.ENDORSEMENTS, sign_endorsements(authority.key, register.federation, earlier))
    gone = {entry.name for entry in register.entries if entry.state == "revoked" and not register.current(entry.name)}
    _write_new(broker / ACL, render_acl(register.federation, COORDINATOR_USER, barred=gone).encode())
    for folder in (kit, broker):
        _write_new(folder / CA_CERT, authority.bundle)
    sites = {entry.name: entry for entry in register.entries if entry.role == "site" and entry.state == "admitted"}
    roster = {f"{name}{kits.MEMBER_SUFFIX}": entry.member for name, entry in sites.items()}
    _publish_folder(kit / kits.ROSTER, kits.MEMBER_SUFFIX, roster)
    grants = {f"{name}{GRANT_SUFFIX}": grant_of(authority, entry) for name, entry in sites.items()}
    _publish_folder(kit / GRANTS, GRANT_SUFFIX, {name: data for name, data in grants.items() if data is not None})
    kept = {name for generation in register.cas.trusted for name in ca_files(generation)}
    kept |= {key_file(generation) for generation in register.keys.trusted}
    for path in sorted(authority.folder.iterdir()):
        if _GENERATION_FILE.fullmatch(path.name) and path.name not in kept:
            durable.remove(path)


def _publish_crl(authority: Authority, path: Path, revoked: dict[int, int]) -> None:
    """One list for each CA, in one file; they are signed anew only when they say something else than the file."""
    register = authority.register
    wanted = [(certificate.subject, register.number) for _key, certificate in authority.cas]
    if path.exists() and provision.crl_numbers(path.read_bytes()) == wanted:
        return
    lists = (
        provision.make_crl(ca, revoked, number=register.number, at=register.listed_at, days=AUTHORITY_DAYS)
        for ca in authority.cas
    )
    kits.write_private(path, b"".join(lists))


def _publish_folder(folder: Path, suffix: str, files: dict[str, bytes]) -> None:
    kits.make_private_folder(folder)
    for path in folder.glob(f"*{suffix}"):
        if path.name not in files:
            durable.remove(path)
    for name, data in files.items():
        _write_new(folder / name, data)


def _write_new(path: Path, data: bytes) -> None:
    if not path.exists() or path.read_bytes() != data:
        kits.write_private(path, data)
