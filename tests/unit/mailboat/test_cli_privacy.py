"""`mailboat privacy plan` and `mailboat privacy report`, as functions; tests/integration runs them as commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edge_client.privacy.accounting import epsilon_of
from edge_client.privacy.ledger import LEDGER, Charge, Ledger, Spent
from mailboat.commands import privacy
from mailboat.commands.init import init
from shared.config import FederationConfig
from shared.configfile import load_config
from shared.errors import ConfigError, CorruptError

DELTA = 1e-5
CHARGE = Charge(sample_rate=0.2, noise_multiplier=1.5, steps=5)
ALL: dict[str, Any] = {"batch": 10, "epochs": 1, "versions": 8, "delta": DELTA}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Configuration files as `init` writes them, with [privacy] in force."""
    init(tmp_path, name="ward", model=None, broker="mqtt://127.0.0.1:1883", sites=1)
    path = tmp_path / "federation.toml"
    text = path.read_text()
    for old, new in (
        ("# [privacy]\n", "[privacy]\n"),
        ("# delta = 1e-05\n", "delta = 1e-05\n"),
        ("# noise_multiplier = 1.0\n", "noise_multiplier = 1.5\n"),
    ):
        assert text.count(old) == 1
        text = text.replace(old, new)
    path.write_text(text)
    return tmp_path


def planned(capsys: pytest.CaptureFixture[str], **options: Any) -> dict[str, Any]:
    """What `plan --json` prints."""
    privacy.plan(**{"records": 50, **options}, as_json=True)
    loaded: dict[str, Any] = json.loads(capsys.readouterr().out)
    return loaded


def reported(capsys: pytest.CaptureFixture[str], folder: Path) -> dict[str, Any]:
    """What `report --json` prints."""
    privacy.report(config=folder / "site.toml", as_json=True)
    loaded: dict[str, Any] = json.loads(capsys.readouterr().out)
    return loaded


def test_noise_for_an_epsilon_and_back(capsys: pytest.CaptureFixture[str]) -> None:
    """The noise that `--epsilon` gives costs, asked with `--noise`, that epsilon again."""
    found = planned(capsys, **ALL, epsilon=3.0)
    assert (found["sample_rate"], found["steps"]) == (0.2, 5)
    assert 2.99 < found["epsilon"] <= 3.0
    back = planned(capsys, **ALL, noise=found["noise_multiplier"])
    assert back["epsilon"] == pytest.approx(found["epsilon"])
    assert list(back["epsilons"]) == ["1", "4", "8"]
    whole = epsilon_of([Charge(sample_rate=0.2, noise_multiplier=found["noise_multiplier"], steps=40)], DELTA)
    assert found["epsilon"] == pytest.approx(whole)


def test_a_federation_s_file_gives_what_is_not_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Batch, epochs, versions, delta and noise; each can be said otherwise, and an epsilon puts its noise aside."""
    file = folder / "federation.toml"
    found = planned(capsys, federation=file)
    assert (found["versions"], found["delta"], found["noise_multiplier"], found["sample_rate"]) == (10, 1e-5, 1.5, 0.16)
    other = planned(capsys, federation=file, batch=5, epochs=2, versions=3, delta=1e-3)
    assert (other["versions"], other["delta"], other["sample_rate"], other["steps"]) == (3, 1e-3, 0.1, 20)
    assert planned(capsys, federation=file, epsilon=1.0)["noise_multiplier"] > 1.5


def test_a_plan_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    """The steps by number, the noise, epsilon as versions go by; and a delta that promises nothing is told."""
    privacy.plan(records=50, **ALL, noise=1.5)
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said] == ["records", "steps", "noise", "version", "version", "version"]
    assert said[1].endswith("5 in an update, 40 in 8 versions")
    privacy.plan(records=50, **{**ALL, "delta": 0.01}, noise=1.5)
    assert "warning" not in capsys.readouterr().out
    privacy.plan(records=500, **{**ALL, "delta": 0.01}, noise=1.5)
    assert "warning" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "--batch, --epochs, --versions, --delta not given"),
        ({**ALL, "delta": None, "noise": 1.0}, "--delta not given"),
        (ALL, "one of --epsilon and --noise"),
        ({**ALL, "noise": 1.0, "epsilon": 1.0}, "one of --epsilon and --noise"),
        ({**ALL, "epsilon": 1000.0}, "target_epsilon"),
    ],
)
def test_questions_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    """Each is a wrong command line, and says what is missing."""
    with pytest.raises(ConfigError, match=message):
        privacy.plan(**{"records": 50, **options})


def test_a_report_of_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A site that has not trained has spent nothing, and has all of its budget."""
    found = reported(capsys, folder)
    assert (found["trainings"], found["steps"], found["epsilon"], found["limits"]) == (0, 0, 0.0, [])
    site = folder / "site.toml"
    site.write_text(site.read_text().replace("# budget_epsilon = 8.0", "budget_epsilon = 6.0"))
    (limit,) = reported(capsys, folder)["limits"]
    assert (limit["epsilon"], limit["left"], limit["trainings"]) == (6.0, 6.0, None)
    privacy.report(config=site)
    assert "nothing: no training was private here" in capsys.readouterr().out


def test_a_report_adds_up_what_was_charged(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Steps and epsilon of all rows, what is left of the budget, and how many trainings that is."""
    storage = folder / "site-1-storage"
    storage.mkdir()
    run = load_config(folder / "federation.toml", FederationConfig).config_sha256
    ledger, twice = Ledger(storage, known=0), epsilon_of([CHARGE.times(2)], DELTA)
    for version in (0, 1):
        ledger.add("ward", run, version, Spent(charge=CHARGE, epsilon=version + 1.0, delta=DELTA))
    site = folder / "site.toml"
    budget = (epsilon_of([CHARGE.times(4)], DELTA) + epsilon_of([CHARGE.times(5)], DELTA)) / 2
    site.write_text(site.read_text().replace("# budget_epsilon = 8.0", f"budget_epsilon = {budget}"))
    found = reported(capsys, folder)
    assert (found["trainings"], found["steps"], found["delta"]) == (2, 10, DELTA)
    assert found["epsilon"] == pytest.approx(twice)
    (limit,) = found["limits"]
    assert limit["left"] == pytest.approx(budget - twice)
    assert limit["trainings"] == 2
    assert [row["base_version"] for row in found["rows"]] == [0, 1]
    privacy.report(config=site)
    said = capsys.readouterr().out
    assert f"epsilon {twice:.4g} at delta 1e-05" in said
    assert "enough for 2 more like the last" in said
    assert "ward from version 1: 5 steps, rate 0.2, noise 1.5; epsilon 2 at delta 1e-05 by then" in said


def test_a_ledger_that_is_damaged_is_not_added_up(folder: Path) -> None:
    """Its file and line are named."""
    storage = folder / "site-1-storage"
    storage.mkdir()
    (storage / LEDGER).write_text("{}\n")
    with pytest.raises(CorruptError, match=r"privacy.jsonl, line 1"):
        privacy.report(config=folder / "site.toml")
