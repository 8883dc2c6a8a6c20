"""Rolling over: another TLS CA, or another key of the authority, takes the place of the one before.

Each goes in steps, and none may come before everybody has what the one before it has made.

    begin_ca       a second CA, trusted and not issuing yet               then: the broker's files, and its reload
    renew, for all it issues: sites and coordinator, and they trust both  then: the sites take their grants
    rotate_end     the broker's certificate is of the new CA              then: the broker's file, and its reload
    finish_ca      everybody trusts the new CA alone; the old key goes    then: the broker's files, and its reload

    begin_key      a second key, believed and not signing yet             then: the coordinator's authority.pub
    renew, for all it signs: memberships, lists and grants                then: the coordinator's files
    finish_key     it alone is believed; the old key goes                 then: authority.pub and endorsements

So nobody is ever shown a certificate or a signature of one whom he does not know, and a timer that renews whoever is
due may go on meanwhile. What comes too early for what the register says is refused. The register cannot say which site
has taken its grant, as `mailboat status` at the coordinator does. A site that has not is cut off by another CA, and by
another key it is not: its grant, whenever it comes, says how that key came after the one that it knows.
"""

from __future__ import annotations

import dataclasses

from mailboat.issuing import Authority, commit, coordinators_document, key_file, make_ca
from mailboat.register import Entry, Generations
from mailboat.renewing import of_earlier_ca, of_earlier_key, rotate_site
from shared.errors import ConfigError, RefusedError
from shared.trust import kit as kits
from shared.trust.membership import public_bytes
from shared.trust.succession import MAX_INTRODUCTIONS, introduce


def begin_ca(authority: Authority, *, now: int) -> Authority:
    """Make a second CA, which is trusted from now on; RefusedError(rule='roll-over') during another roll-over."""
    register = authority.register
    _check_begin(register.cas, "ca")
    made = make_ca(authority.folder, register.federation, register.ca + 1, now)
    authority = dataclasses.replace(authority, cas=(*authority.cas, made))
    return commit(authority, register.entries, now=now, ca_beside=register.ca + 1)


def finish_ca(authority: Authority, *, now: int) -> Authority:
    """Drop the CA before, delete its key, and renew all sites without it.

    ConfigError when there is no roll-over, RefusedError(rule='roll-over') when a certificate of the old CA counts yet.
    """
    register = authority.register
    _check_finish(
        register.cas,
        of_earlier_ca(authority),
        ("ca", "certificates"),
        hint="`mailboat provision renew --all` for sites and coordinator, then `mailboat provision rotate broker`",
    )
    authority = dataclasses.replace(authority, cas=authority.cas[:1])
    authority = commit(authority, register.entries, now=now, ca_beside=None)
    for entry in [each for each in register.entries if each.role == "site" and each.state == "admitted"]:
        authority = rotate_site(authority, entry.name, days=None, now=now)
    return authority


def begin_key(authority: Authority, *, now: int) -> Authority:
    """Make a second key, believed from now on; RefusedError(rule='roll-over') during another roll-over.

    The key before introduces it, while it is there to do so.
    """
    register = authority.register
    _check_begin(register.keys, "authority")
    generation = register.key + 1
    made = kits.generate_authority(authority.folder / key_file(generation))
    word = introduce(authority.key, public_bytes(made), register.federation)
    words = (*register.introductions, word)[-MAX_INTRODUCTIONS:]
    authority = dataclasses.replace(authority, keys=(*authority.keys, made))
    entries = [_with_document(authority, entry) for entry in register.entries]
    return commit(authority, entries, now=now, key_beside=generation, introductions=words)


def finish_key(authority: Authority, *, now: int) -> Authority:
    """Drop the key before and delete it; what it has signed counts for auditors alone, document by document.

    ConfigError when there is no roll-over, RefusedError(rule='roll-over') when a membership counts that it has signed.
    """
    register = authority.register
    _check_finish(
        register.keys,
        of_earlier_key(authority),
        ("authority", "memberships"),
        hint="`mailboat provision renew --all` for sites and coordinator",
    )
    authority = dataclasses.replace(authority, keys=authority.keys[:1])
    return commit(authority, register.entries, now=now, key_beside=None)


def _check_begin(generations: Generations, what: str) -> None:
    if generations.beside is not None:
        raise RefusedError(
            "a roll-over is under way", rule="roll-over", hint=f"end it: `mailboat provision rotate {what} --finish`"
        )


def _check_finish(generations: Generations, behind: list[str], names: tuple[str, str], *, hint: str) -> None:
    what, issued = names
    if generations.beside is None:
        raise ConfigError("no roll-over is under way", hint=f"`mailboat provision rotate {what}` begins one")
    if generations.next is not None:
        behind = ["everybody"]
    if behind:
        raise RefusedError(f"the {issued} of {', '.join(behind)} are of the one before", rule="roll-over", hint=hint)


def _with_document(authority: Authority, entry: Entry) -> Entry:
    """With the coordinator's membership, which an earlier release did not write down: it is to be endorsed later."""
    if entry.role != "coordinator" or entry.state != "admitted":
        return entry
    return entry.model_copy(update={"member": coordinators_document(authority, entry)})
