"""Files of this schema are read and carried on; those of other schemas are refused."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import msgpack
import pytest
import zstandard

from coordinator import snapshots
from coordinator.journal import Journal
from coordinator.ledger import Ledger
from coordinator.records import Rejected
from coordinator.rows import SCHEMA_VERSION, JournalReader
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


def test_there_is_a_golden_journal_of_this_schema_and_of_the_one_before() -> None:
    """Whoever raises the schema leaves a journal of the one before."""
    names = {f"journal-schema{schema}.sqlite" for schema in (SCHEMA_VERSION - 1, SCHEMA_VERSION)}
    assert {path.name for path in GOLDEN.glob("journal-*.sqlite")} == names


def test_a_journal_of_this_schema_is_read_and_carried_on(tmp_path: Path) -> None:
    """Reading changes no byte of it; writing keeps the chain, and it can be summed up."""
    path = golden(tmp_path, SCHEMA_VERSION)
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


@pytest.mark.parametrize("opener", [Journal, Journal.open_read])
def test_a_journal_whose_files_have_another_hash_is_left_alone(
    tmp_path: Path, opener: Callable[[Path], JournalReader]
) -> None:
    """By writer and reader, before anything of it is believed or changed, and with what to do."""
    path = golden(tmp_path, 4)
    before = path.read_bytes()
    with pytest.raises(RefusedError, match="schema version 4, this release knows 5") as caught:
        opener(path)
    assert caught.value.rule == "older-schema"
    assert "the release that wrote it" in caught.value.hint
    assert path.read_bytes() == before


def test_a_snapshot_has_the_bytes_of_the_golden_file() -> None:
    """A snapshot of this release reads as the one that was written, down to its unpacked bytes."""
    data = (GOLDEN / "snapshot-schema2.msgpack.zst").read_bytes()
    ledger = snapshots.from_bytes(data)
    assert vars(snapshots.from_bytes(snapshots.to_bytes(ledger))) == vars(ledger)
    assert vars(ledger) == vars(folded(GOLDEN / "journal-schema5.sqlite"))


@pytest.mark.parametrize("data", [b"", b"zstd?", b"\x28\xb5\x2f\xfd\x04\x00\x09\x00\x00\x80\x00\x00\x00\x00"])
def test_bytes_that_are_no_snapshot_are_refused(data: bytes) -> None:
    """Never an exception of a library."""
    with pytest.raises(CorruptError, match="snapshot"):
        snapshots.from_bytes(data)


def test_a_snapshot_that_claims_to_be_huge_takes_no_memory() -> None:
    """A spoilt size in its header, which the decompressor would believe, is refused before anything is allocated."""
    data = bytearray((GOLDEN / "snapshot-schema2.msgpack.zst").read_bytes())
    parameters = zstandard.get_frame_parameters(bytes(data))
    body = zstandard.ZstdDecompressor().decompress(bytes(data))
    assert parameters.content_size == len(body)
    huge = b"\x28\xb5\x2f\xfd\xe0" + (2**40).to_bytes(8, "little") + bytes(data[13:])
    assert zstandard.get_frame_parameters(huge).content_size == 2**40
    with pytest.raises(CorruptError, match="snapshot"):
        snapshots.from_bytes(huge)


def test_a_snapshot_of_another_schema_says_which_release_reads_it() -> None:
    """The message names the schema."""
    data = zstandard.compress(msgpack.packb({"v": 3}))
    with pytest.raises(RefusedError, match="schema version 3, this release knows 2"):
        snapshots.from_bytes(data)
