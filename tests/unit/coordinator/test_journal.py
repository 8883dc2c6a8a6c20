from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgpack
import pytest

from coordinator.journal import Journal
from coordinator.records import Accepted, Dropped, Finished, Record, to_bytes
from coordinator.rows import PAGE_ROWS
from shared.audit import GENESIS, linked
from shared.errors import ConfigError, CorruptError, RefusedError, UnavailableError

ROOT = Path(__file__).resolve().parents[3]


def accepted(number: int) -> Accepted:
    """A record told apart by its number."""
    return Accepted(f"{number:032x}", "st-mary", number, 10, "3b" * 32, "f1" * 32, 0.5, 1000.0 + number)


def filled(path: Path, count: int = 5) -> list[Record]:
    """Write a journal of `count` rows and return their records."""
    facts: list[Record] = [accepted(number) for number in range(count)]
    with Journal(path) as journal:
        journal.append(facts)
    return facts


def sql(path: Path, statement: str, *values: object) -> None:
    """Change a closed journal behind its back."""
    db = sqlite3.connect(path)
    with db:
        db.execute(statement, values)
    db.close()


def replayed(path: Path) -> list[Record]:
    """All records of a journal at rest."""
    with Journal.open_read(path) as reader:
        return list(reader.replay())


def test_what_was_appended_is_replayed_after_reopening(tmp_path: Path) -> None:
    """Records come back in order, over several openings, and the chain goes on where it ended."""
    path = tmp_path / "deep" / "journal.sqlite"
    with Journal(path) as journal:
        assert journal.length == 0
        assert [row.seq for row in journal.append([accepted(0), accepted(1)])] == [1, 2]
    with Journal(path) as journal:
        (row,) = journal.append([Finished(3, 9.5)])
        assert (row.seq, row.at, row.kind, journal.length) == (3, 9.5, "finished", 3)
        assert list(journal.replay()) == [accepted(0), accepted(1), Finished(3, 9.5)]
    assert replayed(path) == [accepted(0), accepted(1), Finished(3, 9.5)]


def test_rows_carry_the_chain(tmp_path: Path) -> None:
    """The first row follows 32 zero bytes, each other one the hash before it; `append` returns what is stored."""
    with Journal(tmp_path / "j") as journal:
        written = journal.append([accepted(0), accepted(1)])
        assert tuple(journal.rows()) == written
    assert written[0].prev == GENESIS
    assert written[1].prev == written[0].hash
    assert written[1].body == to_bytes(accepted(1))


def test_rows_after_and_limit_page_through(tmp_path: Path) -> None:
    """A tail asks for what is new, and gets no more than it asks for, across page borders."""
    count = 2 * PAGE_ROWS + 3
    filled(tmp_path / "j", count)
    with Journal.open_read(tmp_path / "j") as reader:
        assert [row.seq for row in reader.rows()] == list(range(1, count + 1))
        assert [row.seq for row in reader.rows(after=count - 2)] == [count - 1, count]
        assert [row.seq for row in reader.rows(after=1, limit=PAGE_ROWS + 1)] == list(range(2, PAGE_ROWS + 3))
        assert list(reader.rows(after=count)) == []
        assert list(reader.rows(limit=0)) == []


def test_an_append_is_whole_or_absent(tmp_path: Path) -> None:
    """When one record of a batch cannot be written, none is, and the journal goes on as if nothing had been asked."""
    with Journal(tmp_path / "j") as journal:
        journal.append([accepted(0)])
        with pytest.raises(CorruptError, match="field rule"):
            journal.append([accepted(1), Dropped("00" * 16, "No Rule", 1.0)])
        journal.append([accepted(2)])
        assert list(journal.replay()) == [accepted(0), accepted(2)]


def test_appending_nothing_writes_nothing(tmp_path: Path) -> None:
    """An empty batch is no row."""
    with Journal(tmp_path / "j") as journal:
        assert journal.append([]) == ()
        assert journal.length == 0


def test_every_append_is_synced(tmp_path: Path) -> None:
    """Durability does not hang on a default of the SQLite at hand: WAL, synchronous=FULL."""
    with Journal(tmp_path / "j") as journal:
        assert journal._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert journal._db.execute("PRAGMA synchronous").fetchone() == (2,)


def test_a_second_writer_is_told_who_is_there(tmp_path: Path) -> None:
    """Two coordinators never write one journal; the second hears which folder is taken, and gets in afterwards."""
    path = tmp_path / "j"
    with Journal(path):
        with pytest.raises(UnavailableError, match="another coordinator runs there") as caught:
            Journal(path)
        assert str(tmp_path) in caught.value.message
    with Journal(path) as journal:
        assert journal.length == 0


def test_a_failed_opening_leaves_no_lock(tmp_path: Path) -> None:
    """A journal that cannot be opened does not look as if a coordinator ran there."""
    path = tmp_path / "j"
    path.write_bytes(b"not a database at all, but long enough to look at" * 100)
    for _ in range(2):
        with pytest.raises(CorruptError, match="not a sound journal"):
            Journal(path)


def test_reading_beside_the_writer(tmp_path: Path) -> None:
    """A reader sees each commit while the coordinator runs, takes no lock, and cannot write."""
    with Journal(tmp_path / "j") as journal, Journal.open_read(tmp_path / "j") as reader:
        assert list(reader.replay()) == []
        journal.append([accepted(0)])
        assert list(reader.replay()) == [accepted(0)]
        paused = reader.rows()
        next(paused)
        journal.append([accepted(1)])
        assert list(reader.replay()) == [accepted(0), accepted(1)]
        assert not hasattr(reader, "append")
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            reader._db.execute("DELETE FROM rows")


def test_reading_where_nothing_is(tmp_path: Path) -> None:
    """A folder without a journal is a wrong argument, and no file appears there."""
    with pytest.raises(ConfigError, match="no journal there"):
        Journal.open_read(tmp_path / "none")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "begun").touch()  # what a reader finds in the instant in which a coordinator makes it
    with pytest.raises(ConfigError, match="no journal there"):
        Journal.open_read(tmp_path / "begun")


def test_a_closed_journal_says_so(tmp_path: Path) -> None:
    """Use after closing is unavailability with advice, not SQLite's error."""
    journal = Journal(tmp_path / "j")
    journal.close()
    journal.close()
    with pytest.raises(UnavailableError, match="closed"):
        journal.append([accepted(0)])


def test_use_from_several_threads(tmp_path: Path) -> None:
    """Appends from different threads, one after the other or not, make one chain without gaps."""
    with Journal(tmp_path / "j") as journal:
        threads = [threading.Thread(target=journal.append, args=([accepted(n)],)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        found = list(journal.replay())
    assert sorted(found, key=lambda record: record.at) == [accepted(n) for n in range(8)]  # type: ignore[union-attr]


CHANGES: dict[str, tuple[str, Callable[[], tuple[object, ...]], int]] = {
    "body": ("UPDATE rows SET body = ? WHERE seq = 3", lambda: (to_bytes(accepted(77)),), 3),
    "kind": ("UPDATE rows SET kind = 'rejected' WHERE seq = 2", tuple, 2),
    "time": ("UPDATE rows SET at = 5.0 WHERE seq = 4", tuple, 4),
    "hash": ("UPDATE rows SET hash = zeroblob(32) WHERE seq = 5", tuple, 5),
    "prev": ("UPDATE rows SET prev = zeroblob(32) WHERE seq = 2", tuple, 2),
    "type": ("UPDATE rows SET body = 'text' WHERE seq = 1", tuple, 1),
    "gone": ("DELETE FROM rows WHERE seq = 3", tuple, 4),
    "first": ("DELETE FROM rows WHERE seq = 1", tuple, 2),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_row_is_found_and_located(tmp_path: Path, change: str) -> None:
    """Replay stops at the first row that is not what was written, and says which one."""
    statement, values, seq = CHANGES[change]
    filled(tmp_path / "j")
    sql(tmp_path / "j", statement, *values())
    with pytest.raises(CorruptError, match=f"row {seq} |row {seq}:"):
        replayed(tmp_path / "j")


@pytest.mark.parametrize(
    ("body", "family", "named"),
    [
        (b"\x80", CorruptError, "row 2: a journal record of unknown kind"),
        (msgpack.packb({"v": 3, "t": "finished"}), RefusedError, "row 2: a journal record of schema version 3"),
    ],
    ids=["no record", "newer"],
)
def test_a_chained_row_that_is_no_record_of_ours_is_located(
    tmp_path: Path, body: bytes, family: type[Exception], named: str
) -> None:
    """A row that keeps the chain but holds no record, or one of a later release, is told by its number."""
    filled(tmp_path / "j", 1)
    with Journal.open_read(tmp_path / "j") as reader:
        (last,) = reader.rows()
    row = linked(last.hash, 2, 1.0, "finished", body)
    sql(tmp_path / "j", "INSERT INTO rows VALUES (?, ?, ?, ?, ?, ?)", 2, 1.0, row.kind, row.body, row.prev, row.hash)
    with pytest.raises(family, match=named):
        replayed(tmp_path / "j")


def test_a_folder_that_cannot_be_written_is_unavailable(tmp_path: Path) -> None:
    """The message names the folder."""
    (tmp_path / "file").touch()
    with pytest.raises(UnavailableError, match="file cannot be written"):
        Journal(tmp_path / "file" / "journal.sqlite")


@pytest.mark.parametrize("opener", [Journal, Journal.open_read], ids=["writer", "reader"])
def test_a_journal_of_a_newer_release_is_refused(tmp_path: Path, opener: Callable[[Path], object]) -> None:
    """A later schema is named with both versions, by writer and reader."""
    filled(tmp_path / "j")
    sql(tmp_path / "j", "UPDATE meta SET value = 6 WHERE key = 'schema'")
    with pytest.raises(RefusedError, match="schema version 6, this release knows 5"):
        opener(tmp_path / "j")


@pytest.mark.parametrize(
    "damage", ["DELETE FROM meta", "UPDATE meta SET value = 'one'", "DROP TABLE meta"], ids=["empty", "text", "none"]
)
def test_a_database_that_is_no_journal_is_corrupt(tmp_path: Path, damage: str) -> None:
    """Another program's SQLite file, or a damaged one of ours, is not written to."""
    filled(tmp_path / "j")
    sql(tmp_path / "j", damage)
    with pytest.raises(CorruptError, match=str(tmp_path / "j")):
        Journal(tmp_path / "j")


def test_a_full_disk_is_unavailable_and_loses_nothing(tmp_path: Path) -> None:
    """When SQLite can get no more pages the append fails as a whole; with room again the journal goes on."""
    with Journal(tmp_path / "j") as journal:
        journal.append([accepted(0)])
        journal._db.execute("PRAGMA max_page_count = 8")
        with pytest.raises(UnavailableError, match="the disk is full"):
            journal.append([accepted(number) for number in range(1, 500)])
        journal._db.execute("PRAGMA max_page_count = 1000000")
        journal.append([accepted(1)])
    assert replayed(tmp_path / "j") == [accepted(0), accepted(1)]


def in_child(code: str, *arguments: str) -> subprocess.Popen[str]:
    """Start Python code in a process of its own, its output at hand."""
    return subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True)


FAILING_DISK = """
import resource, sys
from pathlib import Path
from coordinator.journal import Journal
from coordinator.records import Finished
from shared.errors import UnavailableError
journal = Journal(Path(sys.argv[1]))
journal.append([Finished(1, 1.0)])
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, resource.RLIM_INFINITY))
try:
    journal.append([Finished(n, 1.0) for n in range(2000)])
except UnavailableError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
try:
    journal.append([Finished(2, 1.0)])
except UnavailableError as error:
    print(error)
"""


def test_after_a_failed_write_the_journal_takes_no_more(tmp_path: Path) -> None:
    """A write error of the disk closes the journal for this process; opened again, it holds what was promised."""
    child = in_child(FAILING_DISK, str(tmp_path / "j"))
    first, second = child.communicate(timeout=60)[0].splitlines()
    assert "cannot be used" in first
    assert "is closed" in second
    assert replayed(tmp_path / "j") == [Finished(1, 1.0)]


ENDLESS = """
import sys
from pathlib import Path
from coordinator.journal import Journal
from coordinator.records import Finished
with Journal(Path(sys.argv[1])) as journal:
    while True:
        journal.append([Finished(2 * journal.length, 1.0), Finished(2 * journal.length + 1, 1.0)])
        print(journal.length, flush=True)
"""


def test_a_killed_writer_loses_nothing_that_it_promised(tmp_path: Path) -> None:
    """After SIGKILL in mid-append the chain is sound, batches are whole, and each append that returned is there."""
    promised = 0
    for _ in range(3):
        child = in_child(ENDLESS, str(tmp_path / "j"))
        assert child.stdout is not None
        for _ in range(5):
            promised = int(child.stdout.readline())
        os.kill(child.pid, signal.SIGKILL)
        rest = child.communicate(timeout=60)[0].split("\n")
        promised = max([promised, *(int(line) for line in rest[:-1])])
        with Journal(tmp_path / "j") as journal:
            stored = len(list(journal.replay()))
            assert stored == journal.length >= promised
            assert stored % 2 == 0


def test_reading_at_rest_leaves_nothing_behind(tmp_path: Path) -> None:
    """Nobody writes: a reader makes no file beside the journal, and one in a folder without write permission reads."""
    filled(tmp_path / "j")
    before = sorted(path.name for path in tmp_path.iterdir())
    assert len(replayed(tmp_path / "j")) == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_writer_that_starts_under_a_reader_is_noticed(tmp_path: Path) -> None:
    """A reader that began at rest sees what is written since, also when the writer came and went."""
    filled(tmp_path / "j", 2)
    with Journal.open_read(tmp_path / "j") as reader:
        assert len(list(reader.rows())) == 2
        with Journal(tmp_path / "j") as journal:
            journal.append([accepted(2)])
            assert len(list(reader.rows())) == 3
        assert len(list(reader.rows())) == 3
    with Journal.open_read(tmp_path / "j") as reader:
        with Journal(tmp_path / "j") as journal:
            journal.append([accepted(3)])
        assert len(list(reader.rows())) == 4


READ_ONLY = """
import os, sys
from pathlib import Path
from coordinator.journal import Journal
from shared.errors import MailboatError
if os.geteuid() == 0:
    os.setresuid(65534, 65534, 65534)
try:
    with Journal.open_read(Path(sys.argv[1])) as journal:
        print(len(list(journal.replay())))
except MailboatError as error:
    print(error)
"""


@pytest.fixture
def media() -> Iterator[Path]:
    """A folder that others may look into, unlike pytest's own."""
    with tempfile.TemporaryDirectory(prefix="mailboat-media-") as name:
        yield Path(name)


def test_reading_where_nothing_may_be_written(media: Path) -> None:
    """At rest a journal is read from a folder without write permission; one that a crash left says what to do."""
    folder = media
    filled(folder / "j")
    # Whoever reads owns neither folder nor file, as on a mounted backup.
    (folder / "j").chmod(0o444)
    folder.chmod(0o555)
    assert in_child(READ_ONLY, str(folder / "j")).communicate(timeout=60)[0] == "5\n"
    folder.chmod(0o755)
    with Journal(folder / "j") as journal:
        journal.append([accepted(5)])
        left = (folder / "j-wal").read_bytes()
        main = (folder / "j").read_bytes()
    (folder / "j").chmod(0o644)
    (folder / "j").write_bytes(main)
    (folder / "j-wal").write_bytes(left)
    for path in folder.iterdir():
        path.chmod(0o444)
    folder.chmod(0o555)
    said = in_child(READ_ONLY, str(folder / "j")).communicate(timeout=60)[0]
    folder.chmod(0o755)
    assert "was not closed in good order" in said
    assert "copy the folder to where it may be written" in said
