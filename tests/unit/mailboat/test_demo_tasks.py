from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from mailboat.synth import make_notes, pool_notes
from shared.errors import NoRoomError


def test_pooled_notes_are_those_of_all_sites(tmp_path: Path) -> None:
    """Each file of each site, with what is in it."""
    make_notes(tmp_path / "notes", sites=2, notes=3, alpha=2.0, seed=1)
    folders = [tmp_path / "notes" / f"site-{number}" for number in (1, 2)]
    pool_notes(folders, tmp_path / "pooled")
    made = {path.name: path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()}
    pooled = {path.name: path.read_bytes() for path in (tmp_path / "pooled").rglob("*") if path.is_file()}
    assert pooled == made
    assert len(pooled) == 2 * 3 * 2  # text and concepts


def test_a_full_disk_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is named, and no note."""

    def full(_source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))

    make_notes(tmp_path / "notes", sites=1, notes=2, alpha=2.0, seed=1)
    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(NoRoomError) as caught:
        pool_notes([tmp_path / "notes" / "site-1"], tmp_path / "pooled")
    assert caught.value.message == f"{tmp_path / 'pooled'}: the disk is full"
