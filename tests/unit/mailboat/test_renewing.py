"""Renewals and the roll-over to another CA, at the authority: who is due, what is published, what is refused when."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cryptography import x509

from broker import provision
from mailboat import authority as bench
from mailboat import renewing
from mailboat.commands.provision import SITE_DAYS, revoke
from mailboat.commands.rotate import renew, rotate
from mailboat.issuing import DAY_S, Authority
from shared.errors import ConfigError, RefusedError
from shared.trust import kit as kits
from shared.trust.grant import check_renewal, holder_of, install, parse_grant
from shared.trust.membership import Membership, stated_membership
from tests.unit.mailboat.test_provision import admit, folder

__all__ = ["folder"]


def member(folder: Path, name: str = "site-1") -> Membership:
    """The membership that counts for a site."""
    entry = bench.open_authority(folder).register.current(name)
    assert entry is not None
    return stated_membership(entry.member)


def offered(folder: Path) -> dict[str, bytes]:
    """What the coordinator would hand to the sites."""
    return {path.stem: path.read_bytes() for path in (folder / "coordinator-kit" / "grants").iterdir()}


def take(folder: Path, kit: Path) -> None:
    """The site takes what it is handed, as it would over the channel."""
    grant = check_renewal(offered(folder)[member(folder).name], holder_of(kit, "ward"), bench.unix_now())
    install(kit, grant)


def renewed(folder: Path, in_days: float, days: int | None = None) -> tuple[Authority, set[str]]:
    """`renew` so many days from now, and who was."""
    now = bench.unix_now() + int(in_days * DAY_S)
    opened, names = renewing.renew(bench.open_authority(folder), days=days, now=now)
    return opened, set(names)


def test_whoever_has_less_than_a_third_left_is_due(folder: Path) -> None:
    """A day before nobody is; a day after, the sites; the ends in their own time, and nobody twice."""
    admit(folder)
    third = SITE_DAYS * 2 / 3
    assert renewed(folder, third - 1)[1] == set()
    assert renewed(folder, third + 1)[1] == {"site-1"}
    assert renewed(folder, third + 1)[1] == set()
    assert renewed(folder, 250)[1] == {"site-1", "coordinator", "broker"}


def test_a_site_is_renewed_for_as_long_as_before(folder: Path) -> None:
    """Unless other days are named: a federation of an earlier release keeps its ninety until somebody says so."""
    admit(folder)
    rotate("site-1", folder=folder, days=9)
    for days, wanted in ((None, 9), (30, 30)):
        renewed(folder, 28 if wanted == 30 else 7, days)
        found = member(folder)
        assert found.not_after - found.not_before == wanted * DAY_S + provision.BACKDATED_S


def test_a_renewal_is_for_the_coordinator_to_hand_over_and_is_always_later(folder: Path) -> None:
    """Two in the same second are told apart by their dates, and a kit takes the second one after the first."""
    kit = admit(folder)
    assert offered(folder)["site-1"] == (folder / "grants" / "site-1.grant").read_bytes()
    for _ in range(2):
        rotate("site-1", folder=folder)
        take(folder, kit)
    assert kits.load_kit(kit, role="site", federation="ward", now=bench.unix_now()).member == member(folder)


def test_a_clock_that_was_ahead_is_forgiven(folder: Path) -> None:
    """What was dated next year is refused by the kit; once the clock is right, the next renewal counts."""
    kit = admit(folder)
    now = bench.unix_now()
    renewing.rotate_site(bench.open_authority(folder), "site-1", days=45, now=now + 365 * DAY_S)
    with pytest.raises(RefusedError) as refused:
        take(folder, kit)
    assert refused.value.rule == "not-valid-now"
    renewing.rotate_site(bench.open_authority(folder), "site-1", days=45, now=now + 1)
    take(folder, kit)


def test_what_is_handed_over_follows_the_register(folder: Path) -> None:
    """A revoked site's grant goes; a grant of another time is left out, and `renew` makes a new one."""
    admit(folder)
    admit(folder, "site-2", "kit-2")
    old = (folder / "grants" / "site-1.grant").read_bytes()
    revoke("site-2", folder=folder)
    assert set(offered(folder)) == {"site-1"}
    rotate("site-1", folder=folder)
    (folder / "grants" / "site-1.grant").write_bytes(old)  # as a command that was interrupted leaves it
    bench.open_authority(folder)
    assert offered(folder) == {}
    renew(folder=folder)
    assert (
        parse_grant(offered(folder)["site-1"]).member == (folder / "coordinator-kit/roster/site-1.member").read_bytes()
    )


def bundle(folder: Path) -> list[x509.Certificate]:
    """Whom the broker believes."""
    return x509.load_pem_x509_certificates((folder / "broker" / "ca.crt").read_bytes())


def lists(folder: Path) -> list[x509.Name]:
    """Whose revocation lists the broker has."""
    return [issuer for issuer, _number in provision.crl_numbers((folder / "broker" / "crl.pem").read_bytes())]


def issued_by(kit: Path, ca: x509.Certificate) -> None:
    """Fails unless this CA has issued the certificate in the kit."""
    x509.load_pem_x509_certificate((kit / "tls.crt").read_bytes()).verify_directly_issued_by(ca)


def test_a_second_ca_issues_nothing_before_it_is_told_to(folder: Path) -> None:
    """Whoever is admitted or due while the broker may not have it yet gets a certificate of the first, and both CAs."""
    first = bundle(folder)[0]
    rotate("ca", folder=folder)
    kit = admit(folder)
    issued_by(kit, first)
    assert (kit / "ca.crt").read_bytes() == (folder / "broker" / "ca.crt").read_bytes()
    rotate("site-1", folder=folder)
    rotate("broker", folder=folder)
    assert renewed(folder, SITE_DAYS)[1] == {"site-1"}
    assert {entry.ca for entry in bench.open_authority(folder).register.entries} == {1}


def test_the_brokers_certificate_waits_for_the_sites(folder: Path) -> None:
    """A site that was left out when the second CA began to issue would not know it."""
    admit(folder)
    rotate("ca", folder=folder)
    opened = bench.open_authority(folder)
    changes = {"ca": 2, "ca_beside": 1}  # as `renew --all` that was interrupted leaves it
    register = opened.register.model_copy(update=changes)
    (folder / "register.json").write_text(register.model_dump_json())
    with pytest.raises(RefusedError, match="coordinator, site-1") as refused:
        rotate("broker", folder=folder)
    assert refused.value.rule == "roll-over"
    renew(folder=folder)
    rotate("broker", folder=folder)


def test_a_roll_over_goes_in_its_order(folder: Path) -> None:
    """Each step refuses to come before the one that it needs, and names who is behind."""
    kit = admit(folder)
    first = bundle(folder)
    with pytest.raises(ConfigError, match="no roll-over"):
        rotate("ca", folder=folder, finish=True)
    rotate("ca", folder=folder)
    both = bundle(folder)
    assert both[:1] == first
    assert lists(folder) == [each.subject for each in both]
    assert (folder / "coordinator-kit" / "ca.crt").read_bytes() == (folder / "broker" / "ca.crt").read_bytes()
    for name, finish, behind in (("ca", False, "under way"), ("ca", True, "everybody")):
        with pytest.raises(RefusedError, match=behind) as refused:
            rotate(name, folder=folder, finish=finish)
        assert refused.value.rule == "roll-over"
    renew(folder=folder, everybody=True)
    with pytest.raises(RefusedError, match="certificates of broker"):
        rotate("ca", folder=folder, finish=True)
    take(folder, kit)
    issued_by(kit, both[1])
    rotate("broker", folder=folder)
    rotate("ca", folder=folder, finish=True)
    assert bundle(folder) == both[1:]
    assert lists(folder) == [both[1].subject]
    assert not (folder / "ca.key").exists()
    take(folder, kit)
    assert (kit / "ca.crt").read_bytes() == (folder / "broker" / "ca.crt").read_bytes()
    admit(folder, "site-2", "kit-2")


def test_a_site_that_is_revoked_during_a_roll_over_is_on_both_lists(folder: Path) -> None:
    """A certificate is looked up in the list of its own CA, whichever that is; so each list names everything."""
    admit(folder)
    rotate("ca", folder=folder)
    renew(folder=folder, everybody=True)
    serials = {entry.serial for entry in bench.open_authority(folder).register.entries if entry.name == "site-1"}
    revoke("site-1", folder=folder)
    end = "-----END X509 CRL-----"
    blocks = (folder / "broker" / "crl.pem").read_text().split(end)[:-1]
    assert len(blocks) == 2
    for block in blocks:
        assert {entry.serial_number for entry in x509.load_pem_x509_crl((block + end).encode())} == serials


def test_the_broker_is_not_renewed_by_itself_during_a_roll_over(folder: Path) -> None:
    """Its certificate would be of a CA that a site may not have yet."""
    admit(folder)
    rotate("ca", folder=folder)
    renew(folder=folder, everybody=True)
    assert renewed(folder, 300)[1] == {"site-1", "coordinator"}


def test_a_roll_over_that_was_interrupted_begins_anew(folder: Path) -> None:
    """A key that no register names has signed nothing: the next command removes it."""
    (folder / "ca-2.key").write_bytes(b"left over")
    (folder / "ca-2.key").chmod(0o600)
    bench.open_authority(folder)
    assert not (folder / "ca-2.key").exists()
    rotate("ca", folder=folder)
    assert len(bundle(folder)) == 2


def test_a_register_of_an_earlier_release_is_read(folder: Path) -> None:
    """It names no CA: everything in it is the first one's."""
    kit = admit(folder)
    path = folder / "register.json"
    fields = json.loads(path.read_text())
    del fields["ca"], fields["ca_beside"]
    for entry in fields["entries"]:
        del entry["ca"]
    path.write_text(json.dumps(fields))
    rotate("site-1", folder=folder)
    take(folder, kit)


@pytest.mark.parametrize("name", ["site-1", "broker"])
def test_finish_is_a_word_about_the_ca_alone(folder: Path, name: str) -> None:
    """With anything else it is an error, and nothing is done."""
    before = bench.open_authority(folder).register
    with pytest.raises(ConfigError, match="--finish"):
        rotate(name, folder=folder, finish=True)
    assert bench.open_authority(folder).register == before


@pytest.mark.parametrize("name", ["ca", "federation-key", "broker"])
def test_no_site_is_called_as_what_rotates(folder: Path, name: str) -> None:
    """`rotate ca` would otherwise mean two things."""
    with pytest.raises(RefusedError) as refused:
        admit(folder, name)
    assert refused.value.rule == "name-taken"
