"""What the doctor says of kits and certificates."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from broker import provision
from mailboat.doctor.finding import Finding
from mailboat.doctor.trust import check_trust
from shared.config import BrokerSection, FederationConfig, LocalTrustSection
from shared.trust.kit import ROSTER
from tests.factories import make_federation
from tests.kits import Kits

SEALED = make_federation(federation={"name": "ward"}, trust={"mode": "sealed"})


def certificate(folder: Path, days: int) -> BrokerSection:
    """A broker section with a certificate of `north` that ends in so many days, and an hour."""
    now = int(time.time()) + 3600
    key = ec.generate_private_key(ec.SECP256R1())
    ca = provision.make_ca(key, name="ward", serial=1, now=now, days=days)
    made = provision.issue_client((key, ca), key.public_key(), name="north", serial=2, now=now, days=days)
    path = folder / "tls.crt"
    path.write_bytes(provision.certificate_pem(made))
    return BrokerSection(cert_file=path, key_file=path)


def found(
    site: str | None, kit: Path | None, broker: BrokerSection, federation: FederationConfig = SEALED
) -> list[Finding]:
    """What the check says."""
    return list(check_trust(federation, LocalTrustSection(kit=kit), broker, site))


@pytest.mark.parametrize(("days", "level"), [(13, "WARN"), (14, "OK")])
def test_a_site_hears_in_time_that_its_certificate_ends(tmp_path: Path, days: int, level: str) -> None:
    """Two weeks before the end there is a warning with the command that renews."""
    kit = Kits(tmp_path).site("north")
    member, counted = found("north", kit, certificate(tmp_path, days))
    assert (member.what, member.level) == ("kit", "OK")
    assert (counted.what, counted.level) == ("certificate", level)
    assert f"{days} days" in counted.message
    assert ("provision rotate north" in counted.hint) == (level == "WARN")


def test_the_coordinator_hears_whom_it_admits(tmp_path: Path) -> None:
    """The roster's sites are counted, and a file that cannot count is named."""
    kits = Kits(tmp_path)
    kits.site("north")
    (kits.coordinator / ROSTER / "south.member").write_bytes(b"x")
    (kits.coordinator / ROSTER / "south.member").chmod(0o600)
    member, left_out = found(None, kits.coordinator, BrokerSection())
    assert member.message.endswith("; admits 1 sites")
    assert (left_out.level, "south.member" in left_out.message) == ("WARN", True)


def test_a_kit_that_does_not_serve_is_named(tmp_path: Path) -> None:
    """No kit, another site's kit, and a certificate that is none are failures of their own."""
    kit = Kits(tmp_path).site("north")
    broken = tmp_path / "broken.crt"
    broken.write_text("x")
    cases = [
        found("north", None, BrokerSection()),
        found("south", kit, BrokerSection()),
        found("north", kit, BrokerSection(cert_file=broken, key_file=broken)),
    ]
    told = [[(each.what, each.message) for each in case if each.level == "FAIL"] for case in cases]
    assert [[what for what, _ in case] for case in told] == [["kit"], ["kit"], ["certificate"]]
    assert "has no kit" in told[0][0][1]
    assert "is the kit of north, this is south" in told[1][0][1]


def test_nothing_is_said_without_trust(tmp_path: Path) -> None:
    """A federation that seals nothing needs no kit."""
    assert found("north", None, BrokerSection(), make_federation()) == []
