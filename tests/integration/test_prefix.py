"""A real site over a real Mosquitto, killed and started again: what the frozen blocks made of its notes stays."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.commands import Running, running
from tests.tiny_run import write_tiny

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(300)]

SLOW_S = 120.0
SEALED = '"event": "sealed"'


def told(site: Running) -> list[str]:
    """What the site's log has said of the frozen prefix."""
    lines = site.text().splitlines()
    return [word for line in lines for word in ("computing", "found", "damaged") if f'"prefix-{word}"' in line]


def test_a_killed_site_starts_again_from_what_it_kept(tmp_path: Path, mosquitto_url: str) -> None:
    """Before the kill the site computes the states of both data sets, afterwards it finds them, and the run ends.

    The files are for their owner alone.
    """
    write_tiny(tmp_path, mosquitto_url, sites=1, versions=3, federation='[layers]\nplan = "top:2"\n')
    storage = tmp_path / "site-1"
    with running(tmp_path, "coordinator", "run") as coordinator:
        with running(tmp_path, "site", "run", "--config", "site-1.toml") as site:
            site.wait_for(SEALED, SLOW_S)
            site.end(signal.SIGKILL)
            assert told(site) == ["computing", "computing"]
        kept = {path: path.stat().st_ino for path in (storage / "prefix").iterdir()}
        assert {path.name.rsplit("-", 2)[0] for path in kept} == {"training", "held-out"}
        assert all(path.stat().st_mode & 0o777 == 0o600 for path in kept)
        with running(tmp_path, "site", "run", "--config", "site-1.toml") as site:
            coordinator.wait_for('"event": "finished"', SLOW_S)
            assert site.process.wait(SLOW_S) == 0
            assert told(site) == ["found", "found"]
        assert {path: path.stat().st_ino for path in (storage / "prefix").iterdir()} == kept
        assert coordinator.process.wait(SLOW_S) == 0
