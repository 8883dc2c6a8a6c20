"""fsck: what a crash leaves is told and removed, what can be made again is, and what cannot be is named."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from coordinator.fsck import Checked, check
from coordinator.journal import Journal
from coordinator.ledger import Ledger
from coordinator.masters import master_path
from coordinator.means import CACHE_LOST
from coordinator.records import Accepted, Finished, Rejected, VersionCommitted
from coordinator.rows import ARCHIVE
from coordinator.views import JOURNAL
from shared.audit import AuditLog
from shared.errors import ConfigError, UnavailableError
from shared.messages import LOST
from shared.store import FrameStore
from tests.audited import TRAIL, VERSIONS, AuditedRun, flipped
from tests.factories import digest

OTHER = digest("another update")[:32]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> AuditedRun:
    """A run that no test touches."""
    return AuditedRun(tmp_path_factory.mktemp("run") / "storage", "sync")


@pytest.fixture
def run(original: AuditedRun, tmp_path: Path) -> AuditedRun:
    """A copy of it."""
    copy = object.__new__(AuditedRun)
    vars(copy).update(vars(original), storage=Path(shutil.copytree(original.storage, tmp_path / "storage")))
    return copy


def checked(run: AuditedRun, *, repair: bool = False) -> Checked:
    """What fsck says."""
    return check(run.storage, run.federation, run.plan, repair=repair)


def told(found: Checked) -> list[tuple[str, str, bool]]:
    """Kind, rule and whether it is repaired, of each problem."""
    return [(each.kind, each.rule, each.repaired) for each in found.problems]


def files(run: AuditedRun) -> set[str]:
    """All files of the run."""
    return {str(path.relative_to(run.storage)) for path in run.storage.rglob("*") if path.is_file()}


def append(run: AuditedRun, *records: Accepted | Rejected | Finished) -> None:
    """Let the coordinator record something more."""
    with Journal(run.storage / JOURNAL) as journal:
        journal.append(records)
        AuditLog(run.storage / TRAIL, journal.rows)


def copied(run: AuditedRun, update: Accepted) -> None:
    """Lay an update's bytes there under an id that the journal does not know."""
    store = FrameStore(run.storage / "updates")
    stored = store.get(update.update_id)
    assert stored is not None
    manifest = stored.manifest.model_copy(update={"transfer_id": OTHER})
    (store.root / f"{OTHER}.manifest").write_bytes(manifest.to_bytes())
    shutil.copy(stored.path, store.root / f"{OTHER}.frames")


def test_a_sound_run_has_no_problem(run: AuditedRun) -> None:
    """Nothing is said, and no file appears, changes or goes, with repair or without."""
    before = files(run)
    for repair in (False, True):
        found = checked(run, repair=repair)
        assert found.problems == ()
        assert (found.version, found.updates) == (VERSIONS, len(run.accepted))
    assert files(run) - before == {f"{JOURNAL}.lock"} - before


def rejected_leftover(run: AuditedRun) -> str:
    """The record says rejected; the crash came before the bytes went."""
    copied(run, run.accepted[0])
    append(run, Rejected(OTHER, "north", digest("m"), "non-finite", "", 9.0))
    return "rejected-update"


def uncommitted_state(run: AuditedRun) -> str:
    """A merge has written its state and its master, and nothing was committed."""
    store = FrameStore(run.storage / "states")
    (first, *_) = store.ids()
    stored = store.get(first)
    assert stored is not None
    facts = stored.manifest.state.model_copy(update={"version": VERSIONS + 1})
    manifest = stored.manifest.model_copy(update={"transfer_id": OTHER, "facts": facts})
    (store.root / f"{OTHER}.manifest").write_bytes(manifest.to_bytes())
    shutil.copy(stored.path, store.root / f"{OTHER}.frames")
    return "uncommitted-state"


def stale_master(run: AuditedRun) -> str:
    """The master of a version that never was."""
    shutil.copy(master_path(run.storage / "masters", 0), master_path(run.storage / "masters", VERSIONS + 1))
    return "stale-master"


def stale_upload(run: AuditedRun) -> str:
    """An update that was arriving when the run ended."""
    copied(run, run.accepted[0])
    (run.storage / "updates" / f"{OTHER}.manifest").rename(run.storage / "updates" / f"{OTHER}.part.manifest")
    append(run, Finished(VERSIONS, 10.0))
    return "stale-upload"


def damaged_upload(run: AuditedRun) -> str:
    """An undecided update whose manifest the disk has spoilt."""
    (run.storage / "updates" / f"{OTHER}.part.manifest").write_bytes(b"\0\0\0")
    (run.storage / "updates" / f"{OTHER}.frames").write_bytes(bytes(100))
    return "damaged-upload"


def loose_segment(run: AuditedRun) -> str:
    """A compaction that was killed before its commit."""
    (run.storage / ARCHIVE).mkdir()
    (run.storage / ARCHIVE / "rows-000000000001-000000000004.sqlite").write_bytes(b"half")
    return "loose-segment"


def litter(run: AuditedRun) -> str:
    """A file under a temporary name."""
    (run.storage / "masters" / ".tmp-0123").write_bytes(b"half")
    return "litter"


def measured(run: AuditedRun) -> str:
    """A model whose loss was being measured."""
    (run.storage / "validation").mkdir()
    (run.storage / "validation" / f"{OTHER}.safetensors").write_bytes(b"half")
    return "litter"


def scratch(run: AuditedRun) -> str:
    """A repair that was killed while it computed versions again."""
    (run.storage / ".tmp-45" / "masters").mkdir(parents=True)
    (run.storage / ".tmp-45" / "masters" / "v00000001.safetensors").write_bytes(b"half")
    return "litter"


LEFTOVERS: list[Callable[[AuditedRun], str]] = [
    rejected_leftover,
    uncommitted_state,
    stale_upload,
    damaged_upload,
    loose_segment,
    litter,
    measured,
    scratch,
]


@pytest.mark.parametrize("leave", LEFTOVERS)
def test_leftovers_are_told_and_removed_on_demand(run: AuditedRun, leave: Callable[[AuditedRun], str]) -> None:
    """A check changes nothing and names the rule; a repair removes the leftover and nothing else."""
    before = files(run)
    rule = leave(run)
    odd = {("damage", each) for each in ("last-version", "left-pending")}  # the sample run ends before its last version
    left = files(run)
    assert [each for each in told(checked(run)) if each[:2] not in odd] == [("leftover", rule, False)]
    assert files(run) - left <= {f"{JOURNAL}.lock"}
    assert [each for each in told(checked(run, repair=True)) if each[:2] not in odd] == [("leftover", rule, True)]
    assert files(run) == before | {f"{JOURNAL}.lock"}
    assert [each for each in told(checked(run)) if each[:2] not in odd] == []


def test_the_master_of_an_unfinished_merge_goes(run: AuditedRun) -> None:
    """Its version was never committed; the masters that a restart needs stay."""
    stale_master(run)
    stale = {each.where for each in checked(run, repair=True).problems}
    assert f"masters/v{VERSIONS + 1:08d}.safetensors" in stale
    assert master_path(run.storage / "masters", VERSIONS).exists()
    assert master_path(run.storage / "masters", 0).exists()


def spoil(path: Path) -> None:
    """Turn one bit over in the middle."""
    data = path.read_bytes()
    path.write_bytes(flipped(data, 4 * len(data)))


def current_state(run: AuditedRun) -> Path:
    """Frames of the newest published state."""
    with Journal.open_read(run.storage / JOURNAL) as journal:
        ledger = Ledger()
        for record in journal.replay():
            ledger.apply(record)
    return run.storage / "states" / f"{ledger.newest.digest[:32]}.frames"


def test_what_can_be_made_again_is(run: AuditedRun) -> None:
    """A rotten state, a state that is gone, the newest master, a slot and the trail come back, byte for byte."""
    state = current_state(run)
    other = next(each for each in sorted(state.parent.glob("*.frames")) if each != state)
    master = master_path(run.storage / "masters", VERSIONS)
    slot = next((run.storage / "masters").glob(f"v{VERSIONS:08d}.momentum*"))
    trail = run.storage / TRAIL
    before = {path: path.read_bytes() for path in (state, other, master, slot, trail)}
    spoil(state)
    other.unlink()
    other.with_suffix(".manifest").unlink()
    spoil(master)
    slot.unlink()
    trail.write_bytes(b"")
    rules = {each.rule for each in checked(run).problems}
    assert rules == {"frame-hash", "transfer-gone", "master-digest", "slots-gone", "audit-short"}
    found = checked(run, repair=True)
    assert {each.repaired for each in found.problems if each.kind == "damage"} == {True}
    assert {path: path.read_bytes() for path in before} == before
    assert [each for each in told(checked(run)) if each[0] == "damage"] == []


def test_a_counted_update_that_is_gone_is_named(run: AuditedRun) -> None:
    """Version, update and chunk are told with what to do; nothing is pretended, and a repair does not touch it."""
    gone, rotten = run.accepted[0], run.accepted[1]
    (run.storage / "updates" / f"{gone.update_id}.frames").unlink()
    (run.storage / "updates" / f"{gone.update_id}.manifest").unlink()
    spoil(run.storage / "updates" / f"{rotten.update_id}.frames")
    found = checked(run, repair=True)
    first, second = sorted(found.problems, key=lambda each: each.rule)
    assert (first.rule, second.rule) == ("frame-hash", "transfer-gone")
    assert first.where.startswith(f"updates/{rotten.update_id}.frames: frame ")
    assert second.where == f"updates/{gone.update_id}.manifest"
    assert "version 1 stands, but it cannot be recomputed" in second.advice
    assert (first.repaired, second.repaired) == (False, False)


def pending_and_rotten(run: AuditedRun) -> Path:
    """An update that was accepted, waits to be merged, and has rotted meanwhile; returns its frames."""
    copied(run, run.accepted[0])
    manifest = run.storage / "updates" / f"{OTHER}.manifest"
    sha256 = hashlib.sha256(manifest.read_bytes()).hexdigest()
    append(run, dataclasses.replace(run.accepted[0], update_id=OTHER, manifest_sha256=sha256))
    assert told(checked(run)) == []
    spoil(manifest.with_suffix(".frames"))
    return manifest.with_suffix(".frames")


def fate(run: AuditedRun) -> tuple[str, str | None]:
    """What the journal says of that update."""
    with Journal.open_read(run.storage / JOURNAL) as journal:
        ledger = Ledger()
        for record in journal.replay():
            ledger.apply(record)
    return ledger.known[OTHER].outcome, ledger.known[OTHER].rule


def test_a_lost_update_is_given_up_on_demand_only(run: AuditedRun) -> None:
    """A repair leaves it, and says how to go on; the demand drops it under its rule, and then nothing is wrong."""
    frames = pending_and_rotten(run)
    (problem,) = checked(run, repair=True).problems
    assert (problem.rule, problem.repaired) == ("frame-hash", False)
    assert "--drop-lost" in problem.advice
    assert (fate(run), frames.exists()) == (("accepted", None), True)
    found = check(run.storage, run.federation, run.plan, drop_lost=True)
    assert told(found) == [("damage", LOST, True)]
    assert run.accepted[0].site in found.problems[0].what
    assert (fate(run), frames.exists()) == (("dropped", LOST), False)
    assert told(checked(run)) == []


def test_a_kill_between_the_row_and_the_bytes_leaves_litter(run: AuditedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next repair, or the next start, deletes what is left of a lost update."""
    frames = pending_and_rotten(run)
    with monkeypatch.context() as killed:
        killed.setattr(FrameStore, "delete", lambda *_args: None)
        check(run.storage, run.federation, run.plan, drop_lost=True)
    assert frames.exists()
    assert told(checked(run, repair=True)) == [("leftover", "rejected-update", True)]
    assert not frames.exists()


def test_what_ca2fl_takes_back_next_cannot_be_given_up(tmp_path: Path) -> None:
    """A site's last update is told apart from an older one: the run needs it, neither repair nor demand drops it."""
    run = AuditedRun(tmp_path / "storage", "ca2fl")
    *_, last = (part.update_id for part in run.committed[-1].contributions)
    first, *_ = (part.update_id for part in run.committed[0].contributions)
    for update_id in (first, last):
        spoil(run.storage / "updates" / f"{update_id}.frames")
    found = check(run.storage, run.federation, run.plan, repair=True, drop_lost=True)
    advice = {each.where.partition(".")[0].rpartition("/")[2]: each.advice for each in found.problems}
    assert CACHE_LOST in advice[last]
    assert f"version {VERSIONS + 1} takes back what" in advice[last]
    assert "version 1 stands" in advice[first]
    assert all(not each.repaired for each in found.problems if each.where.startswith("updates/"))


def test_sound_updates_that_wait_are_not_given_up(run: AuditedRun) -> None:
    """Nothing is dropped that could be merged."""
    frames = pending_and_rotten(run)
    spoil(frames)  # back as it was
    assert told(check(run.storage, run.federation, run.plan, drop_lost=True)) == []
    assert fate(run) == ("accepted", None)


def test_a_broken_chain_is_beyond_repair(run: AuditedRun) -> None:
    """The row is named; nothing in the folder is deleted on the word of such a journal."""
    litter(run)
    with run.row_changed(3, "hash", bytes(32)):
        found = checked(run, repair=True)
    assert {each.rule for each in found.problems} >= {"chain"}
    assert all(not each.repaired for each in found.problems)
    assert any("restore the journal from a backup" in each.advice for each in found.problems)
    assert (run.storage / "masters" / ".tmp-0123").exists()


def test_files_from_behind_the_journals_end_are_left_alone(run: AuditedRun) -> None:
    """A journal put back from a backup must not cost the updates, states and masters that came after it."""
    older = run.storage.parent / "older.sqlite"
    with Journal(older) as journal:
        upto = run.records.index(run.committed[0])
        journal.append(run.records[: upto + 1])
    older.replace(run.storage / JOURNAL)
    with Journal.open_read(run.storage / JOURNAL) as journal:
        (run.storage / TRAIL).unlink()
        AuditLog(run.storage / TRAIL, journal.rows)
    late = {update.update_id for update in run.accepted if update.base_version > 1}
    found = checked(run, repair=True)
    behind = [each for each in found.problems if each.rule == "journal-behind"]
    assert behind
    assert all(not each.repaired and "put back from a backup" in each.advice for each in behind)
    assert late <= set(FrameStore(run.storage / "updates").ids())
    assert master_path(run.storage / "masters", VERSIONS).exists()


def test_it_waits_for_nobody(run: AuditedRun, tmp_path: Path) -> None:
    """Beside a running coordinator and where no run began it says so."""
    with Journal(run.storage / JOURNAL), pytest.raises(UnavailableError, match="another coordinator runs there"):
        checked(run)
    with pytest.raises(ConfigError, match="no run has begun"):
        check(tmp_path / "none", run.federation, run.plan)


def test_the_sample_run_has_versions(original: AuditedRun) -> None:
    """What the other tests take for granted."""
    assert [type(each) for each in original.committed] == [VersionCommitted] * VERSIONS
