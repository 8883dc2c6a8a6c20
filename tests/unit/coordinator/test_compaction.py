"""Compaction: a short restart, the same state, a chain that holds, and no instant in which a kill costs anything."""

from __future__ import annotations

import contextlib
import hashlib
import signal
import sqlite3
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from coordinator import snapshots
from coordinator.bundle import export_bundle
from coordinator.journal import Journal
from coordinator.ledger import Ledger
from coordinator.proof import prove
from coordinator.records import Finished, Rejected, Snapshot
from coordinator.replay import replay
from coordinator.rows import ARCHIVE, JournalReader, PrunedError, Restored
from coordinator.views import JOURNAL, load_run, summarise_sites
from shared.audit import AuditLog
from shared.errors import CorruptError, NoRoomError
from tests.audited import TRAIL, VERSIONS, AuditedRun

ROOT = Path(__file__).resolve().parents[3]
NOW = 99.0


@pytest.fixture
def run(tmp_path: Path) -> AuditedRun:
    """A run of three versions."""
    return AuditedRun(tmp_path / "storage", "sync")


def recovered(journal: JournalReader) -> tuple[Ledger, Restored | None, int]:
    """What a restart does: the ledger, the snapshot it began with, and the records it had to apply."""
    restored = journal.restore()
    ledger, applied = (restored.ledger if restored else Ledger()), 0
    for record in journal.replay(restored.row if restored else None):
        ledger.apply(record)
        applied += 1
    return ledger, restored, applied


def told(ledger: Ledger) -> dict[str, object]:
    """All that a ledger knows."""
    return vars(ledger)


def compacted(storage: Path) -> Ledger:
    """Sum up a run as its coordinator does, and return the ledger."""
    with Journal(storage / JOURNAL) as journal:
        ledger, restored, _ = recovered(journal)
        audit = AuditLog(storage / TRAIL, journal.rows, mark=restored.mark if restored else None)
        journal.compact(ledger, audit.mark, NOW)
        audit.follow()
    return ledger


def test_a_restart_finds_the_same_state_and_replays_nothing(run: AuditedRun) -> None:
    """The ledger from the snapshot equals the one from all rows, twice over, and the rows that come later are added."""
    with Journal.open_read(run.storage / JOURNAL) as journal:
        before, _, rows = recovered(journal)
    assert rows == len(run.records)
    compacted(run.storage)
    with Journal(run.storage / JOURNAL) as journal:
        after, restored, applied = recovered(journal)
        assert restored is not None
        assert (told(after), applied, journal.loose) == (told(before), 0, 0)
        journal.append([Rejected("dd" * 16, "bad", "ab" * 32, "too-stale", "", 100.0)])
        assert journal.loose == 1
    compacted(run.storage)
    with Journal(run.storage / JOURNAL) as journal:
        again, _, applied = recovered(journal)
        assert applied == 0
        assert again.known["dd" * 16].rule == "too-stale"
        assert [(each.first, each.last) for each in journal.segments()] == [(1, rows), (rows + 1, rows + 2)]
        records = list(journal.replay())
    digest = hashlib.sha256(snapshots.to_bytes(before)).hexdigest()
    assert records[: rows + 1] == [*run.records, Snapshot(VERSIONS, len(before.known), digest, NOW)]


def test_nothing_is_moved_when_nothing_came(run: AuditedRun) -> None:
    """A journal that holds but its snapshot is left as it is."""
    ledger = compacted(run.storage)
    with Journal(run.storage / JOURNAL) as journal:
        length = journal.length
        assert journal.compact(ledger, AuditLog(run.storage / TRAIL, journal.rows).mark, NOW) == 0
        assert journal.length == length


def test_proof_replay_and_bundle_read_through_the_segments(run: AuditedRun, tmp_path: Path) -> None:
    """With its segments in place a compacted run is proven, recomputed and exported as before."""
    compacted(run.storage)
    proof = prove(run.storage, run.federation, run.plan)
    assert (proof.findings, proof.pruned, proof.rows) == ((), (), len(run.records) + 1)
    (tmp_path / "work").mkdir()
    made = list(replay(run.storage, run.federation, run.plan, tmp_path / "work"))
    assert [each.differences for each in made] == [()] * (VERSIONS + 1)
    bundle = export_bundle(run.storage, run.federation, run.plan, tmp_path / "run.tar")
    assert (bundle.rows, bundle.version, bundle.updates) == (len(run.records) + 1, VERSIONS, len(run.accepted))
    checked = tmp_path / "unpacked"
    checked.mkdir()
    with tarfile.open(tmp_path / "run.tar") as tar:
        tar.extractall(checked, filter="data")
    (script,) = checked.glob("*/verify.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout


def test_without_its_segment_a_run_is_proven_from_the_snapshot_on(run: AuditedRun, tmp_path: Path) -> None:
    """What was moved away is named with its SHA-256; every kept file is still compared with the digests that stayed."""
    compacted(run.storage)
    (segment,) = (run.storage / ARCHIVE).iterdir()
    away = segment.rename(tmp_path / segment.name)
    proof = prove(run.storage, run.federation, run.plan)
    assert proof.findings == ()
    (missed,) = proof.pruned
    assert f"rows 1 to {len(run.records)} are in {ARCHIVE}/{segment.name}" in missed
    assert proof.updates == len(run.accepted)
    with pytest.raises(PrunedError, match="is not there") as caught:
        list(replay(run.storage, run.federation, run.plan, tmp_path / "none"))
    assert "SHA-256" in caught.value.hint
    view = load_run(run.storage)
    assert (view.current.version, len(view.updates)) == (VERSIONS, len(run.accepted) + 1)
    assert sum(site.merged for site in summarise_sites(view)) == len(run.accepted) - 1
    frames = run.storage / "updates" / f"{run.accepted[0].update_id}.frames"
    frames.write_bytes(b"\0" + frames.read_bytes()[1:])
    assert [each.rule for each in prove(run.storage, run.federation, run.plan).findings] == ["frame-hash"]
    away.rename(segment)
    assert "frame-hash" in {each.rule for each in prove(run.storage, run.federation, run.plan).findings}


def test_the_trail_is_mended_with_and_without_the_segment(run: AuditedRun, tmp_path: Path) -> None:
    """audit.jsonl is trusted by its digest; edited, it is written anew from all rows that can be read."""
    compacted(run.storage)
    trail = run.storage / TRAIL
    whole = trail.read_bytes()

    def reopened() -> int:
        with Journal(run.storage / JOURNAL) as journal:
            restored = journal.restore()
            assert restored is not None
            pruned = max((each.last for each in journal.pruned()), default=0)
            return AuditLog(trail, journal.rows, mark=restored.mark, pruned=pruned).mended

    assert reopened() == 0
    trail.write_bytes(whole.replace(b'"accepted"', b'"rejected"', 1))
    assert reopened() > 1
    assert trail.read_bytes() == whole
    (segment,) = (run.storage / ARCHIVE).iterdir()
    segment.rename(tmp_path / "away")
    trail.write_bytes(b"")
    assert reopened() == 1
    assert trail.read_bytes() == whole.splitlines(keepends=True)[-1]


def test_a_forged_snapshot_is_found(run: AuditedRun) -> None:
    """One that does not have the digest in its row stops a restart, and the proof names it."""
    ledger = compacted(run.storage)
    known = ledger.known[run.accepted[0].update_id]
    known.version = 1 if known.version != 1 else 2
    with Journal(run.storage / JOURNAL) as journal:
        journal._db.execute("UPDATE snapshots SET body = ?", (snapshots.to_bytes(ledger),))
        with pytest.raises(CorruptError, match="snapshot of row"):
            journal.restore()
    assert "snapshot-unreadable" in {each.rule for each in prove(run.storage, run.federation, run.plan).findings}


def test_a_snapshot_that_says_otherwise_than_the_rows_is_found(run: AuditedRun) -> None:
    """A coordinator that summed up something else than its rows is found out, although chain and digest are sound."""
    with Journal(run.storage / JOURNAL) as journal:
        ledger, _, _ = recovered(journal)
        ledger.known[run.accepted[0].update_id].weight = 0.125
        audit = AuditLog(run.storage / TRAIL, journal.rows)
        journal.compact(ledger, audit.mark, NOW)
        audit.follow()
    rules = {each.rule for each in prove(run.storage, run.federation, run.plan).findings}
    assert rules == {"snapshot-differs"}


@pytest.mark.parametrize(
    ("change", "value"),
    [
        ("segments SET file = ?", None),
        ("segments SET file = ?", 3),
        ("segments SET file = ?", "../rows-000000000001-000000000009.sqlite"),
        ("segments SET sha256 = ?", None),
        ("segments SET sha256 = ?", "ab" * 30 + "\x1b[2J"),
        ("segments SET last = ?", "many"),
        ("snapshots SET body = ?", 7),
        ("snapshots SET audit_size = ?", "many"),
        ("snapshots SET audit_sha256 = ?", None),
    ],
)
def test_what_nobody_wrote_beside_the_rows_is_found(run: AuditedRun, change: str, value: str | float | None) -> None:
    """Values of other types, and segments outside the archive, are a finding; no file of that name is opened."""
    compacted(run.storage)
    with contextlib.closing(sqlite3.connect(run.storage / JOURNAL)) as db, db:
        db.execute("PRAGMA writable_schema = ON")  # a forger's SQLite is not bound by ours
        db.execute("UPDATE sqlite_schema SET sql = replace(sql, 'NOT NULL', '')")
    with contextlib.closing(sqlite3.connect(run.storage / JOURNAL)) as db, db:
        db.execute(f"UPDATE {change}", (value,))
    assert "snapshot-unreadable" in {each.rule for each in prove(run.storage, run.federation, run.plan).findings}


def test_a_reader_in_the_middle_goes_on_in_the_segment(run: AuditedRun) -> None:
    """Rows that move while somebody pages through them come once each, in order."""
    with Journal.open_read(run.storage / JOURNAL) as reader:
        rows = reader.rows(limit=3)
        first = next(rows)
        compacted(run.storage)
        assert [first.seq, *(row.seq for row in reader.rows(after=1))] == list(range(1, len(run.records) + 2))


def test_a_full_disk_leaves_everything_as_it_was(run: AuditedRun) -> None:
    """When the snapshot finds no room the rows stay, the journal is usable, and the next try succeeds."""
    with Journal(run.storage / JOURNAL) as journal:
        ledger, _, rows = recovered(journal)
        mark = AuditLog(run.storage / TRAIL, journal.rows).mark
        pages = journal._db.execute("PRAGMA page_count").fetchone()[0]
        journal._db.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(NoRoomError, match="the disk is full"):
            journal.compact(ledger, mark, NOW)
        journal._db.execute("PRAGMA max_page_count = 1000000")
        assert (journal.length, journal.restore()) == (rows, None)
        assert journal.compact(ledger, mark, NOW) == rows
        journal.append([Finished(VERSIONS, 100.0)])


KILLED = """
import os, signal, sys
from pathlib import Path
from coordinator import journal as module
from coordinator.journal import Journal
from coordinator.ledger import Ledger
from shared import durable
from shared.audit import AuditLog

step = sys.argv[2]

def die(*_args, **_kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

storage = Path(sys.argv[1])
journal = Journal(storage / "journal.sqlite")
ledger = Ledger()
for record in journal.replay():
    ledger.apply(record)
audit = AuditLog(storage / "audit.jsonl", journal.rows)
if step == "segment written":
    module.durable.sync_file = die
elif step == "segment synced":
    Path.replace = die
elif step == "segment named":
    module.durable.fsync_dir = die
elif step == "before the commit":
    Journal._commit = die
elif step == "inside the commit":
    journal._db.set_trace_callback(lambda statement: die() if statement.startswith("DELETE FROM rows") else None)
journal.compact(ledger, audit.mark, 99.0)
die()
"""
STEPS = ("segment written", "segment synced", "segment named", "before the commit", "inside the commit", "after it all")


@pytest.mark.parametrize("step", STEPS)
def test_killed_at_any_step_nothing_is_lost(run: AuditedRun, step: str) -> None:
    """Before the commit the journal is as it was, after it compacted; either way the next compaction ends well."""
    with Journal.open_read(run.storage / JOURNAL) as journal:
        before, _, _ = recovered(journal)
    child = subprocess.run([sys.executable, "-c", KILLED, str(run.storage), step], cwd=ROOT, timeout=120, check=False)
    assert child.returncode == -signal.SIGKILL
    with Journal(run.storage / JOURNAL) as journal:
        after, restored, _ = recovered(journal)
        assert told(after) == told(before)
        assert (restored is not None) == (step == "after it all")
        assert [row.seq for row in journal.rows(limit=len(run.records))] == list(range(1, len(run.records) + 1))
    compacted(run.storage)
    assert prove(run.storage, run.federation, run.plan).findings == ()
    (segment,) = (run.storage / ARCHIVE).iterdir()
    assert segment.name.startswith("rows-")
