"""The kit's folder: made closed, refused when it is open, and every file checked before anything is believed."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from shared.errors import ConfigError
from shared.trust.kit import (
    AUTHORITY,
    BOX_KEY,
    COORDINATOR,
    MEMBER,
    REVOCATIONS,
    ROSTER,
    SIGN_KEY,
    TLS_KEY,
    Kit,
    authority_pem,
    generate_authority,
    generate_keys,
    load_authorities,
    load_kit,
    write_private,
)
from shared.trust.membership import Revocations, public_bytes, sign_membership, sign_revocations
from tests.kits import Kits

NOW = 1_000.0


@pytest.fixture
def kits(tmp_path: Path) -> Kits:
    """A federation of two sites."""
    made = Kits(tmp_path)
    made.site("north")
    made.site("south")
    return made


def _load(folder: Path) -> Kit:
    return load_kit(folder, role="site", federation="ward", now=NOW)


def test_keys_are_made_closed_and_never_replaced(tmp_path: Path) -> None:
    """The folder is 0700, each key 0600, whatever the umask; a second call leaves the first keys alone."""
    before = os.umask(0)
    try:
        generate_keys(tmp_path / "kit")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "kit").stat().st_mode) == 0o700
    kept = {name: (tmp_path / "kit" / name).read_bytes() for name in (SIGN_KEY, BOX_KEY, TLS_KEY)}
    assert {stat.S_IMODE((tmp_path / "kit" / name).stat().st_mode) for name in kept} == {0o600}
    with pytest.raises(ConfigError, match="there already"):
        generate_keys(tmp_path / "kit")
    assert {name: (tmp_path / "kit" / name).read_bytes() for name in kept} == kept


def test_an_authority_is_never_replaced(tmp_path: Path) -> None:
    """Its key file is 0600 and stays."""
    generate_authority(tmp_path / "authority.key")
    assert stat.S_IMODE((tmp_path / "authority.key").stat().st_mode) == 0o600
    with pytest.raises(ConfigError, match="there already"):
        generate_authority(tmp_path / "authority.key")


def test_a_site_believes_its_coordinator_and_the_coordinator_its_roster(kits: Kits) -> None:
    """Both kits load, and name each other."""
    site = _load(kits.folder("north"))
    coordinator = load_kit(kits.coordinator, role="coordinator", federation="ward", now=NOW)
    assert site.peers().members == {"coordinator": coordinator.member}
    assert set(coordinator.peers().members) == {"north", "south"}
    assert coordinator.peers().members["north"] == site.member


@pytest.mark.parametrize("name", ["", SIGN_KEY, BOX_KEY, TLS_KEY, MEMBER, AUTHORITY, COORDINATOR])
@pytest.mark.parametrize("extra", [0o040, 0o004, 0o020, 0o001])
def test_a_wider_mode_is_refused(kits: Kits, name: str, extra: int) -> None:
    """Whatever group or others may do to the folder or any file in it, the kit is refused with the file's name."""
    path = kits.folder("north") / name
    path.chmod(stat.S_IMODE(path.stat().st_mode) | extra)
    with pytest.raises(ConfigError) as refused:
        _load(kits.folder("north"))
    assert str(path) in refused.value.message
    assert "chmod" in refused.value.hint


def test_a_link_is_refused(kits: Kits, tmp_path: Path) -> None:
    """A key behind a link has another folder's modes."""
    path = kits.folder("north") / SIGN_KEY
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="is a link"):
        _load(kits.folder("north"))


def _other_keys(kits: Kits) -> None:
    write_private(kits.folder("north") / MEMBER, (kits.folder("south") / MEMBER).read_bytes())


def _other_role(kits: Kits) -> None:
    member = kits.membership("north", "coordinator")
    write_private(kits.folder("north") / MEMBER, sign_membership(kits.authority, member))


def _run_out(kits: Kits) -> None:
    member = kits.membership("north", "site", not_after=int(NOW) - 1)
    write_private(kits.folder("north") / MEMBER, sign_membership(kits.authority, member))


def _no_key(kits: Kits) -> None:
    (kits.folder("north") / BOX_KEY).unlink()


def _garbage_key(kits: Kits) -> None:
    write_private(kits.folder("north") / SIGN_KEY, b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n")


def _swapped_keys(kits: Kits) -> None:
    folder = kits.folder("north")
    write_private(folder / SIGN_KEY, (folder / BOX_KEY).read_bytes())


def _stranger(kits: Kits) -> None:
    other = generate_authority(kits.root / "other.key")
    write_private(kits.folder("north") / AUTHORITY, authority_pem([public_bytes(other)]))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_other_keys, "other keys"),
        (_other_role, "membership of a coordinator"),
        (_run_out, "valid from"),
        (_no_key, "no such file"),
        (_garbage_key, "not a private key"),
        (_swapped_keys, "no Ed25519 key"),
        (_stranger, "no authority of ours"),
    ],
)
def test_a_kit_that_does_not_fit_together_is_refused(kits: Kits, spoil: Callable[[Kits], None], said: str) -> None:
    """Each spoilt kit is refused at the start, with the file and what is wrong with it."""
    spoil(kits)
    with pytest.raises(ConfigError, match=said):
        _load(kits.folder("north"))


def test_one_broken_membership_does_not_lock_the_others_out(kits: Kits) -> None:
    """Files that are altered, misnamed or open to others are left out, each with its reason."""
    roster = kits.coordinator / ROSTER
    write_private(roster / "east.member", (roster / "north.member").read_bytes())
    write_private(roster / "west.member", b"garbage")
    (roster / "south.member").chmod(0o644)
    peers = load_kit_loosely(kits).peers()
    assert set(peers.members) == {"north"}
    assert set(peers.unreadable) == {"east", "south", "west"}
    assert all(f"{name}.member" in reason for name, reason in peers.unreadable.items())


def load_kit_loosely(kits: Kits) -> Kit:
    """The coordinator's kit as it is read before a file in it is spoilt."""
    spoilt = kits.coordinator / ROSTER / "south.member"
    mode = spoilt.stat().st_mode
    spoilt.chmod(0o600)
    kit = load_kit(kits.coordinator, role="coordinator", federation="ward", now=NOW)
    spoilt.chmod(mode)
    return kit


def test_a_list_that_the_authority_did_not_sign_is_an_error(kits: Kits) -> None:
    """Leaving a broken list out would admit whom it names."""
    kit = load_kit(kits.coordinator, role="coordinator", federation="ward", now=NOW)
    other = generate_authority(kits.root / "other.key")
    forged = sign_revocations(other, Revocations(federation="ward", number=9))
    write_private(kits.coordinator / REVOCATIONS, forged)
    with pytest.raises(ConfigError, match="no authority of ours"):
        kit.peers()


def test_the_stamp_changes_with_each_file_that_is_read(kits: Kits) -> None:
    """Another file of the authority's keys, a new member, a member that goes and a new list are each seen."""
    kit = load_kit(kits.coordinator, role="coordinator", federation="ward", now=NOW)
    stamps = [kit.stamp()]
    for change in (
        lambda: write_private(kits.coordinator / AUTHORITY, (kits.coordinator / AUTHORITY).read_bytes()),
        lambda: kits.site("east"),
        lambda: kits.revoke("north"),
        (kits.coordinator / ROSTER / "east.member").unlink,
    ):
        change()
        stamps.append(kit.stamp())
    assert len(set(stamps)) == 5
    assert kit.stamp() == stamps[-1]


def test_as_many_authorities_as_a_roll_over_can_leave_and_no_more(tmp_path: Path) -> None:
    """`authority.pub` holds one key, two, or what an interrupted roll-over left and one more."""
    publics = [public_bytes(generate_authority(tmp_path / f"{number}.key")) for number in range(4)]
    path = tmp_path / AUTHORITY
    for count in (1, 2, 3):
        write_private(path, authority_pem(publics[:count]))
        assert load_authorities(path) == tuple(publics[:count])
    for wrong in (authority_pem(publics), b"", b"-----END PUBLIC KEY-----"):
        write_private(path, wrong)
        with pytest.raises(ConfigError):
            load_authorities(path)
