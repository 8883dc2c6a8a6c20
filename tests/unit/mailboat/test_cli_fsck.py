"""`mailboat coordinator fsck` and `mailboat site fsck`: what they print, and how they end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coordinator.genesis import open_run
from coordinator.journal import Journal
from coordinator.views import JOURNAL
from edge_client.outbox import Outbox
from mailboat.commands import coordinator, site
from shared.audit import AuditLog
from shared.config import FederationConfig
from shared.configfile import load_config
from shared.errors import CorruptError
from shared.plan import load_plan
from tests.toys import write_toy


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A federation whose coordinator has opened its run."""
    write_toy(tmp_path, "mqtt://127.0.0.1:1", sites=1, versions=1, parameters=100)
    storage = tmp_path / "coordinator"
    federation = load_config(tmp_path / "federation.toml", FederationConfig)
    plan = load_plan(storage / "plan.json", federation)
    with Journal(storage / JOURNAL) as journal:
        journal.append([open_run(storage, federation, plan, storage / "initial.safetensors")])
        AuditLog(storage / "audit.jsonl", journal.rows)
    return tmp_path


def test_a_sound_coordinator(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows, version and that nothing is wrong; as JSON the same for scripts."""
    coordinator.fsck(config=toy / "coordinator.toml")
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("journal   1 rows, the last one has hash ")
    assert said[1:] == ["run       version 0, 0 updates kept", "nothing is wrong"]
    coordinator.fsck(config=toy / "coordinator.toml", as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert (told["rows"], told["version"], told["problems"], told["damage_left"]) == (1, 0, [], 0)


def test_leftovers_are_no_failure_and_damage_is(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A leftover ends with 0, damage with 3 and advice, and once repaired with 0 again."""
    (toy / "coordinator" / "masters" / ".tmp-1").touch()
    coordinator.fsck(config=toy / "coordinator.toml")
    assert "leftover  masters/.tmp-1: a file that was being written, or to be [litter]; --repair deletes it" in (
        capsys.readouterr().out.splitlines()
    )
    (frames,) = (toy / "coordinator" / "states").glob("*.frames")
    frames.unlink()
    with pytest.raises(CorruptError, match=r"1 damaged, first states/.*frames-gone") as caught:
        coordinator.fsck(config=toy / "coordinator.toml", as_json=True)
    assert (caught.value.exit_code, "--repair" in caught.value.hint) == (3, True)
    assert json.loads(capsys.readouterr().out)["damage_left"] == 1
    coordinator.fsck(config=toy / "coordinator.toml", repair=True)
    labels = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert labels == ["journal", "run", "deleted", "repaired"]


def test_a_site(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What waits, what has its receipt, and what is damaged."""
    Outbox(toy / "site-1")
    site.fsck(config=toy / "site-1.toml")
    assert capsys.readouterr().out.splitlines() == [
        "outbox    0 updates wait for their receipt",
        "receipts  0",
        "nothing is wrong",
    ]
    (toy / "site-1" / "receipts" / ("1" * 32 + ".json")).write_text("{")
    with pytest.raises(CorruptError, match="damaged-receipt"):
        site.fsck(config=toy / "site-1.toml", as_json=True)
    assert json.loads(capsys.readouterr().out)["damage_left"] == 1
