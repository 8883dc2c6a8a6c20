"""The tensors of a version are compared with their digests when they are taken out, whoever looked at them before."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from coordinator.masters import master_path, writing
from mailboat import modelling
from shared import durable
from shared.digest import file_digest
from shared.errors import ConfigError, CorruptError, RefusedError
from shared.manifest import Manifest, StateFacts
from shared.slices import FileSummary
from shared.store import FrameStore
from tests.unit.shared.transfers import ID, manifest_builder, tensors_of, writer_of


def test_a_state_whose_frames_are_sound_and_whose_whole_is_not_is_refused(tmp_path: Path) -> None:
    """A site that has finished never unpacked its last state: an export is the first to do so."""

    def build(summary: FileSummary) -> Manifest:
        return manifest_builder()(dataclasses.replace(summary, file_digest="ab" * 32))

    store = FrameStore(tmp_path / "states")
    store.seal(writer_of(tensors_of()), build).check_frames()
    subject: Any = SimpleNamespace(storage=tmp_path, parts=(ID,))
    with pytest.raises(RefusedError) as caught:
        modelling._state(subject)
    assert caught.value.rule == "file-hash"


@pytest.mark.parametrize(("retired", "error"), [(False, CorruptError), (True, ConfigError)])
def test_a_master_that_is_written_over_meanwhile_is_not_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, retired: bool, error: type[Exception]
) -> None:
    """The digest is taken after the tensors were read; what is gone by then is said to be gone."""
    path = master_path(tmp_path / "masters", 3)
    path.parent.mkdir()
    values = np.ones(4, np.float32)
    with writing(path, {"w": values.shape}, {}) as writer:
        writer.write("w", values)
    subject: Any = SimpleNamespace(storage=tmp_path, state=StateFacts(version=3), master_digest=file_digest(path))
    np.testing.assert_array_equal(modelling._master(subject)["w"], values)

    def meanwhile(path: Path) -> str:
        if retired:
            durable.retire(path)
        return "ff" * 32

    monkeypatch.setattr(modelling, "file_digest", meanwhile)
    with pytest.raises(error):
        modelling._master(subject)
