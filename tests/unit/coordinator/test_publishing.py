"""What the sites get of a version: the formula by hand, errors that do not add up, and whole states in their turn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3

from coordinator.masters import TensorFile, master_path
from coordinator.publishing import publish
from edge_client.statefile import read_blocks
from shared.codec import decode_add, encode
from shared.config import AggregationSection, CodecName, CodecSection
from shared.errors import RefusedError
from shared.manifest import StateFacts, StepFacts
from shared.states import Imprint, extract_state
from tests.small_run import SmallRun

ASYNC = AggregationSection(mode="fedasync", alpha=1.0)


def stepped(folder: Path, initial: dict[str, object], *, down: CodecName = "int8", steps: int = 2) -> SmallRun:
    """A run whose versions travel as steps."""
    return SmallRun(folder, initial, codec=CodecSection(up="f32", down=down, steps=steps, slice_kib=4))


def test_a_step_is_the_rounded_difference_and_what_is_left_over_comes_with_the_next(tmp_path: Path) -> None:
    """QAFeL by hand, with the scale 1 of a block whose largest difference is 127.

    Published (0, 0, 0), master (127, 2.25, -3.5): the step says (127, 2, -4), as -3.5 rounds to even. The master then
    moves by (0, 0, 126.5), to (127, 2.25, 123): the difference to what is published, not to the master before, is
    (0, 0.25, 127). A quarter of the scale is nearer to none, and stays for later: alone it is the largest, and the step
    says all of it, to within the half of a 256th by which its scale is rounded.
    """
    run = stepped(tmp_path, {"a": [0, 0, 0]})
    run.merge(run.update("x", {"a": [127, 2.25, -3.5]}))
    assert run.published(1)["a"].tolist() == [127, 2, -4]
    run.merge(run.update("x", {"a": [0, 0, 126.5]}, base=1))
    assert run.master(2)["a"] == [127, 2.25, 123]
    assert run.published(2)["a"].tolist() == [127, 2, 123]
    run.merge(run.update("x", {"a": [0, 0, 0]}, base=2))
    assert run.published(3)["a"].tolist() == [127, pytest.approx(2.25, abs=0.25 / 256), 123]


@pytest.mark.parametrize("down", ["f32", "bf16", "int8", "int4"])
def test_rounding_does_not_add_up(tmp_path: Path, down: CodecName) -> None:
    """After thirty versions what is published is off by the rounding of the last difference alone."""
    rng = np.random.default_rng(2)
    run = stepped(tmp_path, {"a": rng.normal(size=2000)}, down=down, steps=8)
    for version in range(30):
        run.merge(run.update("x", {"a": rng.normal(0, 0.01, size=2000)}, base=version))
    off = np.abs(np.asarray(run.master(30)["a"], dtype=np.float32) - run.published(30)["a"]).max()
    last = np.abs(np.asarray(run.master(30)["a"], dtype=np.float32) - run.published(29)["a"]).max()
    bound = {
        "f32": 2**-22,
        "bf16": last * 2**-8 + 2**-22,
        "int8": 0.502 * last / 127 + 2**-22,
        "int4": 0.502 * last / 7,
    }[down]
    assert off <= bound


def test_coordinator_and_site_make_the_same_state_bit_for_bit(tmp_path: Path) -> None:
    """Added up in memory from what travels alone: each digest in a step is that of the plain file of that state."""
    rng = np.random.default_rng(3)
    run = stepped(tmp_path, {"w": rng.normal(size=(40, 33)), "w-x": rng.normal(size=7), "w.y": rng.normal(size=())})
    for version in range(4):
        update = {name: rng.normal(0, 0.1, size=values.shape) for name, values in run.published(0).items()}
        run.merge(run.update("x", update, base=version))
    replica = run.published(0)
    for version in range(1, 5):
        with TensorFile(master_path(run.masters, version)) as master:
            for name in replica:
                parts = encode(name, np.subtract(master[name], replica[name]), "int8")
                decode_add([array for _, _, array in parts], "int8", 1.0, replica[name])
        path = tmp_path / f"{version}.safetensors"
        extract_state(run.states, run.parts(version), path)
        step = run.state_manifests[version].step
        assert blake3(path.read_bytes()).hexdigest() == step.state_digest
        assert step.base_digest == run.state_manifests[version - 1].leads_to
        for name, values in run.published(version).items():
            np.testing.assert_array_equal(values, replica[name])


def test_every_so_many_versions_the_state_comes_whole_as_well(tmp_path: Path) -> None:
    """With steps = 2: version 0 whole, 1 a step, 2 both, 3 a step, 4 both; the anchor has the digest of its step."""
    run = stepped(tmp_path, {"a": [1.0, 2.0]})
    for version in range(4):
        run.merge(run.update("x", {"a": [0.5, version]}, base=version))
    facts = [type(manifest.facts) for manifest in run.state_manifests]
    assert facts == [StateFacts, StepFacts, StepFacts, StepFacts, StepFacts]
    assert sorted(run.anchors) == [2, 4]
    for version, anchor in run.anchors.items():
        assert (anchor.facts, anchor.codec) == (StateFacts(version=version), "f32")
        assert anchor.file_digest == run.state_manifests[version].leads_to
    assert len(run.states.ids()) == 7


def test_version_0_is_the_master_itself(tmp_path: Path) -> None:
    """Nothing is rounded: it travels in float32, whatever the codec of the steps."""
    run = stepped(tmp_path, {"a": [1 / 3, 1e-20, -7.0]})
    (first,) = run.state_manifests
    assert (first.codec, first.facts) == ("f32", StateFacts(version=0))
    assert run.published(0)["a"].tolist() == run.master(0)["a"]


def test_making_a_version_again_gives_the_same_files(tmp_path: Path) -> None:
    """A coordinator that died before the row merges again, and publishes under the same names."""
    run = stepped(tmp_path, {"a": [1.0, 2.0]}, steps=1)
    plan = run.planned([run.update("x", {"a": [0.5, 0.25]})])
    results = [run.run_plan(plan) for _ in range(2)]
    assert results[0] == results[1]
    assert len(run.states.ids()) == 3


def test_fedasync_mixes_what_a_late_site_started_from(tmp_path: Path) -> None:
    """With alpha 1 the master becomes the published state of version 1, made by a step, plus the delta: exactly."""
    run = SmallRun(
        tmp_path, {"a": [0, 0, 0]}, aggregation=ASYNC, codec=CodecSection(up="f32", down="int8", steps=8, slice_kib=4)
    )
    run.merge(run.update("x", {"a": [127, 2.25, -3.5]}))
    run.merge(run.update("y", {"a": [0, 0, 1]}, base=1))
    assert run.published(1)["a"].tolist() == [127, 2, -4]
    assert run.master(2)["a"] == [127, 2, -3]


def test_the_blocks_to_train_are_said_by_step_and_state_alike(tmp_path: Path) -> None:
    """Where importance chooses: with each version anew, however the state came, and part of its digest."""
    run = stepped(tmp_path, {"a": np.zeros(9)})
    parts = run.parts(0)
    for version, blocks in ((1, (1, 3)), (2, (0, 3))):
        imprint = Imprint(run.federation, run.plan.fingerprint, version, blocks)
        master = {"a": np.full(9, version, np.float32)}
        step, whole = publish(run.states, imprint, parts, master.__getitem__, run.plan.tensors)
        parts = (*parts, step.transfer_id)
        extract_state(run.states, parts, tmp_path / f"{version}")
        assert blake3((tmp_path / f"{version}").read_bytes()).hexdigest() == step.leads_to
        assert read_blocks(tmp_path / f"{version}") == blocks
    assert whole is not None
    extract_state(run.states, (whole.transfer_id,), tmp_path / "whole")
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "2").read_bytes()


def test_a_master_that_has_overflowed_is_not_published(tmp_path: Path) -> None:
    """Whether the difference is no number any more, or the state that it would make."""
    run = stepped(tmp_path, {"a": [1.6e38, 1.0]})
    imprint = Imprint(run.federation, run.plan.fingerprint, 1)
    for too_much in (2e38, -2e38, np.inf, np.nan):
        master = {"a": np.array([too_much, 0], dtype=np.float32)}
        with pytest.raises(RefusedError) as refused:
            publish(run.states, imprint, run.parts(0), master.__getitem__, run.plan.tensors)
        assert refused.value.rule == "non-finite"
    assert run.states.ids() == [run.state_manifests[0].transfer_id]
