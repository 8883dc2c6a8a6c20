"""Files of a version that a running coordinator gives up while they are looked at."""

from __future__ import annotations

from pathlib import Path

import pytest
from blake3 import blake3

from coordinator import kept
from coordinator.kept import check_master
from coordinator.lineage import RecordedVersion
from coordinator.masters import master_path
from shared import durable

CONTENT = b"a master"


def recorded() -> RecordedVersion:
    """Version 3, with the digest of CONTENT."""
    return RecordedVersion(7, "00" * 32, None, None, blake3(CONTENT).hexdigest(), None)


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    """A coordinator's folder with that master."""
    path = master_path(tmp_path / "masters", 3)
    path.parent.mkdir()
    path.write_bytes(CONTENT)
    return tmp_path


@pytest.mark.parametrize("required", [False, True])
def test_a_master_that_is_what_was_recorded(storage: Path, required: bool) -> None:
    """Nothing to find; and a changed one is found, required or not."""
    assert check_master(storage, 3, recorded(), (), required=required) == []
    master_path(storage / "masters", 3).write_bytes(b"b master")
    assert [each.rule for each in check_master(storage, 3, recorded(), (), required=required)] == ["master-digest"]


@pytest.mark.parametrize(("required", "rules"), [(False, []), (True, ["master-gone"])])
def test_a_master_that_is_written_over_meanwhile_is_gone_and_not_forged(
    storage: Path, monkeypatch: pytest.MonkeyPatch, required: bool, rules: list[str]
) -> None:
    """Its place is taken by a later version while an audit reads it."""

    def meanwhile(path: Path) -> str:
        durable.retire(path)
        return "ff" * 32

    monkeypatch.setattr(kept, "file_digest", meanwhile)
    assert [each.rule for each in check_master(storage, 3, recorded(), (), required=required)] == rules
