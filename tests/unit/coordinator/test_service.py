"""What the shell does in between; whole runs of it are in tests/integration."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from coordinator import disk
from coordinator.disk import Disk
from coordinator.journal import Journal
from coordinator.records import Finished
from coordinator.service import Service
from shared.audit import AuditLog, Row
from shared.config import CoordinatorConfig
from shared.errors import NoRoomError
from tests.helpers import run_async


def test_a_fact_is_stored_once_though_its_line_finds_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fills up between journal and trail holds up what is decided; the row is not written again for it."""
    monkeypatch.setattr(disk, "POLL_S", 0.0)
    shell = Service.__new__(Service)
    shell.disk = Disk(CoordinatorConfig.model_validate({"federation": "f", "storage": str(tmp_path)}), tmp_path)
    with Journal(tmp_path / "journal.sqlite") as shell.journal:
        shell.audit = AuditLog(tmp_path / "audit.jsonl", shell.journal.rows)
        follow, tries = shell.audit.follow, [NoRoomError("full", hint=""), NoRoomError("full", hint="")]

        def followed(rows: Sequence[Row] = ()) -> int:
            if tries:
                raise tries.pop()
            return follow(rows)

        monkeypatch.setattr(shell.audit, "follow", followed)
        run_async(shell._write_down([Finished(3, 1.0)]))
        assert shell.journal.length == 1
        (line,) = (tmp_path / "audit.jsonl").read_text().splitlines()
        assert json.loads(line)["version"] == 3
        assert shell.disk.held == "full"
