"""A private federation of real processes: the commands as a hospital gives them, a language model, and a kill -9."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from coordinator.journal import Journal
from coordinator.records import Accepted
from edge_client.privacy.accounting import epsilon_of
from edge_client.privacy.ledger import LEDGER, Charge, read_ledger
from mailboat.commands.init import init
from tests.commands import call, refused, running
from tests.unit.edge_client import tiny

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(600)]

SLOW_S = 240.0
DELTA = 1e-05


@pytest.fixture
def folder(tmp_path: Path, mosquitto_url: str) -> Path:
    """Two sites, a tiny model, and [privacy] in force with a target for two versions."""
    model = tiny.save_model(tmp_path / "model", "llama")
    init(tmp_path, name="ward", model=str(model), broker=mosquitto_url, sites=2)
    path = tmp_path / "federation.toml"
    text = path.read_text()
    for old, new in (
        ('plan = "top:6"', 'plan = "top:2"'),
        ("versions = 10", "versions = 2"),
        ("# max_length = 192", "max_length = 32"),
        ("# quorum = 1", "quorum = 2"),
        ("# batch_size = 8", "batch_size = 4"),
        ("# [privacy]\n", "[privacy]\n"),
        ("# delta = 1e-05\n", f"delta = {DELTA}\n"),
        ("# target_epsilon = 8.0\n", "target_epsilon = 6.0\n"),
    ):
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path.write_text(text)
    for number in (1, 2):
        notes = tmp_path / "notes" / f"site-{number}"
        notes.mkdir(parents=True)
        tiny.write_conll(notes / "notes.conll", tiny.notes(11, seed=number))
    return tmp_path


def told(folder: Path, *words: str) -> dict[str, Any]:
    """What a command prints as JSON."""
    done = call(folder, *words, "--json", timeout_s=SLOW_S)
    assert done.returncode == 0, done.stderr
    loaded: dict[str, Any] = json.loads(done.stdout)
    return loaded


def test_two_hospitals_train_in_private(folder: Path) -> None:
    """The run ends; ledger, report, plan, status and audit agree on what it cost, and it is the target."""
    with (
        running(folder, "coordinator", "run") as coordinator,
        running(folder, "site", "run", "--config", "site-1.toml") as first,
        running(folder, "site", "run", "--config", "site-2.toml") as second,
    ):
        coordinator.wait_for('"event": "finished"', SLOW_S)
        assert (first.process.wait(SLOW_S), second.process.wait(SLOW_S)) == (0, 0)
        overview = told(folder, "status")
        assert coordinator.end(signal.SIGTERM) == 0
    planned = told(folder, "privacy", "plan", "--records", "10", "--federation", "federation.toml")
    assert planned["steps"] == 3
    assert 5.99 < planned["epsilon"] <= 6.0
    report = told(folder, "privacy", "report", "--config", "site-1.toml")
    charge = Charge(sample_rate=0.4, noise_multiplier=planned["noise_multiplier"], steps=3)
    assert report["epsilon"] == pytest.approx(epsilon_of([charge.times(2)], DELTA))
    assert [limit["trainings"] for limit in report["limits"]] == [0]
    assert {site["site"]: site["epsilon"] for site in overview["sites"]} == {
        "site-1": pytest.approx(report["epsilon"]),
        "site-2": pytest.approx(report["epsilon"]),
    }
    with Journal.open_read(folder / "coordinator-storage" / "journal.sqlite") as journal:
        updates = [record for record in journal.replay() if isinstance(record, Accepted) and record.site == "site-1"]
    assert [update.examples for update in updates] == [10, 10]
    shown = told(folder, "audit", "show", updates[-1].update_id)["manifest"]["metrics"]
    assert shown == {"steps": 3.0, "epsilon": pytest.approx(report["epsilon"]), "delta": DELTA, "charges": 2.0}
    assert "strict_f1" in first.text()  # the hospital's own log has it


def test_a_site_without_its_ledger_does_not_start_again(folder: Path) -> None:
    """One that trained, lost its ledger and is started again ends with 3 and says what is missed."""
    with running(folder, "coordinator", "run") as coordinator:
        coordinator.wait_for('"event": "announced"', SLOW_S)
        with running(folder, "site", "run", "--config", "site-1.toml") as site:
            site.wait_for('"event": "sealed"', SLOW_S)
            site.end(signal.SIGKILL)
        ledger = folder / "site-1-storage" / LEDGER
        assert len(read_ledger(ledger)[0]) == 1
        ledger.unlink()
        said = refused(folder, "site", "run", "--config", "site-1.toml", status=3, timeout_s=SLOW_S)
        assert "has 0 rows, and an update names row 1" in said
        assert coordinator.end(signal.SIGTERM) == 0
