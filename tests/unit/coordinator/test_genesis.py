from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from coordinator.genesis import open_run
from coordinator.masters import master_path
from shared.config import CodecSection
from shared.errors import ConfigError
from shared.manifest import manifest_from_bytes
from tests.small_run import SmallRun

INITIAL = {"b.w": [[1.0, 2.0], [3.0, 4.5]], "a": [0.1]}


def test_version_zero_is_what_sealing_wrote(tmp_path: Path) -> None:
    """The master holds the very values, the published state the same as its codec rounds them."""
    run = SmallRun(tmp_path, INITIAL, codec=CodecSection(up="f32", down="bf16", slice_kib=4))
    assert run.master(0) == {"a": [float(np.float32(0.1))], "b.w": INITIAL["b.w"]}
    assert run.published(0)["a"].tolist() == [0.10009765625]


def test_the_record_says_what_was_agreed(tmp_path: Path) -> None:
    """Fingerprint, hashes and the state's manifest are those of the plan and the files."""
    run = SmallRun(tmp_path, INITIAL)
    opened, manifest = run.opened, manifest_from_bytes(run.opened.state)
    assert opened.fingerprint == run.plan.fingerprint == manifest.fingerprint
    assert (opened.config_sha256, opened.frozen_sha256) == (run.plan.config_sha256, run.plan.frozen_sha256)
    assert (manifest.state.version, manifest.federation, manifest.created) == (0, "north", 1.0)
    assert run.states.ids() == [manifest.transfer_id]


def test_opening_again_gives_the_same(tmp_path: Path) -> None:
    """After a crash before the record was stored, opening is repeated and gives the same record and files."""
    run = SmallRun(tmp_path, INITIAL)
    before = master_path(run.masters, 0).read_bytes()
    again = open_run(tmp_path, run.federation, run.plan, tmp_path / "initial.safetensors", created=1.0)
    assert again == run.opened
    assert master_path(run.masters, 0).read_bytes() == before


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        ({"a": np.zeros(1, np.float32)}, "lacks b.w"),
        ({"a": [0.1], "b.w": np.zeros((2, 2)), "c": [1.0]}, "does not name: c"),
        ({"a": [0.1], "b.w": np.zeros((4, 1))}, r"b.w has shape \(4, 1\), the plan says \(2, 2\)"),
        ({"a": [np.nan], "b.w": np.zeros((2, 2))}, "tensor a holds NaN"),
        ({"a": [3e38], "b.w": np.zeros((2, 2))}, "tensor a holds"),
    ],
    ids=["missing", "too many", "shape", "nan", "huge"],
)
def test_an_initial_file_that_does_not_fit_the_plan(tmp_path: Path, tensors: dict[str, Any], named: str) -> None:
    """The error names file and tensor and says what to do; the hint is to seal again."""
    run = SmallRun(tmp_path / "run", INITIAL)
    path = tmp_path / "initial.safetensors"
    save_file({name: np.asarray(values, dtype=np.float32) for name, values in tensors.items()}, path)
    with pytest.raises(ConfigError, match=named) as caught:
        open_run(tmp_path / "new", run.federation, run.plan, path)
    assert str(path) in caught.value.message
    assert "seal" in caught.value.hint


def test_an_initial_file_of_another_type(tmp_path: Path) -> None:
    """bfloat16 or float64 would not be version 0 as sealed."""
    run = SmallRun(tmp_path / "run", INITIAL)
    save_file({"a": np.zeros(1), "b.w": np.zeros((2, 2))}, tmp_path / "i")
    with pytest.raises(ConfigError, match="tensor a is F64"):
        open_run(tmp_path / "new", run.federation, run.plan, tmp_path / "i")


@pytest.mark.parametrize("content", [None, b"", b"no tensors here, but some bytes"])
def test_no_initial_file_at_all(tmp_path: Path, content: bytes | None) -> None:
    """A missing file and one that is no safetensors file are told by name."""
    run = SmallRun(tmp_path / "run", INITIAL)
    if content is not None:
        (tmp_path / "i").write_bytes(content)
    with pytest.raises(ConfigError, match=str(tmp_path / "i")):
        open_run(tmp_path / "new", run.federation, run.plan, tmp_path / "i")
