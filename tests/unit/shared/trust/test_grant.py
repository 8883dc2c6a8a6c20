"""A renewal is taken when it is the authority's, for exactly this kit, and later; anything else breaks a named rule."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from broker import provision
from shared.errors import RefusedError
from shared.trust import kit as kit_files
from shared.trust.document import to_json
from shared.trust.grant import Holder, check_grant, check_renewal, holder_of, install, is_here, parse_grant
from shared.trust.kit import authority_pem, check_kit_modes, load_kit
from shared.trust.membership import public_bytes
from shared.trust.succession import introduce
from tests.grants import DAYS, ISSUED, GrantBench, of_strange_version, other_authority
from tests.kits import Kits

GOLDEN = Path(__file__).parents[3] / "golden" / "trust"
Spoil = Callable[[GrantBench, Path], bytes]


@pytest.fixture
def bench(tmp_path: Path) -> GrantBench:
    """An authority, its coordinator, and the sites north and south."""
    made = Kits(tmp_path)
    made.site("north")
    made.site("south")
    return GrantBench(made)


def holder(bench: GrantBench) -> Holder:
    """North, with the membership that it has."""
    return holder_of(bench.kits.folder("north"), "ward")


def rule(bench: GrantBench, data: bytes, now: float = ISSUED) -> str:
    """The rule under which north refuses it; fails when it does not."""
    with pytest.raises(RefusedError) as refused:
        check_renewal(data, holder(bench), now)
    return refused.value.rule


def test_a_renewal_is_installed_whole_and_private(bench: GrantBench) -> None:
    """The kit loads with the new membership, its keys are those from before, and every file is 0600."""
    kit = bench.kits.folder("north")
    keys = kit_files.public_keys(kit), kit_files.tls_point(kit)
    data = bench.grant("north")
    grant = check_renewal(data, holder(bench), ISSUED)
    assert not is_here(kit, grant)
    install(kit, grant)
    assert is_here(kit, grant)
    assert load_kit(kit, role="site", federation="ward", now=ISSUED).member == bench.member("north")
    assert (kit_files.public_keys(kit), kit_files.tls_point(kit)) == keys
    check_kit_modes(kit)
    assert stat.S_IMODE((kit / kit_files.TLS_CERT).stat().st_mode) == 0o600
    assert check_renewal(data, holder(bench), ISSUED) == grant


def altered(field: str) -> Spoil:
    """A sound grant of which one field was changed on its way."""

    def spoil(bench: GrantBench, _root: Path) -> bytes:
        fields, other = json.loads(bench.grant("north")), json.loads(bench.grant("south"))
        spoilt = {"ca": fields["ca"] + "\n", "authorities": fields["authorities"] * 2, "coordinator": other["member"]}
        fields[field] = spoilt.get(field, other[field])
        return json.dumps(fields).encode()

    return spoil


def made(**changes: Any) -> Spoil:
    """A grant that the authority itself signed so."""
    return lambda bench, _root: bench.grant("north", **changes)


def dated(**changes: Any) -> Spoil:
    """A grant of a membership with other fields."""
    return lambda bench, _root: bench.grant("north", member=bench.member("north", **changes))


def by_another(bench: GrantBench, root: Path) -> bytes:
    """A forger's own authority, with everything signed by it."""
    return bench.grant("north", key=other_authority(root), signer=other_authority(root))


def with_member_of_another(bench: GrantBench, root: Path) -> bytes:
    """The authority's grant around a membership that it did not sign."""
    return bench.grant("north", signer=other_authority(root))


def with_more_authorities(bench: GrantBench, root: Path) -> bytes:
    """A grant that would have the kit believe a key besides the one that signed it."""
    both = authority_pem([public_bytes(bench.kits.authority), public_bytes(other_authority(root))])
    return bench.grant("north", authorities=both.decode())


def certified(**how: Any) -> Spoil:
    """A grant with another certificate."""
    return lambda bench, _root: bench.grant("north", certificate=bench.certificate(**{"name": "north", **how}))


def for_souths_key(bench: GrantBench, _root: Path) -> bytes:
    """A certificate in the name of north for the key of south."""
    key = bench.kits.folder("south") / kit_files.TLS_KEY
    return bench.grant("north", certificate=bench.certificate("north", key=key))


def of_another_ca(bench: GrantBench, _root: Path) -> bytes:
    """A certificate that the CA beside it has not issued."""
    return bench.grant("north", certificate=bench.certificate("north", ca=bench.other_ca))


def with_three_cas(bench: GrantBench, _root: Path) -> bytes:
    """More CAs than a roll-over has."""
    pem = provision.certificate_pem(bench.ca[1]).decode()
    return bench.grant("north", ca=pem * 3)


def with_strange_version(bench: GrantBench, _root: Path) -> bytes:
    """Found by fuzzing."""
    return bench.grant("north", certificate=of_strange_version(bench.certificate("north")))


@pytest.mark.parametrize(
    ("spoil", "broken"),
    [
        (lambda _bench, _root: b"", "bad-document"),
        (lambda _bench, _root: b"{}", "bad-document"),
        (lambda _bench, _root: b" " * 100_001, "bad-document"),
        *((altered(field), "bad-signature") for field in ("name", "member", "certificate", "ca", "coordinator")),
        *((altered(field), "bad-signature") for field in ("authorities", "signature")),
        (by_another, "unknown-authority"),
        (with_member_of_another, "unknown-authority"),
        (with_more_authorities, "other-authorities"),
        (made(federation="other"), "other-federation"),
        (dated(federation="other"), "other-federation"),
        (lambda bench, _root: bench.grant("south"), "other-site"),
        (dated(name="south"), "mixed-up"),
        (dated(role="coordinator"), "mixed-up"),
        (dated(sign_key=bytes(32)), "other-keys"),
        (dated(box_key=bytes(32)), "other-keys"),
        (for_souths_key, "other-keys"),
        (made(certificate="x"), "bad-certificate"),
        (made(ca=""), "bad-certificate"),
        (with_strange_version, "bad-certificate"),
        (certified(serial=4712), "bad-certificate"),
        (of_another_ca, "bad-certificate"),
        (with_three_cas, "bad-certificate"),
        (lambda bench, _root: bench.grant("north", certificate=bench.certificate("south")), "bad-certificate"),
        (dated(not_before=ISSUED + 301, not_after=ISSUED + 900), "not-valid-now"),
        (dated(not_before=0, not_after=ISSUED - 1), "not-valid-now"),
        (dated(not_before=0), "not-newer"),
    ],
)
def test_what_is_not_this_sites_renewal_is_refused(
    bench: GrantBench, tmp_path: Path, spoil: Spoil, broken: str
) -> None:
    """Hand-made, forged, stale, for another site, for other keys: each is refused under its rule."""
    assert rule(bench, spoil(bench, tmp_path)) == broken


def test_an_older_grant_is_refused_after_a_newer_one(bench: GrantBench) -> None:
    """Whoever kept an old grant cannot bring an old certificate back, though it would count yet."""
    old = bench.grant("north", member=bench.member("north", not_before=ISSUED - 4000))
    install(bench.kits.folder("north"), check_renewal(bench.grant("north"), holder(bench), ISSUED))
    assert rule(bench, old) == "not-newer"


def test_a_grant_of_an_earlier_release_is_read() -> None:
    """The golden file is one that is out there; signing certificates is random, so it is read and not compared."""
    data = (GOLDEN / "north.grant").read_bytes()
    grant = parse_grant(data)
    assert (grant.v, grant.name, grant.federation) == (1, "north", "ward")
    assert to_json(grant) == data


def test_two_cas_may_come_together(bench: GrantBench) -> None:
    """During a roll-over both are in the bundle, and the certificate may be of either."""
    for first, second in ((bench.ca, bench.other_ca), (bench.other_ca, bench.ca)):
        both = "".join(provision.certificate_pem(each[1]).decode() for each in (first, second))
        data = bench.grant("north", ca=both, certificate=bench.certificate("north", ca=first))
        assert check_renewal(data, holder(bench), ISSUED + DAYS * 86_400).ca == both


def test_a_grant_by_file_may_be_the_first(bench: GrantBench) -> None:
    """`check_grant` asks for the right keys alone: who the authority is, a person says."""
    kit = bench.kits.folder("north")
    granted = check_grant(parse_grant(bench.grant("north")), kit_files.public_keys(kit), kit_files.tls_point(kit))
    assert (granted.member.name, granted.coordinator.role) == ("north", "coordinator")


@pytest.mark.parametrize("another_key", [False, True], ids=["same key", "another key"])
@pytest.mark.parametrize("stopped_after", range(6))
def test_an_interrupted_installation_leaves_a_kit_that_works(
    bench: GrantBench, stopped_after: int, another_key: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between any two files the kit loads, and the same grant is taken again and finishes it."""
    if another_key:
        bench.roll_over()
    kit, data = bench.kits.folder("north"), bench.grant("north")
    left = [stopped_after]
    write = kit_files.write_private

    def dying(path: Path, content: bytes) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        write(path, content)

    grant = check_renewal(data, holder(bench), ISSUED)
    monkeypatch.setattr(kit_files, "write_private", dying)
    if stopped_after == 5 and not another_key:  # one file less
        install(kit, grant)
    else:
        with pytest.raises(KeyboardInterrupt):
            install(kit, grant)
    monkeypatch.undo()
    assert load_kit(kit, role="site", federation="ward", now=ISSUED).peers().members
    install(kit, check_renewal(data, holder(bench), ISSUED))
    assert is_here(kit, grant)
    assert load_kit(kit, role="site", federation="ward", now=ISSUED).member == bench.member("north")
    assert kit_files.load_authorities(kit / kit_files.AUTHORITY) == (public_bytes(bench.kits.authority),)


# -- another key of the authority ---


def test_another_key_is_believed_through_the_one_before(bench: GrantBench) -> None:
    """A kit that slept through two roll-overs takes the third key's grant, and what the first signs counts no more."""
    kit, first = bench.kits.folder("north"), bench.roll_over()
    second = bench.roll_over()
    data = bench.grant("north")
    assert json.loads(data)["v"] == 2
    install(kit, check_renewal(data, holder(bench), ISSUED))
    assert load_kit(kit, role="site", federation="ward", now=ISSUED).peers().members
    for thief in (first, second):
        later = bench.member("north", not_before=ISSUED, serial=4711)
        stolen = bench.grant("north", key=thief, signer=thief, member=later)
        assert rule(bench, stolen) == "unknown-authority"


def test_nobody_introduces_itself(bench: GrantBench, tmp_path: Path) -> None:
    """Without the word of a key that the kit knows, another one's grant is a stranger's."""
    bench.roll_over()
    assert rule(bench, bench.grant("north", introductions=())) == "unknown-authority"
    stranger = other_authority(tmp_path)
    word = introduce(stranger, public_bytes(stranger), "ward")
    by_stranger = bench.grant("north", key=stranger, signer=stranger, introductions=(word,))
    assert rule(bench, by_stranger) == "unknown-authority"
    elsewhere = tuple(word.model_copy(update={"signature": bytes(64)}) for word in bench.introductions)
    assert rule(bench, bench.grant("north", introductions=elsewhere)) == "unknown-authority"


@pytest.mark.parametrize("version", [1, 2])
def test_a_grant_has_introductions_from_its_second_version_on(bench: GrantBench, version: int) -> None:
    """And then at least one: each content has one form."""
    if version == 1:
        bench.roll_over()
    fields = {**json.loads(bench.grant("north")), "v": version}
    assert rule(bench, json.dumps(fields).encode()) == "bad-document"


def test_a_grant_of_the_second_version_is_read() -> None:
    """As the golden file of the first."""
    data = (GOLDEN / "north-2.grant").read_bytes()
    grant = parse_grant(data)
    assert (grant.v, grant.name, len(grant.introductions)) == (2, "north", 1)
    assert to_json(grant) == data
