"""Updates that were given up on record: what goes, what stays, and what can still be proven and computed again."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from coordinator import pruning, snapshots
from coordinator.bundle import export_bundle
from coordinator.fsck import check, fold
from coordinator.journal import Journal
from coordinator.proof import prove
from coordinator.pruning import prune, survey
from coordinator.records import Pruned, Record, VersionCommitted
from coordinator.replay import replay
from coordinator.views import JOURNAL
from shared.errors import ConfigError, CorruptError, UnavailableError
from tests.audited import SECTIONS, VERSIONS, AuditedRun, spoilt

UPTO = VERSIONS - 1
"""The older of the two versions whose masters are kept."""


@pytest.fixture(params=SECTIONS)
def run(request: pytest.FixtureRequest, tmp_path: Path) -> AuditedRun:
    """A run of its own for each test, in each mode."""
    return AuditedRun(tmp_path / "storage", request.param)


sync_alone = pytest.mark.parametrize("run", ["sync"], indirect=True)


def merged(run: AuditedRun, *versions: int) -> set[str]:
    """Updates that are part of these versions."""
    return {part.update_id for each in run.committed if each.version in versions for part in each.contributions}


def old(run: AuditedRun) -> set[str]:
    """Updates that are part of versions up to the one pruned to, and that no later merge reads."""
    parts = [part for each in run.committed if each.version <= UPTO for part in each.contributions]
    last = {part.site: part.update_id for part in parts} if run.mode == "ca2fl" else {}
    return {part.update_id for part in parts} - set(last.values())


def kept(run: AuditedRun, suffix: str) -> set[str]:
    """Updates of which there is such a file."""
    return {path.stem for path in (run.storage / "updates").glob(f"*{suffix}")}


def rules(run: AuditedRun) -> set[str]:
    """What the proof finds."""
    return {finding.rule for finding in prove(run.storage, run.federation, run.plan).findings}


def test_frames_go_and_everything_else_stays(run: AuditedRun) -> None:
    """Manifests of all updates, frames of those merged later or not at all; nothing is wrong, and what went is told."""
    before = kept(run, ".frames")
    found = prune(run.storage, run.federation, run.plan)
    gone = old(run)
    assert gone
    assert (found.version, found.updates) == (UPTO, len(gone))
    assert found.size > 0
    assert kept(run, ".frames") == before - gone
    assert kept(run, ".manifest") == before
    proof = prove(run.storage, run.federation, run.plan)
    assert proof.findings == ()
    assert proof.pruned == (
        f"{len(gone)} updates merged up to version {UPTO}: given up, their manifests and digests are here",
    )
    assert check(run.storage, run.federation, run.plan).problems == ()


def test_what_came_later_is_computed_again_bit_for_bit(run: AuditedRun, tmp_path: Path) -> None:
    """From the version up to which they went; what led to that cannot be, and is said so."""
    prune(run.storage, run.federation, run.plan)
    (tmp_path / "scratch").mkdir()
    made = list(replay(run.storage, run.federation, run.plan, tmp_path / "scratch"))
    assert [(each.version, each.differences) for each in made] == [(UPTO, ()), (VERSIONS, ())]
    with pytest.raises(ConfigError, match="cannot be computed again"):
        list(replay(run.storage, run.federation, run.plan, tmp_path / "scratch", upto=1))
    with spoilt(run.storage / "masters" / f"v{UPTO:08d}.safetensors", 8 * 500):
        shutil.rmtree(tmp_path / "scratch")
        (tmp_path / "scratch").mkdir()
        (first,) = replay(run.storage, run.federation, run.plan, tmp_path / "scratch")
    assert [finding.rule for finding in first.differences] == ["master-digest"]


def test_an_outsider_checks_what_is_left(run: AuditedRun, tmp_path: Path) -> None:
    """The bundle holds the manifests alone of what was given up, and its script finds nothing wrong."""
    prune(run.storage, run.federation, run.plan)
    export_bundle(run.storage, run.federation, run.plan, tmp_path / "run.tar")
    with tarfile.open(tmp_path / "run.tar") as tar:
        tar.extractall(tmp_path, filter="data")
    (script,) = tmp_path.glob("*/verify.py")
    done = subprocess.run([sys.executable, "-I", str(script)], capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 0, done.stdout
    with pytest.raises(CorruptError, match="is gone"):  # the row that says why comes after version 1
        export_bundle(run.storage, run.federation, run.plan, tmp_path / "early.tar", upto=1)


@sync_alone
def test_digests_that_stay_are_checked(run: AuditedRun) -> None:
    """One bit of a manifest whose frames went, and frames that are gone without having been given up."""
    prune(run.storage, run.federation, run.plan)
    first, last = min(merged(run, 1)), min(merged(run, VERSIONS))
    with spoilt(run.storage / "updates" / f"{first}.manifest", 8 * 40):
        assert rules(run) == {"manifest-digest"}
    (run.storage / "updates" / f"{last}.frames").unlink()
    assert rules(run) == {"frames-gone"}


@sync_alone
def test_killed_between_the_row_and_the_last_file(run: AuditedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames that are left harm nobody: nothing is wrong, `fsck` names them, and `--repair` deletes them."""

    def killed(_folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pruning, "mend_trail", killed)
    with pytest.raises(KeyboardInterrupt):
        prune(run.storage, run.federation, run.plan)
    gone = merged(run, 1, UPTO)
    assert kept(run, ".frames") >= gone
    assert rules(run) == {"audit-short"}  # which the next start mends
    problems = check(run.storage, run.federation, run.plan, repair=True).problems
    assert {problem.rule for problem in problems} == {"pruned-update", "audit-short"}
    assert all(problem.repaired for problem in problems)
    assert not kept(run, ".frames") & gone
    assert check(run.storage, run.federation, run.plan).problems == ()


@sync_alone
def test_what_is_not_sound_is_not_given_up(run: AuditedRun) -> None:
    """Damage would be lost sight of: nothing is written or deleted."""
    with Journal.open_read(run.storage / JOURNAL) as journal:
        rows = journal.rows()
        length = len(list(rows))
    before = kept(run, ".frames")
    damaged = run.storage / "updates" / f"{min(merged(run, 1))}.frames"
    with spoilt(damaged, 8 * 40), pytest.raises(CorruptError, match="frame 0"):
        prune(run.storage, run.federation, run.plan)
    with Journal.open_read(run.storage / JOURNAL) as journal:
        assert len(list(journal.rows())) == length
    assert kept(run, ".frames") == before


@sync_alone
def test_after_a_kill_between_a_row_and_its_line(run: AuditedRun) -> None:
    """The trail's last line is missing, which a start would write: updates are given up all the same, and it is."""
    trail = run.storage / "audit.jsonl"
    whole = trail.read_bytes()
    trail.write_bytes(whole[: whole.rindex(b"\n", 0, -1) + 1])
    assert rules(run) == {"audit-short"}
    assert prune(run.storage, run.federation, run.plan).updates > 0
    assert trail.read_bytes().startswith(whole)
    assert rules(run) == set()


@sync_alone
def test_a_version_must_stand_in_for_those_before_it(run: AuditedRun) -> None:
    """One whose master is not kept cannot; one that was, or is to come, neither; nor beside a running coordinator."""
    for upto, said in ((1, "float32 files of version 1"), (0, "from version 1 to 3"), (9, "not 9")):
        with pytest.raises(ConfigError, match=said):
            prune(run.storage, run.federation, run.plan, upto=upto)
    with Journal(run.storage / JOURNAL), pytest.raises(UnavailableError):
        prune(run.storage, run.federation, run.plan)
    assert survey(run.storage, run.federation, None).version == UPTO
    prune(run.storage, run.federation, run.plan, upto=VERSIONS)
    with pytest.raises(ConfigError, match="from version 4 to 3"):
        survey(run.storage, run.federation, None)


@sync_alone
@pytest.mark.parametrize("version", [VERSIONS + 1, 1])
def test_a_row_that_gives_up_what_cannot_be_is_a_finding(run: AuditedRun, version: int) -> None:
    """A version to come, and one that was given up before: a hidden loss cannot be declared afterwards."""

    def edit(record: Record) -> list[Record]:
        if isinstance(record, VersionCommitted) and record.version == VERSIONS:
            return [record, Pruned(UPTO, 9.0), Pruned(version, 9.0)]
        return [record]

    with run.forged(edit):
        assert "pruned-twice" in rules(run)


@sync_alone
def test_a_snapshot_remembers(run: AuditedRun) -> None:
    """The restart from it knows which master stays for ever."""
    prune(run.storage, run.federation, run.plan)
    with Journal.open_read(run.storage / JOURNAL) as journal:
        ledger = fold(journal)
    assert ledger.pruned == UPTO
    assert snapshots.from_bytes(snapshots.to_bytes(ledger)).pruned == UPTO
