"""Another key of the authority, at the authority: its steps, what is signed by whom when, and death in mid-step."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from mailboat import authority as bench
from mailboat.commands.enroll import accept
from mailboat.commands.provision import list_command
from mailboat.commands.rotate import renew, rotate
from shared import durable
from shared.errors import ConfigError, RefusedError
from shared.trust import kit as kits
from shared.trust.document import to_json
from shared.trust.grant import check_renewal, holder_of, make_grant, parse_grant
from shared.trust.kit import load_kit, read_private
from shared.trust.membership import (
    Believed,
    public_bytes,
    sign_membership,
    stated_membership,
    verify_endorsements,
    verify_revocations,
)
from tests.unit.mailboat.test_provision import admit, fingerprint, folder
from tests.unit.mailboat.test_renewing import member, offered, renewed, take

__all__ = ["folder"]

Step = Callable[[Path], None]


def begin(folder: Path) -> None:
    """First step."""
    rotate("authority", folder=folder)


def take_over(folder: Path) -> None:
    """Second step."""
    renew(folder=folder, everybody=True)


def finish(folder: Path) -> None:
    """Third step."""
    rotate("authority", folder=folder, finish=True)


STEPS: tuple[Step, ...] = (begin, take_over, finish)


def keys(folder: Path) -> tuple[bytes, ...]:
    """Whom the coordinator believes."""
    return kits.load_authorities(folder / "coordinator-kit" / kits.AUTHORITY)


def believed(folder: Path) -> Believed:
    """Whom an auditor believes who has the coordinator's two files."""
    kit = folder / "coordinator-kit"
    listed = verify_endorsements(read_private(kit / kits.ENDORSEMENTS), keys(folder), federation="ward")
    return Believed(keys(folder), frozenset(listed.sha256))


def check_coordinator(folder: Path, *sites: str) -> None:
    """The coordinator's kit loads, admits these sites, and leaves no file out."""
    kit = load_kit(folder / "coordinator-kit", role="coordinator", federation="ward", now=bench.unix_now())
    peers = kit.peers()
    assert (set(peers.members), peers.unreadable) == (set(sites), {})


def test_a_roll_over_goes_in_its_order(folder: Path) -> None:
    """Each step refuses to come before the one that it needs; in the end one key is left, and everything is its own."""
    kit, (first,) = admit(folder), keys(folder)
    with pytest.raises(ConfigError, match="no roll-over"):
        finish(folder)
    begin(folder)
    assert keys(folder)[0] == first
    for step, behind in ((begin, "under way"), (finish, "everybody")):
        with pytest.raises(RefusedError, match=behind) as refused:
            step(folder)
        assert refused.value.rule == "roll-over"
    take_over(folder)
    second, other = keys(folder)
    assert other == first
    take(folder, kit)
    finish(folder)
    assert keys(folder) == (second,) == kits.load_authorities(kit / kits.AUTHORITY)
    assert sorted(path.name for path in folder.glob("authority*")) == ["authority-2.key"]
    check_coordinator(folder, "site-1")
    verify_revocations(read_private(folder / "coordinator-kit" / kits.REVOCATIONS), [second], federation="ward")
    assert load_kit(kit, role="site", federation="ward", now=bench.unix_now()).peers().members
    admit(folder, "site-2", "kit-2")
    take(folder, kit)


def test_a_second_key_signs_nothing_before_it_is_told_to(folder: Path) -> None:
    """Whoever is admitted or due meanwhile gets what the first one signs, and follows later through its word."""
    begin(folder)
    first = keys(folder)[0]
    kit = admit(folder)
    assert kits.load_authorities(kit / kits.AUTHORITY) == (first,)
    rotate("site-1", folder=folder)
    assert renewed(folder, 45)[1] == {"site-1"}
    assert parse_grant(offered(folder)["site-1"]).authority == first
    take_over(folder)
    take(folder, kit)
    assert kits.load_authorities(kit / kits.AUTHORITY) == (keys(folder)[0],)


def test_a_step_that_was_interrupted_is_gone_on_with_by_the_weekly_renewal(folder: Path) -> None:
    """A site that the second key has not reached yet is due, and the roll-over cannot end before."""
    admit(folder)
    admit(folder, "site-2", "kit-2")
    begin(folder)
    opened = bench.open_authority(folder)
    register = opened.register
    take_over(folder)
    entries = [
        *(entry for entry in register.entries if entry.name == "site-2"),
        *(entry for entry in bench.open_authority(folder).register.entries if entry.name != "site-2"),
    ]
    changed = bench.open_authority(folder).register.model_copy(update={"entries": tuple(entries)})
    (folder / "register.json").write_text(changed.model_dump_json())
    with pytest.raises(RefusedError, match="memberships of site-2"):
        finish(folder)
    assert renewed(folder, 0)[1] == {"site-2"}
    finish(folder)


def test_a_site_that_was_away_for_two_roll_overs_comes_back(folder: Path) -> None:
    """By the channel or by file, without a telephone call; one who knows neither key is refused."""
    kit, other = admit(folder), admit(folder, "site-2", "kit-2")
    for _ in range(2):
        for step in STEPS:
            step(folder)
    take(folder, kit)
    accept(folder / "grants" / "site-2.grant", kit=other)
    for each in (kit, other):
        assert load_kit(each, role="site", federation="ward", now=bench.unix_now()).peers().members
        assert kits.load_authorities(each / kits.AUTHORITY) == keys(folder)
    check_coordinator(folder, "site-1", "site-2")


def test_auditors_believe_what_was_signed_then_and_nothing_that_a_thief_signs_now(folder: Path) -> None:
    """Every membership that was ever issued, also superseded and revoked ones, and the coordinator's of each time."""
    admit(folder)
    thief = bench.open_authority(folder).key
    documents = [(folder / "coordinator-kit" / "member").read_bytes()]
    for name in ("site-1", "site-1", "site-2"):
        if name == "site-1":
            rotate(name, folder=folder)
        else:
            admit(folder, name, "kit-2")
        documents.append((folder / "coordinator-kit" / "roster" / f"{name}.member").read_bytes())
    for step in STEPS:
        step(folder)
    documents.append((folder / "coordinator-kit" / "member").read_bytes())
    for document in documents:
        assert believed(folder).membership(document, federation="ward") == stated_membership(document)
    forged = make_forged(thief, documents[0])
    with pytest.raises(RefusedError) as refused:
        believed(folder).membership(forged, federation="ward")
    assert refused.value.rule == "unknown-authority"


def make_forged(thief: Ed25519PrivateKey, document: bytes) -> bytes:
    """A membership for other keys, signed with a key of the authority."""
    return sign_membership(thief, stated_membership(document).model_copy(update={"sign_key": bytes(32)}))


def test_a_thief_of_the_key_before_reaches_no_kit_that_has_moved_on(folder: Path) -> None:
    """Its grants are refused under whatever date, also by file."""
    kit = admit(folder)
    thief = bench.open_authority(folder).key
    for step in (begin, take_over):
        step(folder)
    take(folder, kit)
    fields = parse_grant(offered(folder)["site-1"]).model_dump(exclude={"v", "authority", "signature", "introductions"})
    stolen = make_grant(thief, **{**fields, "authorities": kits.authority_pem([public_bytes(thief)]).decode()})
    with pytest.raises(RefusedError) as refused:
        check_renewal(to_json(stolen), holder_of(kit, "ward"), bench.unix_now())
    assert refused.value.rule == "unknown-authority"


def test_the_fingerprint_is_that_of_the_key_that_signs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is told when the second key takes over, and `list` counts the keys."""
    before = fingerprint(folder)
    begin(folder)
    assert fingerprint(folder) == before
    capsys.readouterr()
    take_over(folder)
    assert fingerprint(folder) != before
    assert fingerprint(folder) in capsys.readouterr().err
    list_command(folder=folder, as_json=True)
    assert json.loads(capsys.readouterr().out)["keys"] == [2, 1]


def test_a_register_of_an_earlier_release_rolls_over(folder: Path) -> None:
    """It names no key, and the coordinator's membership is in its kit alone: that is endorsed all the same."""
    kit = admit(folder)
    path = folder / "register.json"
    fields = json.loads(path.read_text())
    for name in ("key", "key_beside", "introductions"):
        del fields[name]
    for entry in fields["entries"]:
        del entry["key"]
        if entry["role"] == "coordinator":
            entry["member"] = ""
    path.write_text(json.dumps(fields))
    document = (folder / "coordinator-kit" / "member").read_bytes()
    for step in STEPS:
        step(folder)
    take(folder, kit)
    assert believed(folder).membership(document, federation="ward").role == "coordinator"


class DeathError(BaseException):
    """The process is killed."""


@pytest.fixture
def dying(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Call it with a number, and the process dies after so many more changes of files; -1: it lives."""
    left = [-1]

    def counted(change: Callable[..., None]) -> Callable[..., None]:
        def changed(*arguments: object) -> None:
            if not left[0]:
                raise DeathError
            left[0] -= 1
            change(*arguments)

        return changed

    def set_to(count: int) -> None:
        left[0] = count

    monkeypatch.setattr(kits, "write_private", counted(kits.write_private))
    monkeypatch.setattr(durable, "remove", counted(durable.remove))
    return set_to


@pytest.mark.parametrize("number", range(len(STEPS)))
def test_death_at_any_moment_leaves_what_works_and_can_be_gone_on_with(
    folder: Path, tmp_path: Path, number: int, dying: Callable[[int], None]
) -> None:
    """Killed after any change of any file, the coordinator's kit is whole at once, and the roll-over comes to its end.

    The step is taken again, or told that it was done when only the writing down of what follows had been cut short.
    """
    kit = admit(folder)
    first = (folder / "coordinator-kit" / "member").read_bytes()
    for step in STEPS[:number]:
        step(folder)
    shutil.copytree(folder, tmp_path / "before")
    shutil.copytree(kit, tmp_path / "kit-before")
    for changes in itertools.count():
        dying(changes)
        try:
            STEPS[number](folder)
        except DeathError:
            dying(-1)
        else:
            break
        check_coordinator(folder, "site-1")  # before the authority has mended anything
        with contextlib.suppress(RefusedError, ConfigError):
            STEPS[number](folder)
        for step in STEPS[number + 1 :]:
            step(folder)
        renew(folder=folder)
        check_coordinator(folder, "site-1")
        assert len(keys(folder)) == len([*folder.glob("authority*.key")]) == 1
        assert believed(folder).membership(first, federation="ward").role == "coordinator"
        take(folder, kit)
        assert kits.load_authorities(kit / kits.AUTHORITY) == keys(folder)
        assert stated_membership(read_private(kit / kits.MEMBER)) == member(folder)
        for lived, before in ((folder, "before"), (kit, "kit-before")):
            shutil.rmtree(lived)
            shutil.copytree(tmp_path / before, lived)
    assert changes >= 3
