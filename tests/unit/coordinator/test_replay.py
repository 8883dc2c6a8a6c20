from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coordinator.journal import Journal
from coordinator.masters import TensorFile, master_path
from coordinator.merging import in_order
from coordinator.proof import prove
from coordinator.publishing import publish
from coordinator.records import Record, VersionCommitted
from coordinator.replay import Recomputed, replay
from coordinator.views import JOURNAL, load_run
from shared.errors import ConfigError, CorruptError
from shared.manifest import manifest_from_bytes
from shared.states import Imprint
from shared.store import FrameStore
from tests.audited import SECTIONS, VERSIONS, AuditedRun, restored, spoilt

FEW = settings(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@pytest.fixture(scope="module", params=SECTIONS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AuditedRun:
    """A run in each mode; each test leaves it as it was."""
    return AuditedRun(tmp_path_factory.mktemp(request.param) / "storage", request.param)


@pytest.fixture
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder."""
    return tmp_path_factory.mktemp("scratch")


def made(run: AuditedRun, scratch: Path, **options: Any) -> list[Recomputed]:
    """All versions that the replay makes, in a new folder below `scratch`."""
    work = scratch / str(len(list(scratch.iterdir())))
    work.mkdir()
    return list(replay(run.storage, run.federation, run.plan, work, **options))


def contents(folder: Path) -> dict[str, str]:
    """Digest of each file of the run; SQLite's own short-lived ones left out."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(f"{JOURNAL}-")
    }


def test_every_version_comes_out_the_same(run: AuditedRun, scratch: Path) -> None:
    """Late updates, momentum and bf16 included, no bit differs in any mode; the run's files are only read."""
    before = contents(run.storage)
    results = made(run, scratch)
    assert [(each.version, each.last, each.differences) for each in results] == [
        (version, VERSIONS, ()) for version in range(VERSIONS + 1)
    ]
    assert [each.updates for each in results[1:]] == [len(record.contributions) for record in run.committed]
    assert contents(run.storage) == before


def test_a_run_that_was_added_up_in_order_of_acceptance_comes_out_the_same(tmp_path: Path, scratch: Path) -> None:
    """Earlier releases did so: the order that is followed is the journal's own."""
    earlier, now = (AuditedRun(tmp_path / name, "sync", order) for name, order in (("a", list), ("b", in_order)))
    assert [each.differences for each in made(earlier, scratch)] == [()] * (VERSIONS + 1)
    assert prove(earlier.storage, earlier.federation, earlier.plan).findings == ()
    assert earlier.committed[-1].master_digest != now.committed[-1].master_digest


def test_the_folder_holds_two_versions_at_most(run: AuditedRun, scratch: Path) -> None:
    """While a version is made, only the one before it lies there, and of published states what a merge will read."""
    seen: list[tuple[int, int]] = []

    def look(_version: int, _share: float) -> None:
        masters = {path.name[:9] for path in scratch.rglob("v*.safetensors")}
        seen.append((len(masters), len(list(scratch.rglob("*.frames")))))

    made(run, scratch, progress=look)
    assert seen
    assert max(masters for masters, _ in seen) <= 2
    most = {"fedasync": VERSIONS + 1, "sync, steps": 4, "fedasync, steps": VERSIONS + 2}
    assert max(states for _, states in seen) <= most.get(run.mode, 2)
    assert {path.name[:9] for path in scratch.rglob("v*.safetensors")} == {f"v{VERSIONS:08d}"}


def test_it_ends_at_the_version_that_was_asked_for(run: AuditedRun, scratch: Path) -> None:
    """Version 1 needs version 0 and no more; one that was never published is a wrong command line."""
    assert [(each.version, each.last) for each in made(run, scratch, upto=1)] == [(0, 1), (1, 1)]
    with pytest.raises(ConfigError, match="there is no version 9"):
        made(run, scratch, upto=9)


@FEW
@given(data=st.data())
def test_a_damaged_frame_is_named_and_nothing_is_made_of_it(
    run: AuditedRun, scratch: Path, data: st.DataObject
) -> None:
    """One bit of a kept update: the version that it is part of, the update and the frame are named, and it ends."""
    version = data.draw(st.integers(1, VERSIONS))
    part = data.draw(st.sampled_from(run.committed[version - 1].contributions))
    path = run.storage / "updates" / f"{part.update_id}.frames"
    bit = data.draw(st.integers(0, 8 * path.stat().st_size - 1))
    lengths = manifest_from_bytes(path.with_suffix(".manifest").read_bytes()).frame_lengths
    frame = next(index for index in range(len(lengths)) if bit // 8 < sum(lengths[: index + 1]))
    with spoilt(path, bit):
        last = made(run, scratch)[-1]
    assert last.version == version
    (finding,) = last.differences
    assert finding.where == f"updates/{part.update_id}.frames: frame {frame}"


@FEW
@given(data=st.data())
def test_one_bit_of_version_0_is_found_before_anything_is_computed(
    run: AuditedRun, scratch: Path, data: st.DataObject
) -> None:
    """The replay stands on version 0, so its digest is compared with row 1 first."""
    path = master_path(run.storage / "masters", 0)
    with spoilt(path, data.draw(st.integers(0, 8 * path.stat().st_size - 1))):
        (only,) = made(run, scratch)
    assert (only.version, [finding.where for finding in only.differences]) == (0, [f"masters/{path.name}"])


@FEW
@given(data=st.data())
def test_one_bit_of_the_journal_is_found(run: AuditedRun, scratch: Path, data: st.DataObject) -> None:
    """A row that was changed breaks the chain there, and nothing is computed."""
    seq = data.draw(st.integers(1, len(run.records)))
    with Journal.open_read(run.storage / JOURNAL) as journal:
        body = next(journal.rows(after=seq - 1)).body
    bit = data.draw(st.integers(0, 8 * len(body) - 1))
    changed = bytes(value ^ (1 << bit % 8) if index == bit // 8 else value for index, value in enumerate(body))
    with run.row_changed(seq, "body", changed), pytest.raises(CorruptError, match=f"row {seq} was changed"):
        made(run, scratch)


def forge(run: AuditedRun, version: int, **fields: Any) -> Any:
    """The run with other values in the record of a version, under a sound chain."""

    def edit(record: Record) -> Sequence[Record]:
        if isinstance(record, VersionCommitted) and record.version == version:
            return [dataclasses.replace(record, **fields)]
        return [record]

    return run.forged(edit)


def row_of(run: AuditedRun, version: int) -> str:
    """Where the record of a version stands."""
    return f"{JOURNAL}: row {run.records.index(run.committed[version - 1]) + 1}"


def test_a_weight_that_the_rules_do_not_give_is_found(run: AuditedRun, scratch: Path) -> None:
    """A journal with another weight in it, its chain recomputed, is caught by the rules."""
    first, *others = run.committed[1].contributions
    with forge(run, 2, contributions=(dataclasses.replace(first, weight=0.123), *others)):
        results = made(run, scratch)
    assert [each.version for each in results] == [0, 1, 2]
    assert [(finding.rule, finding.where) for finding in results[-1].differences] == [("contribution", row_of(run, 2))]
    assert "weight 0.123" in results[-1].differences[0].what


@pytest.mark.parametrize("field", ["master_digest", "optimizer_digest"])
def test_a_digest_that_does_not_come_out_is_found(run: AuditedRun, scratch: Path, field: str) -> None:
    """Master and slots are compared with the journal, each by its own digest; so are slots where there are none."""
    with forge(run, 2, **{field: "ab" * 32}):
        results = made(run, scratch)
    assert [each.version for each in results if each.differences] == [2]
    (finding,) = results[-1].differences
    assert finding.where.startswith(row_of(run, 2))
    assert finding.rule in {field.removesuffix("_digest"), "slots-digest"}


def test_another_published_state_is_found_down_to_the_value(run: AuditedRun, scratch: Path) -> None:
    """A coordinator that published something else than it merged is caught at the first value that differs."""
    version, states = VERSIONS, FrameStore(run.storage / "states")
    with TensorFile(master_path(run.storage / "masters", version)) as tensors:
        values = dict(tensors)
    values["block.1.w"] = values["block.1.w"].copy()
    values["block.1.w"][17] += np.float32(0.01 if run.federation.codec.steps else 1)
    before = load_run(run.storage).versions[version - 1].parts
    imprint = Imprint(run.federation, run.plan.fingerprint, version)
    false, _ = publish(states, imprint, before, values.__getitem__, run.plan.tensors, created=4.0)
    try:
        with forge(run, version, state=false.to_bytes()):
            found = made(run, scratch)[-1].differences
    finally:
        states.delete(false.transfer_id)
    assert found[0].where == f"{row_of(run, version)}: state.transfer_id"
    assert found[1].where == f"states/{false.transfer_id}.frames: tensor block.1.w, value 17"


def test_what_cannot_be_planned_is_found(run: AuditedRun, scratch: Path) -> None:
    """A version of an update that was never accepted is a finding, and not a crash."""
    first, *others = run.committed[0].contributions
    with forge(run, 1, contributions=(dataclasses.replace(first, update_id="ab" * 16), *others)):
        last = made(run, scratch)[-1]
    assert last.version == 1
    assert "unknown-update" in {finding.rule for finding in last.differences}


@pytest.mark.parametrize("name", ["masters/v00000000.safetensors", "updates"])
def test_without_what_it_stands_on_it_does_not_begin(run: AuditedRun, scratch: Path, tmp_path: Path, name: str) -> None:
    """No version 0 or no updates at all: the file is named, and no folder is made in the run's."""
    path = run.storage / name
    path.rename(tmp_path / "away")
    try:
        with pytest.raises(CorruptError, match="is gone"):
            made(run, scratch)
        assert not path.exists()
    finally:
        (tmp_path / "away").rename(path)


def test_a_run_that_has_not_begun(run: AuditedRun, scratch: Path) -> None:
    """A journal without rows is told as such."""
    with run.forged(lambda _record: []), pytest.raises(ConfigError, match="no run has begun"):
        made(run, scratch)


def test_frames_may_be_cut_otherwise(run: AuditedRun, scratch: Path) -> None:
    """Another release of zstd makes other frames of the same file, which is no difference."""
    recorded = manifest_from_bytes(run.committed[0].state)
    lengths = tuple(length + 1 for length in recorded.frame_lengths)
    other = recorded.model_copy(update={"frame_lengths": lengths, "frame_hashes": bytes(len(recorded.frame_hashes))})
    with forge(run, 1, state=other.to_bytes()), restored(run.storage / JOURNAL):
        assert [each.differences for each in made(run, scratch)] == [()] * (VERSIONS + 1)
