"""Room on the disk, with a real file system's numbers and with said ones."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shared import room
from shared.errors import NoRoomError
from shared.room import MIB, Room
from shared.spooler import Spooler
from shared.store import FrameStore
from tests.helpers import run_async
from tests.unit.shared.transfers import ID, tensors_of, transfer_of

MANIFEST, FRAMES = transfer_of(tensors_of())


def test_free_bytes_are_those_of_the_file_system(tmp_path: Path) -> None:
    """What this user may take, not what the superuser keeps back."""
    found = os.statvfs(tmp_path)
    assert abs(room.free_bytes(tmp_path) - found.f_bavail * found.f_frsize) < 256 * MIB


def test_what_must_stay_free_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the last byte above the bound; the sentence names all three sizes and no path."""
    monkeypatch.setattr(room, "free_bytes", lambda _folder: 100 * MIB)
    bounded = Room(tmp_path, keep_free=60 * MIB)
    assert bounded.lacking(40 * MIB) is None
    said = bounded.lacking(40 * MIB + 1)
    assert said == "100.0 MiB free on the disk; 40.0 MiB are needed, and 60.0 MiB stay free"


def test_a_folder_takes_no_more_than_its_bound(tmp_path: Path) -> None:
    """What lies there and what would stay there count; scratch space beside it does not."""
    (tmp_path / "one").write_bytes(bytes(600_000))
    bounded = Room(tmp_path, keep_free=0, limit=MIB)
    assert bounded.lacking(400_000) is None
    assert bounded.lacking(900_000, kept=400_000) is None
    assert bounded.lacking(500_000) == "0.6 MiB of 1.0 MiB are taken, and 0.5 MiB are needed"


def test_a_transfer_begins_only_where_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that has its space goes on in a full disk; a new one leaves no file behind, and begins once there is room."""
    free = 10 * MIB
    monkeypatch.setattr(room, "free_bytes", lambda _folder: free)

    async def scenario() -> None:
        nonlocal free
        store = FrameStore(tmp_path)
        async with Spooler(
            store,
            open_chunk=lambda _manifest, chunk: chunk.frame,
            stored=lambda _id, _indices: None,
            refused=lambda _chunk, _rule: None,
            room=Room(tmp_path, keep_free=10 * MIB),
        ) as spooler:
            with pytest.raises(NoRoomError, match="stay free"):
                await spooler.open(MANIFEST)
            assert list(tmp_path.iterdir()) == []
            free = 20 * MIB
            await spooler.open(MANIFEST)
            await spooler.close(ID)
            free = 0
            await spooler.open(MANIFEST)

    run_async(scenario())
