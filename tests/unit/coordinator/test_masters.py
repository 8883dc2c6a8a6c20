from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3
from safetensors.numpy import load_file, save_file

from coordinator.masters import (
    TensorFile,
    check_files,
    master_path,
    open_own,
    prune_masters,
    slot_path,
    slots_digest,
    writing,
)
from shared import durable
from shared.errors import CorruptError, RefusedError, UnavailableError
from shared.tensorfile import F32Array

SHAPES = {"b.w": (2, 3), "a": (4,)}
VALUES: dict[str, F32Array] = {
    "a": np.arange(4, dtype=np.float32),
    "b.w": np.linspace(0, 1, 6, dtype=np.float32).reshape(2, 3),
}


def write(path: Path) -> str:
    """Write the sample file and return its digest."""
    with writing(path, SHAPES, {"kind": "master"}) as writer:
        for name in sorted(VALUES):
            writer.write(name, VALUES[name])
    return writer.digest


def write_some(path: Path, names: list[str]) -> None:
    """Try to write a file with these of the sample's tensors."""
    with writing(path, SHAPES, {}) as writer:
        for name in names:
            writer.write(name, VALUES[name])


def test_what_was_written_is_read_by_us_and_by_others(tmp_path: Path) -> None:
    """An ordinary safetensors file: safetensors' own reader and ours see the same values, names ascending."""
    path = tmp_path / "v.safetensors"
    digest = write(path)
    assert digest == blake3(path.read_bytes()).hexdigest()
    theirs = load_file(path)
    with open_own(path, SHAPES) as ours:
        assert list(ours) == ["a", "b.w"]
        assert len(ours) == 2
        for name, values in VALUES.items():
            np.testing.assert_array_equal(ours[name], values)
            np.testing.assert_array_equal(theirs[name], values)


def test_reading_copies(tmp_path: Path) -> None:
    """Changing what was read changes nothing on the disk."""
    write(tmp_path / "v")
    with TensorFile(tmp_path / "v") as tensors:
        tensors["a"][:] = 9
        assert tensors["a"].tolist() == [0, 1, 2, 3]


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    """When the writing block fails, the old file stays and nothing else is left."""
    path = tmp_path / "v"
    digest = write(path)
    with pytest.raises(KeyError):
        write_some(path, ["a", "unknown"])
    assert blake3(path.read_bytes()).hexdigest() == digest
    assert [entry.name for entry in tmp_path.iterdir()] == ["v"]


def test_each_file_is_synced_with_its_folder(tmp_path: Path) -> None:
    """One sync of the file, one of the folder."""
    before = (durable.SYNCS.files, durable.SYNCS.folders)
    write(tmp_path / "v")
    assert (durable.SYNCS.files, durable.SYNCS.folders) == (before[0] + 1, before[1] + 1)


@pytest.mark.parametrize("names", [["b.w"], ["a", "a"], ["a"]], ids=["order", "twice", "incomplete"])
def test_tensors_come_in_order_and_all(tmp_path: Path, names: list[str]) -> None:
    """A file with tensors missing, doubled or out of order is a bug of ours, and does not appear."""
    with pytest.raises(AssertionError):
        write_some(tmp_path / "v", names)
    assert list(tmp_path.iterdir()) == []


def test_disk_space_is_taken_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a full disk the whole size is asked for and refused before the first tensor is computed."""
    asked: list[int] = []

    def full(_fd: int, _offset: int, size: int) -> None:
        asked.append(size)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UnavailableError, match="disk is full"), writing(tmp_path / "v", SHAPES, {}):
        pytest.fail("the block must not begin")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    write(tmp_path / "v")
    assert abs(asked[0] - (tmp_path / "v").stat().st_size) < 64  # the sample's metadata


def test_other_types_than_float32_are_refused(tmp_path: Path) -> None:
    """Masters are float32; anything else is named."""
    save_file({"a": np.zeros(3, dtype=np.float64)}, tmp_path / "v")
    with pytest.raises(RefusedError, match="tensor a is F64") as caught:
        TensorFile(tmp_path / "v")
    assert caught.value.rule == "wrong-dtype"


@pytest.mark.parametrize("damage", ["gone", "cut", "header", "other"])
def test_a_file_of_ours_that_changed_is_corrupt(tmp_path: Path, damage: str) -> None:
    """Gone, cut short, overwritten or with other tensors: CorruptError names the file."""
    path = tmp_path / "v00000003.safetensors"
    write(path)
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        os.truncate(path, path.stat().st_size - 1)
    elif damage == "header":
        path.write_bytes(b"\xff" * 100)
    else:
        save_file({"a": VALUES["a"]}, path)
    with pytest.raises(CorruptError, match=r"v00000003\.safetensors"):
        open_own(path, SHAPES)


def test_check_files_compares_with_the_journal(tmp_path: Path) -> None:
    """Sound files pass; one flipped bit in master or slot, or a file that is gone, does not."""
    master, slot = write(master_path(tmp_path, 2)), write(slot_path(tmp_path, 2, "momentum"))
    digest = slots_digest([slot])
    check_files(tmp_path, 2, ["momentum"], master, digest)
    check_files(tmp_path, 2, [], master, None)
    for path in (slot_path(tmp_path, 2, "momentum"), master_path(tmp_path, 2)):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        with pytest.raises(CorruptError, match=path.name.split(".")[0]):
            check_files(tmp_path, 2, ["momentum"], master, digest)
    master_path(tmp_path, 2).unlink()
    with pytest.raises(CorruptError, match="is gone"):
        check_files(tmp_path, 2, [], master, None)


def test_no_slots_have_no_digest() -> None:
    """An optimizer without memory leaves nothing to compare."""
    assert slots_digest([]) is None


def test_pruning_keeps_version_zero_and_what_is_asked(tmp_path: Path) -> None:
    """Masters, slots and a crash's leftovers go; version 0, the kept versions and foreign files stay."""
    for version in (0, 1, 2, 3, 123456789):
        write(master_path(tmp_path, version))
        write(slot_path(tmp_path, version, "momentum"))
    (tmp_path / ".tmp-0123").touch()
    (tmp_path / "notes.safetensors").touch()
    (tmp_path / "v1.safetensors").touch()
    deleted = prune_masters(tmp_path, [2, 3])
    gone = {f"v{version:08d}{kind}.safetensors" for version in (1, 123456789) for kind in ("", ".momentum")}
    assert set(deleted) == gone
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {
        *(f"v{version:08d}{kind}.safetensors" for version in (0, 2, 3) for kind in ("", ".momentum")),
        *(".spare-safetensors", ".spare-momentum.safetensors"),
        *("notes.safetensors", "v1.safetensors"),
    }
