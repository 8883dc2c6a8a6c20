from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coordinator import admission
from coordinator.admission import NORM_MAX, Admitted
from shared.config import CodecName, CodecSection
from shared.errors import CorruptError, RefusedError
from shared.slices import FrameWriter
from shared.store import Stored
from shared.tensorfile import DType, build_header
from tests.small_run import SmallRun

PLAN: dict[str, Any] = {"a": np.zeros(600), "b.w": np.zeros((20, 30)), "c": np.zeros(1)}


def small_run(folder: Path, up: Any = "f32") -> SmallRun:
    """A run with three tensors."""
    return SmallRun(folder, PLAN, codec=CodecSection(up=up, down="f32", slice_kib=4))


def raw_update(run: SmallRun, tensors: list[tuple[str, DType, Any]]) -> Stored:
    """Seal a well-formed file of whatever tensors, which no codec of ours would write."""
    arrays = [(name, dtype, np.asarray(values)) for name, dtype, values in sorted(tensors, key=lambda each: each[0])]
    head = build_header([(name, dtype, array.shape) for name, dtype, array in arrays], {})
    return raw_file(run, head + b"".join(array.tobytes() for _, _, array in arrays))


def raw_file(run: SmallRun, content: bytes) -> Stored:
    """Seal any bytes at all."""
    return run.seal_frames(FrameWriter([content], group=4, slice_size=4096), "hostile")


def refused(run: SmallRun, stored: Stored) -> str:
    """The rule under which an update is refused."""
    with pytest.raises(RefusedError) as caught:
        admission.verify(stored, run.plan)
    return caught.value.rule


def test_the_norm_by_hand(tmp_path: Path) -> None:
    """The L2 norm over all tensors together: sqrt(3^2 + 4^2 + 12^2) = 13."""
    delta: dict[str, Any] = {name: np.zeros(values.shape) for name, values in PLAN.items()}
    delta["a"][5], delta["b.w"][3, 4], delta["c"][0] = 3, -4, 12
    run = small_run(tmp_path)
    assert admission.verify(run.seal("x", delta), run.plan) == Admitted(norm=13.0, tensors=3)


def test_some_of_the_tensors_are_enough(tmp_path: Path) -> None:
    """A site may train fewer layers than the plan has."""
    run = small_run(tmp_path)
    assert admission.verify(run.seal("x", {"c": [2.0]}), run.plan) == Admitted(norm=2.0, tensors=1)


@pytest.mark.parametrize("up", get_args(CodecName))
def test_the_norm_is_that_of_what_will_be_merged(tmp_path: Path, up: Any) -> None:
    """For each codec: the norm of the decoded delta, companions not counted as tensors."""
    run = small_run(tmp_path, up)
    rng = np.random.default_rng(3)
    stored = run.seal("x", {name: rng.normal(0, 1, values.shape) for name, values in PLAN.items()})
    with stored.open_tensors() as reader:
        expected = math.sqrt(sum(float((values.astype(np.float64) ** 2).sum()) for _, values in reader.tensors()))
    admitted = admission.verify(stored, run.plan)
    assert admitted.norm == pytest.approx(expected, rel=1e-12)
    assert admitted.tensors == 3


def test_the_norm_is_summed_in_float64(tmp_path: Path) -> None:
    """Squares that float32 would lose or overflow count: 2^60 beside 600 ones, and 1e-30 alone."""
    run = small_run(tmp_path)
    tiny = admission.verify(run.seal("x", {"c": [1e-30]}), run.plan)
    assert tiny.norm == pytest.approx(1e-30, rel=1e-6)
    large = admission.verify(run.seal("y", {"a": np.full(600, 2.0**58)}), run.plan)
    assert large.norm == pytest.approx(2.0**58 * math.sqrt(600), rel=1e-12)


@pytest.mark.parametrize(
    ("tensors", "rule"),
    [
        ([], "no-tensors"),
        ([("other", "F32", np.zeros(3, np.float32))], "unknown-tensor"),
        ([("a", "F32", np.zeros(599, np.float32))], "wrong-shape"),
        ([("a", "F32", np.zeros((1, 600), np.float32))], "wrong-shape"),
        ([("b.w", "F32", np.zeros((30, 20), np.float32))], "wrong-shape"),
        ([("c", "F64", np.zeros(1))], "codec-parts"),
        ([("c", "BF16", np.zeros(1, np.uint16))], "codec-parts"),
        ([("c", "F32", np.zeros(1, np.float32)), ("c.scale", "I8", np.zeros(1, np.int8))], "codec-parts"),
        ([("c", "F32", np.array([np.nan], np.float32))], "non-finite"),
        ([("c", "F32", np.array([-np.inf], np.float32))], "non-finite"),
        ([("a", "F32", np.where(np.arange(600) == 599, np.inf, 0).astype(np.float32))], "non-finite"),
        ([("c", "F32", np.array([3e38], np.float32))], "norm-bound"),
    ],
)
def test_each_rule_on_a_wellformed_file(tmp_path: Path, tensors: list[tuple[str, DType, Any]], rule: str) -> None:
    """A file that is sound safetensors but not an update of this plan is refused under its rule."""
    run = small_run(tmp_path)
    assert refused(run, raw_update(run, tensors)) == rule


def test_a_scale_that_is_not_a_number(tmp_path: Path) -> None:
    """A quantised tensor with a poisoned scale is refused before it is decoded."""
    run = small_run(tmp_path, "int8")
    stored = run.seal_frames(
        FrameWriter(
            [
                build_header([("c", "I8", (1,)), ("c.scale", "BF16", (1,))], {}),
                b"\x01" + b"\xc0\x7f",
            ],
            group=1,
            slice_size=4096,
        ),
        "hostile",
    )
    assert refused(run, stored) == "codec-scale"


def test_the_bound_lets_sound_deltas_pass(tmp_path: Path) -> None:
    """Exactly at the bound is allowed."""
    run = small_run(tmp_path)
    assert admission.verify(run.seal("x", {"c": [NORM_MAX]}), run.plan).norm == NORM_MAX


def test_another_file_than_announced(tmp_path: Path) -> None:
    """When all frames are as announced but the file's digest is not, the manifest lied."""
    run = small_run(tmp_path)
    stored = run.seal("x", {"c": [1.0]})
    lying = stored.manifest.model_copy(update={"file_digest": "00" * 32})
    assert refused(run, Stored(lying, stored.path, stored.offsets)) == "file-hash"


def test_a_frame_that_rotted_is_not_blamed_on_the_site(tmp_path: Path) -> None:
    """Frames are hashed as they arrive; one that is different now is our disk's fault."""
    run = small_run(tmp_path)
    stored = run.seal("x", {"a": np.arange(600)})
    data = bytearray(stored.path.read_bytes())
    data[10] ^= 4
    stored.path.write_bytes(data)
    with pytest.raises(CorruptError):
        admission.verify(stored, run.plan)


GARBAGE: dict[str, Callable[[bytes], bytes]] = {
    "nothing of a header": lambda _: b"\0",
    "zeros": lambda data: bytes(len(data)),
    "cut": lambda data: data[:-1],
    "longer": lambda data: data + b"\0",
    "header only": lambda data: data[:40],
    "huge header": lambda data: b"\xff" * 8 + data[8:],
}


@pytest.mark.parametrize("kind", GARBAGE)
def test_files_that_are_no_safetensors_files(tmp_path: Path, kind: str) -> None:
    """Bytes that a site hashed and announced truly, but that are no tensor file, break a rule of the format."""
    run = small_run(tmp_path)
    content = build_header([("c", "F32", (1,))], {}) + bytes(4)
    assert refused(run, raw_file(run, GARBAGE[kind](content))).startswith(("header-", "tensor-", "file-"))


@settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=60
)
@given(data=st.data())
def test_no_change_to_a_file_escapes_as_another_error(tmp_path: Path, data: st.DataObject) -> None:
    """Whatever bytes of a true file a site changes, the answer is admission or a named rule, never a traceback."""
    run = small_run(tmp_path)
    content = bytearray(build_header([("a", "F32", (600,)), ("c", "F32", (1,))], {}) + bytes(2404))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, 160) | st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    stored = raw_file(run, bytes(content))
    with contextlib.suppress(RefusedError):
        assert math.isfinite(admission.verify(stored, run.plan).norm)
    run.updates.delete(stored.manifest.transfer_id)
