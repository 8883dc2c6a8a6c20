"""Hidden states at rest: found again, told apart, bounded, and never believed when they are damaged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import structlog
import torch

from edge_client.layout import PREFIX
from edge_client.prefix_store import HiddenSpec, InMemory, NotKeptError, OnDisk, Slot, entries
from shared import durable
from shared.config import StateDType
from shared.errors import NoRoomError
from shared.tensorfile import parse_header

SPEC = HiddenSpec(key="a" * 64, tokens=6, width=4, dtype="f32")
STATES = torch.arange(24, dtype=torch.float32).view(6, 4)


def on_disk(storage: Path, slot: Slot = "training", dtype: StateDType = "f32", **bounds: int) -> OnDisk:
    """A slot of a site's folder."""
    return OnDisk(storage / PREFIX, slot, dtype=dtype, **{"limit": 1 << 20, "keep_free": 0, **bounds})


def batches(states: torch.Tensor = STATES) -> Iterator[torch.Tensor]:
    """Two batches of two and four tokens."""
    yield from (states[:2], states[2:])


def kept(storage: Path) -> dict[str, str]:
    """Key by slot of what lies in a folder."""
    return {entry.slot: entry.key for entry in entries(storage / PREFIX)}


@pytest.mark.parametrize(("dtype", "size"), [("f32", 4), ("bf16", 2), ("f16", 2)])
def test_what_was_kept_is_found_by_the_next_start(tmp_path: Path, dtype: StateDType, size: int) -> None:
    """Rows come back as they were put, from a safetensors file of the size told, for its owner's eyes alone."""
    spec = replace(SPEC, dtype=dtype)
    torch_dtype = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}[dtype]
    assert on_disk(tmp_path, dtype=dtype).find(spec) is None
    on_disk(tmp_path, dtype=dtype).put(spec, batches(STATES.to(torch_dtype)))
    rows = on_disk(tmp_path, dtype=dtype).find(spec)
    assert rows is not None
    assert rows(2, 6).dtype == torch_dtype
    assert torch.equal(rows(2, 6).float(), STATES[2:6])
    assert torch.equal(rows(0, 2).float(), STATES[:2])
    (entry,) = entries(tmp_path / PREFIX)
    header = parse_header(entry.path.read_bytes(), entry.path.stat().st_size)
    assert header.file_size - header.size == spec.size == 6 * 4 * size
    assert [(each.name, each.shape) for each in header.specs] == [("hidden", (6, 4))]
    assert (entry.path.stat().st_mode & 0o777, entry.path.parent.stat().st_mode & 0o777) == (0o600, 0o700)


def test_the_file_cannot_be_written_through_its_rows(tmp_path: Path) -> None:
    """A mapping is private: what is done to a tensor stays in memory, and a file that is gone still gives its rows."""
    rows = on_disk(tmp_path).put(SPEC, batches())
    rows(0, 6).zero_()
    (entry,) = entries(tmp_path / PREFIX)
    assert entry.intact
    entry.path.unlink()
    assert torch.equal(rows(1, 3), STATES[1:3])


@pytest.mark.parametrize("damage", ["turned over", "cut short"])
def test_a_damaged_file_is_said_and_goes(tmp_path: Path, damage: str) -> None:
    """What is not what was written is not found; it is deleted, and the log has a line."""
    on_disk(tmp_path).put(SPEC, batches())
    (entry,) = entries(tmp_path / PREFIX)
    data = bytearray(entry.path.read_bytes())
    data[-1] ^= 1
    entry.path.write_bytes(bytes(data) if damage == "turned over" else bytes(data[:-8]))
    with structlog.testing.capture_logs() as logs:
        assert on_disk(tmp_path).find(SPEC) is None
    assert [(line["event"], line["log_level"]) for line in logs] == [("prefix-damaged", "warning")]
    assert kept(tmp_path) == {}


def test_another_key_replaces_what_is_there(tmp_path: Path) -> None:
    """States of other notes are deleted before new ones are computed, in their own slot and in those filled later."""
    other = replace(SPEC, key="b" * 64)
    on_disk(tmp_path).put(SPEC, batches())
    on_disk(tmp_path, "held-out").put(SPEC, batches())
    assert on_disk(tmp_path).find(SPEC) is not None
    assert kept(tmp_path) == {"training": SPEC.key, "held-out": SPEC.key}
    assert on_disk(tmp_path).find(other) is None
    assert kept(tmp_path) == {"held-out": SPEC.key}
    on_disk(tmp_path).check(other)
    assert kept(tmp_path) == {}


def test_what_is_kept_can_be_forgotten(tmp_path: Path) -> None:
    """Clearing a slot leaves the others."""
    for slot in ("training", "held-out"):
        on_disk(tmp_path, slot).put(SPEC, batches())
    on_disk(tmp_path).clear()
    assert kept(tmp_path) == {"held-out": SPEC.key}


def test_all_slots_share_one_limit(tmp_path: Path) -> None:
    """96 bytes each and a header: one fits under 250 bytes, the second does not; a lower limit gives up the first."""
    on_disk(tmp_path, limit=250).check(SPEC)
    on_disk(tmp_path, limit=250).put(SPEC, batches())
    with pytest.raises(NotKeptError, match=r"more than prefix.limit_mib = 0"):
        on_disk(tmp_path, "held-out", limit=250).check(SPEC)
    assert on_disk(tmp_path, limit=250).find(SPEC) is not None
    with pytest.raises(NotKeptError, match=r"prefix.limit_mib"):
        on_disk(tmp_path, limit=100).find(SPEC)


def test_the_disk_keeps_its_free_space(tmp_path: Path) -> None:
    """States for which the disk has no room beside what is to stay free are not computed."""
    with pytest.raises(NotKeptError, match="stay free"):
        on_disk(tmp_path, keep_free=1 << 60).check(SPEC)


def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that fails is a reason not to keep states, and no file stays."""

    def full(*_: Any) -> None:
        raise NoRoomError("the disk is full")

    store = on_disk(tmp_path)
    monkeypatch.setattr(durable, "reserve", full)
    with pytest.raises(NotKeptError, match="the disk is full"):
        store.put(SPEC, batches())
    assert list((tmp_path / PREFIX).iterdir()) == []


def test_a_killed_write_leaves_nothing_that_counts(tmp_path: Path) -> None:
    """States that stop in the middle are not found, and the next start removes what was left."""

    def half() -> Iterator[torch.Tensor]:
        yield STATES[:2]
        raise KeyError

    with pytest.raises(KeyError):
        on_disk(tmp_path).put(SPEC, half())
    assert list((tmp_path / PREFIX).iterdir()) == []
    (tmp_path / PREFIX / f"{durable.TEMPORARY_PREFIX}x").write_bytes(b"half")
    assert on_disk(tmp_path).find(SPEC) is None
    assert list((tmp_path / PREFIX).iterdir()) == []


def test_memory_is_bounded_and_forgets() -> None:
    """In memory rows come back too; nothing is found again, and what would take too much is refused."""
    keep = InMemory(96)
    keep.check(SPEC)
    assert torch.equal(keep.put(SPEC, batches())(1, 5), STATES[1:5])
    assert InMemory(96).find(SPEC) is None
    with pytest.raises(NotKeptError, match="more than 0 MiB"):
        InMemory(95).check(SPEC)
