"""Files of earlier releases: read as they are, migrated when opened for writing; those of later ones are refused."""

from __future__ import annotations

import hashlib
import shutil
import sqlite3
from pathlib import Path

import msgpack
import pytest
import zstandard

from coordinator import snapshots
from coordinator.journal import Journal
from coordinator.ledger import Ledger
from coordinator.records import Rejected
from coordinator.rows import SCHEMA_VERSION
from shared.audit import Mark
from shared.errors import CorruptError, RefusedError

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "storage"
LATE = Rejected("a9" * 16, "st-john", "3c" * 32, "too-stale", "", 1_763_629_399.5)


def golden(tmp_path: Path, schema: int) -> Path:
    """A copy of the journal that a release with this schema left."""
    shutil.copytree(GOLDEN / "archive", tmp_path / "archive")
    return Path(shutil.copy(GOLDEN / f"journal-schema{schema}.sqlite", tmp_path / "journal.sqlite"))


def folded(path: Path) -> Ledger:
    """The state that a restart finds."""
    with Journal.open_read(path) as journal:
        restored = journal.restore()
        ledger = restored.ledger if restored else Ledger()
        for record in journal.replay(restored.row if restored else None):
            ledger.apply(record)
    return ledger


def test_there_is_a_golden_journal_of_every_schema() -> None:
    """Whoever raises the schema leaves a journal of the one before."""
    names = {f"journal-schema{schema}.sqlite" for schema in range(1, SCHEMA_VERSION + 1)}
    assert {path.name for path in GOLDEN.glob("journal-*.sqlite")} == names


@pytest.mark.parametrize("schema", range(1, SCHEMA_VERSION + 1))
def test_a_journal_of_an_earlier_release_is_read_and_carried_on(tmp_path: Path, schema: int) -> None:
    """Reading changes no byte of it; writing migrates it, keeps the chain, and can be summed up."""
    path = golden(tmp_path, schema)
    bytes_before = path.read_bytes()
    before = folded(path)
    assert (before.version, len(before.known), len(before.pending)) == (1, 3, 1)
    assert path.read_bytes() == bytes_before
    with Journal(path) as journal:
        assert journal.schema == SCHEMA_VERSION
        journal.append([LATE])
    after = folded(path)
    assert after.known.pop(LATE.update_id).rule == "too-stale"
    assert vars(after) == vars(before)
    with Journal(path) as journal:
        journal.compact(folded(path), Mark(journal.length, 0, hashlib.sha256().hexdigest()), 1.0)
        assert len(list(journal.replay())) == journal.length
    assert folded(path).known[LATE.update_id].rule == "too-stale"


def test_a_migration_that_is_cut_short_is_no_migration(tmp_path: Path) -> None:
    """All of a migration is one transaction: with the tables of it half there by other means, nothing is touched."""
    path = golden(tmp_path, 1)
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE segments (x)")
    db.close()
    with pytest.raises(CorruptError, match="not a sound journal"):
        Journal(path)
    with sqlite3.connect(path) as db:
        assert db.execute("SELECT value FROM meta").fetchone() == (1,)
        assert db.execute("SELECT count(*) FROM sqlite_schema WHERE name = 'snapshots'").fetchone() == (0,)
    db.close()


def test_a_snapshot_has_the_bytes_of_the_golden_file() -> None:
    """A snapshot of this release reads as the one that was written, down to its unpacked bytes."""
    data = (GOLDEN / "snapshot-schema1.msgpack.zst").read_bytes()
    ledger = snapshots.from_bytes(data)
    assert vars(snapshots.from_bytes(snapshots.to_bytes(ledger))) == vars(ledger)
    assert vars(ledger) == vars(folded(GOLDEN / "journal-schema1.sqlite"))


@pytest.mark.parametrize("data", [b"", b"zstd?", b"\x28\xb5\x2f\xfd\x04\x00\x09\x00\x00\x80\x00\x00\x00\x00"])
def test_bytes_that_are_no_snapshot_are_refused(data: bytes) -> None:
    """Never an exception of a library."""
    with pytest.raises(CorruptError, match="snapshot"):
        snapshots.from_bytes(data)


def test_a_snapshot_that_claims_to_be_huge_takes_no_memory() -> None:
    """A spoilt size in its header, which the decompressor would believe, is refused before anything is allocated."""
    data = bytearray((GOLDEN / "snapshot-schema1.msgpack.zst").read_bytes())
    parameters = zstandard.get_frame_parameters(bytes(data))
    body = zstandard.ZstdDecompressor().decompress(bytes(data))
    assert parameters.content_size == len(body)
    huge = b"\x28\xb5\x2f\xfd\xe0" + (2**40).to_bytes(8, "little") + bytes(data[13:])
    assert zstandard.get_frame_parameters(huge).content_size == 2**40
    with pytest.raises(CorruptError, match="snapshot"):
        snapshots.from_bytes(huge)


def test_a_snapshot_of_another_schema_says_which_release_reads_it() -> None:
    """The message names the schema."""
    data = zstandard.compress(msgpack.packb({"v": 2}))
    with pytest.raises(RefusedError, match="schema version 2, this release knows 1"):
        snapshots.from_bytes(data)
