"""What a site asks of its disk before it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edge_client import disk
from edge_client.disk import Disk
from shared import durable
from shared.config import CodecSection, DataSection, SiteConfig
from shared.room import Room
from tests.factories import make_federation, make_plan, make_state
from tests.helpers import run_async

STATE = make_state(make_plan(make_federation()), 0)
"""20,480 bytes: 5,120 values as float32."""


@pytest.mark.parametrize(
    ("codec", "sealed", "residual"),
    [
        ({"up": "f32"}, 20_480, 0),
        ({"up": "int8"}, 5_120, 0),
        ({"up": "int4"}, 2_560, 0),
        ({"up": "int4", "feedback": 0.9}, 2_560, 10_240),
        ({"up": "ternary"}, 1_280, 0),
        ({"up": "topk2"}, 640, 10_240),
        ({"up": "topk2", "feedback": 0.0}, 640, 0),
    ],
)
def test_room_for_everything_that_training_makes(
    codec: dict[str, Any], sealed: int, residual: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state's file, a float32 delta, the sealed update, and with feedback the next residual beside the last one.

    What the training before left of the first two is written over.
    """
    asked: list[tuple[int, int | None]] = []

    def lacking(_self: Room, needed: int, *, kept: int | None = None) -> None:
        asked.append((needed, kept))

    monkeypatch.setattr(Room, "lacking", lacking)
    config = SiteConfig(name="north", federation=tmp_path, storage=tmp_path, data=DataSection(notes=tmp_path))
    section = CodecSection.model_validate({"down": "f32", **codec})
    for there in (0, 30_000, 50_000):
        run_async(Disk(config, tmp_path, tmp_path).until_room(STATE, section, there))
    assert asked == [(fresh + sealed + residual, sealed) for fresh in (20_480 + 20_480, 10_960, 0)]


def test_what_is_kept_for_later_files_goes_when_there_is_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The places of deleted transfers are the first thing that a site without room can do without."""
    folders = [tmp_path / name for name in ("outbox", "states")]
    for folder in folders:
        folder.mkdir()
        (folder / "a.frames").write_bytes(b"old")
        durable.retire(folder / "a.frames")
    monkeypatch.setattr(disk, "POLL_S", 0.0)
    monkeypatch.setattr(Room, "lacking", lambda *_, **__: "spares" if list(folders[0].iterdir()) else None)
    config = SiteConfig(name="north", federation=tmp_path, storage=tmp_path, data=DataSection(notes=tmp_path))
    section = CodecSection.model_validate({"down": "f32", "up": "f32"})
    run_async(Disk(config, *folders).until_room(STATE, section, 0), timeout_s=5)
    assert not any(list(folder.iterdir()) for folder in folders)
