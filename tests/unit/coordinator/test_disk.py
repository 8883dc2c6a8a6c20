"""What a coordinator without room can do without."""

from __future__ import annotations

from pathlib import Path

from coordinator.disk import Disk
from shared import durable
from shared.config import CoordinatorConfig
from shared.errors import NoRoomError


def test_the_place_of_a_deleted_master_goes_when_there_is_no_room(tmp_path: Path) -> None:
    """It would wait for a version that waits for room."""
    masters = tmp_path / "masters"
    masters.mkdir()
    (masters / "v00000001.safetensors").write_bytes(b"old")
    durable.retire(masters / "v00000001.safetensors")
    disk = Disk(CoordinatorConfig.model_validate({"federation": "f", "storage": str(tmp_path)}), tmp_path)
    disk.hold(NoRoomError("the disk is full", hint="make room"), 10)
    assert list(masters.iterdir()) == []
    assert disk.held == "the disk is full"
