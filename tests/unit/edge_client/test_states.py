"""A site's states at rest: steps added up durably, what is to blame when they make no state, and what may go."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3
from safetensors.numpy import load_file

from edge_client import decisions as d
from edge_client.states import States
from shared.config import CodecSection
from shared.manifest import Manifest
from tests.small_run import SmallRun

STEPS = CodecSection(up="f32", down="int8", steps=8, slice_kib=4)


@pytest.fixture
def run(tmp_path: Path) -> SmallRun:
    """A coordinator's folder at version 3: one whole state, three steps."""
    rng = np.random.default_rng(4)
    run = SmallRun(tmp_path / "coordinator", {"w": rng.normal(size=(40, 50)), "b": rng.normal(size=3)}, codec=STEPS)
    for version in range(3):
        run.merge(run.update("x", {"w": rng.normal(0, 0.1, size=(40, 50))}, base=version))
    return run


@pytest.fixture
def states(run: SmallRun, tmp_path: Path) -> States:
    """A site to which all of it has come."""
    shutil.copytree(run.states.root, tmp_path / "site")
    return States(tmp_path / "site", run.federation, run.plan.fingerprint)


def spoil(states: States, manifest: Manifest) -> None:
    """One bit of a transfer is another one."""
    path = states.store.root / f"{manifest.transfer_id}.frames"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_steps_make_the_state_that_the_coordinator_published(run: SmallRun, states: States, tmp_path: Path) -> None:
    """Bit for bit, under the id that its digest gives it; one by one or all together."""
    whole, *steps = run.state_manifests
    together = states.step_on(whole, steps)
    assert isinstance(together, d.StateReady)
    held = whole
    for step in steps:
        came = states.step_on(held, [step])
        assert isinstance(came, d.StateReady)
        held = came.manifest
        assert (held.file_digest, held.version) == (step.leads_to, step.version)
    assert (held.transfer_id, held.frame_hashes) == (together.manifest.transfer_id, together.manifest.frame_hashes)
    assert states.held() == together.manifest
    states.extract(held, tmp_path / "state")
    assert blake3((tmp_path / "state").read_bytes()).hexdigest() == steps[-1].leads_to
    for name, values in run.published(3).items():
        np.testing.assert_array_equal(load_file(tmp_path / "state")[name], values)


def test_version_0_is_in_the_base_model(run: SmallRun, tmp_path: Path) -> None:
    """Sealed from the tensors that the coordinator began with, it is the state that it published."""
    states = States(tmp_path / "new", run.federation, run.plan.fingerprint)
    assert states.held() is None
    states.begin(run.folder / "initial.safetensors")
    held, first = states.held(), run.state_manifests[0]
    assert held is not None
    assert held.model_copy(update={"created": first.created}) == first


def test_making_a_state_again_gives_the_one_that_is_there(run: SmallRun, states: States) -> None:
    """A site that died before it knew does the same again."""
    whole, *steps = run.state_manifests
    first, second = (states.step_on(whole, steps) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("which", [0, 2])
def test_what_is_damaged_is_deleted_and_named(run: SmallRun, states: States, which: int) -> None:
    """A spoilt step alone, or a spoilt base alone; what is sound stays for the next attempt."""
    whole, *steps = run.state_manifests
    broken = run.state_manifests[which]
    spoil(states, broken)
    assert states.step_on(whole, steps) == d.Unmade((broken.transfer_id,))
    assert set(states.store.ids()) == {each.transfer_id for each in run.state_manifests} - {broken.transfer_id}


def test_what_is_gone_is_named(run: SmallRun, states: States) -> None:
    """As when a state is deleted, as damaged, by whoever was to train on it."""
    whole, *steps = run.state_manifests
    states.store.delete(whole.transfer_id)
    assert states.step_on(whole, steps) == d.Unmade((whole.transfer_id,))


def test_steps_for_another_state_make_none_of_ours(run: SmallRun, states: States) -> None:
    """Version 3 needs the step to version 2: left out, the digest is another; all parts are sound, so all go."""
    whole, first, _, third = run.state_manifests
    before = set(states.store.ids())
    assert states.step_on(whole, [first, third]) == d.Unmade(tuple(each.transfer_id for each in (whole, first, third)))
    assert before - set(states.store.ids()) == {each.transfer_id for each in (whole, first, third)}


def test_the_newest_whole_state_is_the_one_that_is_held(run: SmallRun, states: States) -> None:
    """Steps are none, and what cannot be read is passed over."""
    whole, *steps = run.state_manifests
    assert states.held() == whole
    came = states.step_on(whole, steps)
    assert isinstance(came, d.StateReady)
    (states.store.root / f"{came.manifest.transfer_id}.manifest").write_bytes(b"nothing")
    assert states.held() == whole


def test_only_what_is_in_use_stays(run: SmallRun, states: States) -> None:
    """The rest goes, whole or arriving."""
    whole, first, *_ = run.state_manifests
    states.forget_all_but(lambda: {whole.transfer_id, first.transfer_id})
    assert set(states.store.ids()) == {whole.transfer_id, first.transfer_id}
