"""Renewing what an authority has issued, and rolling over to another TLS CA.

A roll-over goes in four steps, and none may come before everybody has what the one before it has made:

    begin_ca       a second CA, trusted and not issuing yet               then: the broker's files, and its reload
    renew, for all it issues: sites and coordinator, and they trust both  then: the sites take their grants
    rotate_end     the broker's certificate is of the new CA              then: the broker's file, and its reload
    finish_ca      everybody trusts the new CA alone; the old key goes    then: the broker's files, and its reload

So nobody ever shows a certificate of a CA that the other side does not have, and a timer that renews whoever is due may
go on meanwhile. `rotate_end` and `finish_ca` refuse to run before the register says that nobody depends on the old CA
any more. What the register cannot say is which site has taken its grant; the coordinator's `mailboat status` does.
"""

from __future__ import annotations

import dataclasses

from broker import provision
from mailboat.issuing import (
    BROKER,
    COORDINATOR_DAYS,
    COORDINATOR_KIT,
    DAY_S,
    SERVER_KEY,
    Authority,
    End,
    admit,
    admitted,
    commit,
    grant_of,
    make_ca,
    renew_end,
)
from mailboat.register import Entry
from shared.errors import ConfigError, RefusedError
from shared.trust import kit as kits
from shared.trust.membership import ends_soon, stated_membership


def rotate_site(authority: Authority, name: str, *, days: int, now: int) -> Authority:
    """Renew an admitted site's membership and certificate for the keys that it has."""
    return _renew_site(authority, admitted(authority, name), days=days, now=now)


def rotate_end(authority: Authority, name: End, *, now: int) -> Authority:
    """Renew the certificate of the coordinator or of the broker for the key that it has.

    RefusedError(rule='roll-over') for the broker's as long as a site's certificate is of the CA before.
    """
    if name == "broker" and (behind := [each for each in _behind(authority) if each != "broker"]):
        raise RefusedError(
            f"the broker's certificate would be of a CA that is not in the kits of {', '.join(behind)} yet",
            rule="roll-over",
            hint="`mailboat provision renew --all`, and wait until `mailboat status` at the coordinator names nobody",
        )
    path = authority.folder / (COORDINATOR_KIT if name == "coordinator" else BROKER)
    path /= kits.TLS_KEY if name == "coordinator" else SERVER_KEY
    key = provision.load_p256(kits.read_private(path), where=str(path)).public_key()
    return renew_end(authority, name, key, now=now)


def renew(
    authority: Authority, *, days: int | None, now: int, everybody: bool = False
) -> tuple[Authority, tuple[str, ...]]:
    """Renew whoever has less than a third of the time left, is of the CA before, or has no grant; returns who too.

    A site's new time is `days`, or as long as before. With `everybody`, all sites and the coordinator, and a CA that
    waits to issue does so from now on. The broker's certificate, which sites have to be able to verify, is left to
    `rotate_end` as long as the CA before is trusted.
    """
    if everybody and authority.register.next_ca is not None:
        authority = dataclasses.replace(authority, cas=authority.cas[::-1])
        register = authority.register
        authority = commit(authority, register.entries, now=now, ca=register.next_ca, ca_beside=register.ca)
    behind, names = _behind(authority), []
    for entry in [each for each in authority.register.entries if each.state == "admitted"]:
        if entry.role == "broker":
            due = authority.register.ca_before is None and _ends_soon(entry, now)
        else:
            lost = entry.role == "site" and grant_of(authority, entry) is None
            due = everybody or lost or entry.name in behind or _ends_soon(entry, now)
        if not due:
            continue
        if entry.role == "site":
            authority = _renew_site(authority, entry, days=days or _days_of(entry), now=now)
        else:
            authority = rotate_end(authority, entry.role, now=now)
        names.append(entry.name)
    return authority, tuple(names)


def begin_ca(authority: Authority, *, now: int) -> Authority:
    """Make a second CA, which is trusted from now on; RefusedError(rule='roll-over') during another roll-over."""
    register = authority.register
    if register.ca_beside is not None:
        raise RefusedError(
            "a roll-over to another CA is under way",
            rule="roll-over",
            hint="end it: `mailboat provision rotate ca --finish`",
        )
    made = make_ca(authority.folder, register.federation, register.ca + 1, now)
    authority = dataclasses.replace(authority, cas=(*authority.cas, made))
    return commit(authority, register.entries, now=now, ca_beside=register.ca + 1)


def finish_ca(authority: Authority, *, now: int) -> Authority:
    """Drop the CA before, delete its key, and renew all sites without it.

    ConfigError when there is no roll-over, RefusedError(rule='roll-over') when a certificate of the old CA counts yet.
    """
    register = authority.register
    if register.ca_beside is None:
        raise ConfigError("no roll-over is under way", hint="`mailboat provision rotate ca` begins one")
    behind = ["everybody"] if register.next_ca is not None else _behind(authority)
    if behind:
        raise RefusedError(
            f"the certificates of {', '.join(behind)} are of the CA before",
            rule="roll-over",
            hint="`mailboat provision renew --all` for sites and coordinator, then `mailboat provision rotate broker`",
        )
    authority = dataclasses.replace(authority, cas=authority.cas[:1])
    authority = commit(authority, register.entries, now=now, ca_beside=None)
    for entry in [each for each in register.entries if each.role == "site" and each.state == "admitted"]:
        authority = _renew_site(authority, entry, days=_days_of(entry), now=now)
    return authority


def _renew_site(authority: Authority, entry: Entry, *, days: int, now: int) -> Authority:
    if entry.role != "site" or entry.sign_key is None or entry.box_key is None:
        raise ConfigError(f"{entry.name} is not a site", hint="`mailboat provision list` names the sites")
    renewed, _path = admit(authority, entry.name, (entry.sign_key, entry.box_key, entry.tls_key), days=days, now=now)
    return renewed


def _behind(authority: Authority) -> list[str]:
    """Who counts by a certificate of an earlier CA."""
    register = authority.register
    return [entry.name for entry in register.entries if entry.state == "admitted" and entry.ca != register.ca]


def _ends_soon(entry: Entry, now: int) -> bool:
    if entry.role == "site":
        return stated_membership(entry.member).ends_soon(now)
    return ends_soon(entry.not_after - COORDINATOR_DAYS * DAY_S, entry.not_after, now)


def _days_of(entry: Entry) -> int:
    member = stated_membership(entry.member)
    return (member.not_after - member.not_before) // DAY_S
