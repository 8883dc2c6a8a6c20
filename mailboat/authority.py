"""Saying who takes part: an authority is made and opened, sites are admitted and revoked.

`mailboat.issuing` says what lies in its folder, `mailboat.renewing` how what was issued is renewed, `mailboat.rolling`
how another CA or another key takes over.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path, PurePath

from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import ValidationError

from broker import provision
from broker.production import production_config
from mailboat.enrolment import Request
from mailboat.issuing import (
    AUTHORITY_KEY,
    BROKER,
    COORDINATOR_KIT,
    GRANTS,
    REGISTER,
    SERVER_KEY,
    Authority,
    admit,
    admitted,
    commit,
    key_file,
    load_ca,
    make_ca,
    publish,
    renew_end,
)
from mailboat.register import Register
from mailboat.renewing import rotate_end
from shared.errors import ConfigError, CorruptError, RefusedError
from shared.trust import kit as kits

NO_SITE = frozenset({BROKER, "authority", "ca", "federation-key"})
"""What `mailboat provision rotate` calls something else."""


def create(
    folder: Path, federation: str, hosts: Sequence[str], *, port: int, broker_folder: PurePath, now: int
) -> Authority:
    """Make an authority with coordinator's kit and broker's folder; ConfigError when there is something in `folder`."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is not an empty folder", hint="an authority is made once; name a new folder")
    server_key = ec.generate_private_key(ec.SECP256R1())
    provision.check_hosts(hosts)  # before anything is written
    for made in (folder, folder / BROKER, folder / GRANTS):
        kits.make_private_folder(made)
    key = kits.generate_authority(folder / AUTHORITY_KEY)
    ca = make_ca(folder, federation, 1, now)
    kits.write_private(folder / BROKER / SERVER_KEY, kits.private_pem(server_key))
    kits.write_private(folder / BROKER / "mosquitto.conf", production_config(broker_folder, port).encode())
    kits.generate_keys(folder / COORDINATOR_KIT)
    register = Register(
        federation=federation, hosts=tuple(hosts), port=port, listed_at=now - provision.BACKDATED_S, number=1
    )
    authority = Authority(folder, (key,), (ca,), register)
    authority = renew_end(authority, "broker", server_key.public_key(), now=now)
    return rotate_end(authority, "coordinator", now=now)


def open_authority(folder: Path) -> Authority:
    """Read an authority's folder and bring what follows from its register in line; ConfigError, CorruptError."""
    if not (folder / REGISTER).exists():
        raise ConfigError(f"{folder} holds no authority", hint="`mailboat provision init` makes one")
    kits.check_private(folder)
    try:
        register = Register.model_validate_json(kits.read_private(folder / REGISTER))
    except ValidationError:
        raise CorruptError(f"{folder / REGISTER} is not a register", hint="restore it from the backup") from None
    keys = tuple(kits.load_authority(folder / key_file(generation)) for generation in register.keys.trusted)
    cas = tuple(load_ca(folder, generation) for generation in register.cas.trusted)
    authority = Authority(folder, keys, cas, register)
    publish(authority)
    return authority


def approve(authority: Authority, request: Request, *, days: int, now: int, replace: bool) -> tuple[Authority, Path]:
    """Admit a site, or renew it when it asks with the keys that it had; returns the grant's path.

    RefusedError when the name is taken by other keys (unless `replace`, which revokes those), or when one of the keys
    was revoked, whoever brings it.
    """
    if request.name in NO_SITE:
        raise RefusedError(
            f"no site may be named {request.name}", rule="name-taken", hint="the site chooses another name"
        )
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
    return admit(authority, request.name, keys, days=days, now=now)


def revoke(authority: Authority, name: str, *, now: int) -> Authority:
    """Take back everything that was ever issued to a site."""
    if admitted(authority, name).role != "site":
        raise ConfigError(
            f"{name} is not a site", hint=f"a {name} whose key is lost needs a new authority: `provision init`"
        )
    taken = {"state": "revoked", "revoked_at": now}
    entries = [
        entry.model_copy(update=taken) if entry.name == name and entry.state != "revoked" else entry
        for entry in authority.register.entries
    ]
    return commit(authority, entries, now=now, listed=True)


def rotate_federation_key(authority: Authority, *, now: int) -> Authority:
    """Sign the revocations anew: at the next number a running coordinator draws a new federation key."""
    return commit(authority, authority.register.entries, now=now, listed=True)


def unix_now() -> int:
    """The time in whole seconds."""
    return int(time.time())
