"""Renewing what an authority has issued, in time or because another CA or another key has taken over."""

from __future__ import annotations

import dataclasses
from typing import Any

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
    coordinators_membership,
    grant_of,
    renew_end,
    superseded,
)
from mailboat.register import Entry
from shared.errors import ConfigError, RefusedError
from shared.trust import kit as kits
from shared.trust.membership import ends_soon, stated_membership


def rotate_site(authority: Authority, name: str, *, days: int | None, now: int) -> Authority:
    """Renew an admitted site's membership and certificate for the keys that it has, for `days` or as long as before."""
    entry = admitted(authority, name)
    if entry.role != "site" or entry.sign_key is None or entry.box_key is None:
        raise ConfigError(f"{entry.name} is not a site", hint="`mailboat provision list` names the sites")
    keys = (entry.sign_key, entry.box_key, entry.tls_key)
    renewed, _path = admit(authority, name, keys, days=days or _days_of(entry), now=now)
    return renewed


def rotate_end(authority: Authority, name: End, *, now: int) -> Authority:
    """Renew the certificate of the coordinator or of the broker for the key that it has.

    RefusedError(rule='roll-over') for the broker's as long as a site's certificate is of the CA before.
    """
    if name == "broker" and (behind := [each for each in of_earlier_ca(authority) if each != "broker"]):
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
    """Renew whoever has less than a third of the time left, is of an earlier CA or key, or has no grant; and who was.

    A site's new time is `days`, or as long as before. With `everybody`, all sites and the coordinator, and a CA or key
    that waits to take over does so now. The broker's certificate, which sites have to be able to verify, is left to
    `rotate_end` as long as the CA before is trusted.
    """
    if everybody:
        authority = _taken_over(authority, now=now)
    behind, names = {*of_earlier_ca(authority), *of_earlier_key(authority)}, []
    for entry in [each for each in authority.register.entries if each.state == "admitted"]:
        if entry.role == "broker":
            due = authority.register.cas.before is None and _ends_soon(entry, now)
        else:
            lost = entry.role == "site" and grant_of(authority, entry) is None
            due = everybody or lost or entry.name in behind or _ends_soon(entry, now)
        if not due:
            continue
        if entry.role == "site":
            authority = rotate_site(authority, entry.name, days=days, now=now)
        else:
            authority = rotate_end(authority, entry.role, now=now)
        names.append(entry.name)
    return authority, tuple(names)


def _taken_over(authority: Authority, *, now: int) -> Authority:
    """With the CA and the key that wait, if any, in the place of those that issued and signed so far.

    With another key the coordinator's membership is signed anew in the same step, because it is part of each grant.
    """
    register = authority.register
    changes: dict[str, Any] = {}
    entries = list(register.entries)
    if register.cas.next is not None:
        authority = dataclasses.replace(authority, cas=authority.cas[::-1])
        changes |= {"ca": register.cas.next, "ca_beside": register.ca}
    if register.keys.next is not None:
        authority = dataclasses.replace(authority, keys=authority.keys[::-1])
        changes |= {"key": register.keys.next, "key_beside": register.key}
        member = {"member": coordinators_membership(authority, now), "key": register.keys.next}
        signed_anew = admitted(authority, "coordinator").model_copy(update=member)
        entries = [*superseded(authority, "coordinator"), signed_anew]
    return commit(authority, entries, now=now, **changes) if changes else authority


def of_earlier_ca(authority: Authority) -> list[str]:
    """Who counts by a certificate of an earlier CA."""
    register = authority.register
    return [entry.name for entry in register.entries if entry.state == "admitted" and entry.ca != register.ca]


def of_earlier_key(authority: Authority) -> list[str]:
    """Who counts by a membership that an earlier key has signed."""
    register = authority.register
    return [
        entry.name
        for entry in register.entries
        if entry.state == "admitted" and entry.role != "broker" and entry.key != register.key
    ]


def _ends_soon(entry: Entry, now: int) -> bool:
    if entry.role == "site":
        return stated_membership(entry.member).ends_soon(now)
    return ends_soon(entry.not_after - COORDINATOR_DAYS * DAY_S, entry.not_after, now)


def _days_of(entry: Entry) -> int:
    member = stated_membership(entry.member)
    return (member.not_after - member.not_before) // DAY_S
