"""docs/operating.md, walked as a stranger would: what it says to type leads to a sealed federation of three sites."""

from __future__ import annotations

import json
import re
import signal
import stat
from pathlib import Path

import pytest

from broker.launcher import find_mosquitto
from coordinator.records import Finished, Signed, VersionCommitted, Witnessed
from tests.helpers import AS_MYSELF
from tests.toys import journal_records
from tests.walk import Typed, Walk, typed

PAGE = (Path(__file__).parents[2] / "docs" / "operating.md").read_text()
SITES = ("site-1", "site-2", "site-3")
PATIENCE_S = 540.0
"""Four processes that load PyTorch, on a machine that has other things to do."""
TEN_MINUTES = 10 * 200
"""Characters of one who types forty words a minute."""
FOREGROUND = ("mosquitto ", "mailboat coordinator run", "mailboat site run")
LINES = typed(PAGE, "## Setting up: three sites")
OF_A_SITE = next(number for number, line in enumerate(LINES) if line.role == "site-1")
MACHINE = "machine"
"""The role of what is done once on a bare machine: this one is past it, since `make test` begins with `make setup`."""


def for_site(line: Typed, site: str) -> Typed:
    """The line as it is typed for another site than the first."""
    return Typed(line.role.replace("site-1", site), line.words.replace("site-1", site))


def script() -> list[Typed]:
    """All that is to be typed for three sites."""
    return LINES[:OF_A_SITE] + [for_site(line, site) for site in SITES for line in LINES[OF_A_SITE:]]


def test_setting_up_takes_less_than_ten_minutes_of_typing() -> None:
    """All lines for three sites on one bare machine, from the sources' address on, at forty words a minute."""
    assert sum(len(line.words) + 1 for line in script()) < TEN_MINUTES
    assert {line.role for line in LINES} == {MACHINE, "authority", "broker", "coordinator", "site-1"}
    assert [line.words for line in LINES if "make setup" in line.words]


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.timeout(PATIENCE_S + 30)
@pytest.mark.skipif(find_mosquitto() is None, reason="Mosquitto is not installed: apt-get install mosquitto")
def test_the_page_leads_to_a_sealed_federation_of_three_sites(tmp_path: Path, free_port: int) -> None:
    """Every line but those that set a machine up, typed in order: all three sites have their part in a signed version.

    Changed are the broker's host, port and folder, and how long the run is; what one would read over the telephone is
    compared with what the other end shows.
    """
    folder = tmp_path / "etc"
    changed = {
        "broker.example": "localhost",
        ":8883": f":{free_port}",
        "/etc/mosquitto/mailboat": str(folder),
        "provision init authority": f"provision init authority --port {free_port} --broker-folder {folder}",
    }
    lines = [line for line in script() if line.role != MACHINE]
    with Walk(tmp_path, {line.role for line in lines}, changed) as walk:
        shown: dict[str, str] = {}
        sites = []
        for line in lines:
            if line.words.startswith("mosquitto"):
                config = folder / "mosquitto.conf"
                config.write_text(f"{config.read_text()}\n{AS_MYSELF}")
                walk.start(line).wait_for("running")
            elif line.words.startswith("mailboat coordinator run"):
                coordinator = walk.start(line)
                coordinator.wait_for("announced", PATIENCE_S)
            elif line.words.startswith("mailboat site run"):
                sites.append(walk.start(line))
            else:
                said = walk.run(line, answer="y\n")
                listen(line, said, shown)
                if line.words.startswith("mailboat init"):
                    short_run(walk.folder("authority") / "ward" / "federation.toml")
        coordinator.wait_for('"event": "finished"', PATIENCE_S)
        assert [site.process.wait(60) for site in sites] == [0, 0, 0]
        assert coordinator.end(signal.SIGTERM) == 0
        check_run(walk.folder("coordinator"), free_port)


def listen(line: Typed, said: str, shown: dict[str, str]) -> None:
    """Compare what the two ends of a telephone call see."""
    fingerprints = re.findall(r"(?:[0-9a-f]{4} ){7}[0-9a-f]{4}", said)
    match line.words.split()[1:3]:
        case ["provision", "init"]:
            shown["authority"] = fingerprints[0]
        case ["site", "enroll"]:
            shown[line.role] = fingerprints[0]
        case ["provision", "approve"]:
            assert fingerprints == [shown[line.words.split()[3].removesuffix(".json")], shown["authority"]]
        case ["site", "accept"]:
            assert fingerprints == [shown["authority"]]
        case _:
            pass


def short_run(federation: Path) -> None:
    """One version, for which all three sites are waited for."""
    text = federation.read_text()
    for before, after in (("versions = 10", "versions = 1"), ("# quorum = 1", "quorum = 3")):
        assert before in text
        text = text.replace(before, after)
    federation.write_text(text)


def check_run(coordinator: Path, port: int) -> None:
    """Everybody had part, everything was signed, over TLS, and no file of the kit is open to others."""
    records = journal_records(coordinator / "coordinator-storage")
    (version,) = (record for record in records if isinstance(record, VersionCommitted))
    assert {part.site for part in version.contributions} == set(SITES)
    assert {record.site for record in records if isinstance(record, Witnessed)} == set(SITES)
    assert any(isinstance(record, Signed) for record in records)
    assert isinstance(records[-1], Finished | Signed)
    assert json.loads((coordinator / "coordinator-storage" / "status.json").read_bytes())["version"] == 1
    assert f'url = "mqtts://localhost:{port}"' in (coordinator / "coordinator.toml").read_text()
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (coordinator / "coordinator-kit").rglob("*")}
    assert modes == {0o600, 0o700}
