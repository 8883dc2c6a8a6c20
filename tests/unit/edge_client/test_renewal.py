"""What a site does with a grant that is handed to it: installed or refused, and answered either way."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from edge_client.renewal import Renewals
from shared.config import SiteConfig
from shared.messages import Renewal, Renewed
from shared.trust import kit as kit_files
from shared.trust.kit import load_kit
from tests.factories import make_federation
from tests.grants import GrantBench
from tests.helpers import run_async
from tests.kits import Kits

SESSION = "a" * 16
SEALED = make_federation(federation={"name": "ward"}, trust={"mode": "sealed"})


@pytest.fixture
def bench(tmp_path: Path) -> GrantBench:
    """Two sites, and grants of a moment ago."""
    kits = Kits(tmp_path)
    kits.site("north")
    kits.site("south")
    return GrantBench(kits, issued=int(time.time()))


def renewals(bench: GrantBench, cert_file: Path | None = None, *, mode: str = "sealed") -> Renewals:
    """North's."""
    kit = bench.kits.folder("north")
    shown = str(cert_file or kit / kit_files.TLS_CERT)
    config = SiteConfig.model_validate(
        {
            "name": "north",
            "federation": "f",
            "storage": "s",
            "data": {"notes": "n"},
            "trust": {"kit": str(kit)},
            "broker": {"cert_file": shown, "key_file": str(kit / kit_files.TLS_KEY)},
        }
    )
    federation = SEALED if mode == "sealed" else make_federation()
    return Renewals(config, federation, SESSION)


def take(made: Renewals, data: bytes) -> list[Renewed]:
    """What the site answers."""
    said: list[Renewed] = []

    async def say(message: Renewed) -> None:
        said.append(message)

    run_async(made.take(Renewal(grant=data), say))
    return said


def content(kit: Path) -> dict[str, bytes]:
    """All files of a kit."""
    return {path.name: path.read_bytes() for path in kit.iterdir()}


def test_a_renewal_is_installed_and_said_so(bench: GrantBench) -> None:
    """The kit has it, the log and the answer say it; the same grant once more is answered alike and writes nothing."""
    kit, data = bench.kits.folder("north"), bench.grant("north")
    right = [Renewed(session=SESSION, grant_sha256=hashlib.sha256(data).hexdigest())]
    made = renewals(bench)
    with capture_logs() as logs:
        assert take(made, data) == right
    assert [line["event"] for line in logs] == ["renewed"]
    assert load_kit(kit, role="site", federation="ward", now=time.time()).member == bench.member("north")
    before = {path.name: path.stat().st_ino for path in kit.iterdir()}
    assert take(made, data) == right
    assert {path.name: path.stat().st_ino for path in kit.iterdir()} == before


@pytest.mark.parametrize("site", ["south", ""])
def test_what_is_refused_changes_nothing(bench: GrantBench, site: str) -> None:
    """Another site's grant, and bytes that are none: the answer names the rule, the kit is what it was."""
    kit, data = bench.kits.folder("north"), bench.grant(site) if site else b"{}"
    before = content(kit)
    (said,) = take(renewals(bench), data)
    assert said.rule == ("other-site" if site else "bad-document")
    assert content(kit) == before


def test_a_certificate_that_lies_elsewhere_is_told(bench: GrantBench, tmp_path: Path) -> None:
    """A site.toml that names a copy would go on showing the old certificate: the log says which file is the new one."""
    with capture_logs() as logs:
        assert take(renewals(bench, tmp_path / "copy.crt"), bench.grant("north"))[0].rule is None
    assert logs[-1]["log_level"] == "warning"
    assert logs[-1]["shown"].endswith("copy.crt")


def test_a_kit_that_cannot_be_read_gives_no_answer(bench: GrantBench) -> None:
    """It is offered again later; the log says what is wrong with the kit."""
    (bench.kits.folder("north") / kit_files.MEMBER).chmod(0o644)
    with capture_logs() as logs:
        assert take(renewals(bench), bench.grant("north")) == []
    assert "0644" in logs[0]["reason"]


def test_a_kit_that_cannot_be_written_is_answered(bench: GrantBench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The coordinator's log shall say which site needs its owner or mode mended; the process goes on."""

    def denied(_folder: Path, _grant: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("edge_client.renewal.install", denied)
    (said,) = take(renewals(bench), bench.grant("north"))
    assert said.rule == "kit-not-writable"


def test_nothing_is_taken_without_trust(bench: GrantBench) -> None:
    """In an open federation anybody could have sent it."""
    before = content(bench.kits.folder("north"))
    assert take(renewals(bench, mode="none"), bench.grant("north")) == []
    assert content(bench.kits.folder("north")) == before
