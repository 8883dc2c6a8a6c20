"""Updates given up where versions travel as steps: a replay begins at a step, and makes it from the state before."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from coordinator.fsck import check
from coordinator.journal import Journal
from coordinator.proof import prove
from coordinator.pruning import prune
from coordinator.records import Record, VersionCommitted
from coordinator.replay import Recomputed, replay
from coordinator.views import JOURNAL, load_run
from shared.config import CodecSection
from shared.errors import CorruptError
from shared.manifest import Manifest, manifest_from_bytes
from shared.store import FrameStore
from tests.audited import SECTIONS, VERSIONS, AuditedRun, spoilt

UPTO = VERSIONS - 1
LATE = 8
"""A seed by which the last update of a fedasync run starts from version 0."""
MODES = [mode for mode in SECTIONS if not mode.endswith("steps")]


def stepped(folder: Path, mode: str, steps: int, *, seed: int = 7) -> AuditedRun:
    """A run whose versions travel as steps, every so many-th whole besides, and that has given up what it can."""
    run = AuditedRun(folder / "storage", mode, codec=CodecSection(down="int4", steps=steps, slice_kib=4), seed=seed)
    prune(run.storage, run.federation, run.plan)
    return run


def made(run: AuditedRun, scratch: Path) -> list[Recomputed]:
    """All versions that can be made again."""
    scratch.mkdir()
    return list(replay(run.storage, run.federation, run.plan, scratch))


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("mode", MODES)
def test_the_rest_is_made_again_bit_for_bit(tmp_path: Path, mode: str, steps: int) -> None:
    """However updates are merged, and whichever of the versions around it can be had whole."""
    run = stepped(tmp_path, mode, steps)
    states = {path.name for path in (run.storage / "states").iterdir()}
    found = [(each.version, each.differences) for each in made(run, tmp_path / "scratch")]
    assert found == [(UPTO, ()), (VERSIONS, ())]
    assert prove(run.storage, run.federation, run.plan).findings == ()
    assert check(run.storage, run.federation, run.plan, repair=True).problems == ()
    assert {path.name for path in (run.storage / "states").iterdir()} == states


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_states_from_which_late_updates_start_are_taken(tmp_path: Path, steps: int) -> None:
    """In fedasync a merge reads the state that its update starts from, here version 0 for version 3."""
    run = stepped(tmp_path, "fedasync", steps, seed=LATE)
    (late,) = run.committed[-1].contributions
    assert (late.base_version, late.staleness) == (0, UPTO)
    assert [each.differences for each in made(run, tmp_path / "scratch")] == [(), ()]
    (part,) = load_run(run.storage).versions[0].parts
    with spoilt(run.storage / "states" / f"{part}.frames", 8 * 40):
        first, *others = made(run, tmp_path / "again")
    assert (first.version, others) == (UPTO, [])
    assert {finding.where for finding in first.differences} == {f"states/{part}.frames: frame 0"}


@pytest.mark.parametrize("version", range(UPTO))
def test_a_spoilt_part_is_named(tmp_path: Path, version: int) -> None:
    """One of which the state before the first version is made; when it is lost, there is nothing to begin with."""
    run = stepped(tmp_path, "sync", 3)
    part = load_run(run.storage).versions[version].parts[-1]
    frames = run.storage / "states" / f"{part}.frames"
    with spoilt(frames, 8 * 40):
        (first,) = made(run, tmp_path / "scratch")
    assert first.version == UPTO
    assert [finding.where for finding in first.differences] == [f"states/{part}.frames: frame 0"]
    frames.unlink()
    with pytest.raises(CorruptError, match=f"{part}.frames is gone"):
        made(run, tmp_path / "again")


def test_steps_that_add_up_to_another_state_are_found(tmp_path: Path) -> None:
    """A journal and a folder that agree on a digest which the steps do not make: the sum is compared, too."""
    run = AuditedRun(tmp_path / "storage", "sync", codec=CodecSection(down="int4", steps=3, slice_kib=4))
    states, false = FrameStore(run.storage / "states"), "ab" * 32

    def lied(record: Record) -> list[Record]:
        if not isinstance(record, VersionCommitted) or record.version > UPTO:
            return [record]
        told = {1: {"state_digest": false}, 2: {"base_digest": false}}[record.version]
        return [dataclasses.replace(record, state=_telling(states, record.state, told).to_bytes())]

    prune(run.storage, run.federation, run.plan)
    with Journal.open_read(run.storage / JOURNAL) as journal:
        run.records = list(journal.replay())
    with run.forged(lied):
        (first,) = made(run, tmp_path / "scratch")
    assert [finding.rule for finding in first.differences] == ["state-digest"]
    assert false[:12] in first.differences[0].what


def _telling(states: FrameStore, state: bytes, facts: dict[str, Any]) -> Manifest:
    """The manifest with other facts, in the folder as well."""
    manifest = manifest_from_bytes(state)
    other = manifest.model_copy(update={"facts": manifest.facts.model_copy(update=facts)})
    (states.root / f"{other.transfer_id}.manifest").write_bytes(other.to_bytes())
    return other


@pytest.mark.parametrize(("version", "mended"), [(1, False), (2, True), (3, True)])
def test_a_lost_step_is_made_again_from_there_on(tmp_path: Path, version: int, mended: bool) -> None:
    """The one to the version where replays begin, and each later one; what led to it only a backup has."""
    run = stepped(tmp_path, "sync", 3)
    part = manifest_from_bytes(run.committed[version - 1].state).transfer_id
    frames = run.storage / "states" / f"{part}.frames"
    sound = frames.read_bytes()
    frames.unlink()
    (problem,) = check(run.storage, run.federation, run.plan, repair=True).problems
    assert (problem.where, problem.repaired) == (f"states/{part}.frames", mended)
    assert frames.exists() == mended
    assert not mended or frames.read_bytes() == sound
    assert mended or "restore it from a backup" in problem.advice
