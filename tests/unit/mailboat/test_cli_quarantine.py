"""`mailboat quarantine`: what it lists, and how a decision reaches the coordinator."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coordinator import decisions as d
from coordinator.journal import Journal
from coordinator.quarantine import rulings
from coordinator.records import Quarantined
from coordinator.views import JOURNAL
from mailboat.commands import audit, quarantine
from mailboat.commands.status import status
from shared.errors import ConfigError
from tests.audited import AuditedRun


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A run with one more update, that is kept apart; its configuration file."""
    run = AuditedRun(tmp_path / "storage", "sync")
    again = run.accepted[0]
    held = type(again)("ab" * 16, again.site, 1, 5, "3b" * 32, "f1" * 32, 99.0, 10.0)
    with Journal(run.storage / JOURNAL) as journal:
        journal.append([held, Quarantined(held.update_id, "norm-factor", "33 times the usual", 11.0)])
    path = tmp_path / "coordinator.toml"
    path.write_text('federation = "federation.toml"\nstorage = "storage"\n')
    return path


def test_the_list_names_update_site_and_rule(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As text and as JSON."""
    quarantine.list_command(config=config)
    assert "abababab  s0-0  from version 1  norm-factor: 33 times the usual" in capsys.readouterr().out
    quarantine.list_command(config=config, as_json=True)
    (told,) = json.loads(capsys.readouterr().out)
    assert (told["update_id"], told["fate"], told["rule"]) == ("ab" * 16, "quarantined", "norm-factor")


def test_one_is_shown_beside_others(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Norm and examples of its site and of its version, so that a person sees what is odd."""
    quarantine.show("abab", config=config)
    out = capsys.readouterr().out
    assert "norm        99" in out
    assert "beside      s0-0" in out
    quarantine.show("abab", config=config, as_json=True)
    assert json.loads(capsys.readouterr().out)["update"]["site"] == "s0-0"


def test_the_status_counts_it(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As text, with the command that lists them, and as JSON; it is not among the updates that wait."""
    (config.parent / "federation.toml").write_text('[federation]\nname = "ward"\n[model]\nbase = "b"\n')
    status(config=config)
    assert "quarantine  1 update kept apart: `mailboat quarantine list`" in capsys.readouterr().out
    status(config=config, as_json=True)
    assert json.loads(capsys.readouterr().out)["quarantined"] == 1


@pytest.mark.parametrize("verdict", ["release", "drop"])
def test_a_decision_waits_for_the_coordinator(config: Path, verdict: str) -> None:
    """It is left in the storage folder under the whole id."""
    getattr(quarantine, verdict)("abab", config=config)
    assert list(rulings(config.parent / "storage")) == [d.Ruled("ab" * 16, release=verdict == "release")]


def test_only_what_is_kept_apart_can_be_decided(config: Path) -> None:
    """The error says what became of the update instead."""
    with pytest.raises(ConfigError, match="is not in quarantine, it is rejected"):
        quarantine.release("eeee", config=config)


def test_the_life_of_an_update_tells_its_quarantine(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`audit show` says since when and why."""
    audit.show("abab", config=config)
    assert "quarantine   1970-01-01 00:00:11Z  norm-factor: 33 times the usual" in capsys.readouterr().out
