"""The journal: every fact of a run in one SQLite file, chained by hashes; a promise becomes true when a row is synced.

One coordinator writes: it holds a lock on `<journal>.lock` for as long as it lives. Anyone may read meanwhile
(`coordinator.rows`): in WAL mode readers and the writer do not wait for each other.

    meta       key, value                            schema = 5
    rows       seq, at, kind, body, prev, hash       seq from 1 without gaps; body is a record's msgpack
    snapshots  seq, body, audit_size, audit_sha256   the newest one; row seq, of kind snapshot, carries its digest
    segments   first, last, file, sha256             rows that lie in files of their own, in archive/

Compaction has one commit point. First the rows are copied into a segment, which is made durable; then one transaction
adds the snapshot and its row, names the segment and takes the rows out. Killed before it, the segment is litter that
the next compaction replaces; killed after it, nothing is left to do.

Up to schema 4 rows named files and frames by SHA-256, now by BLAKE3 (`shared.digest`): such a run can only be ended,
and audited, by the release that began it.
"""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from coordinator import records, rows, snapshots
from coordinator.ledger import Ledger
from coordinator.records import Record, Snapshot
from coordinator.rows import ARCHIVE, JournalReader
from shared import audit, durable
from shared.audit import GENESIS, Mark, Row
from shared.lock import FolderLock

_ROWS = """
CREATE TABLE rows (
    seq INTEGER PRIMARY KEY, at REAL NOT NULL, kind TEXT NOT NULL,
    body BLOB NOT NULL, prev BLOB NOT NULL, hash BLOB NOT NULL
);
"""
_META = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value NOT NULL) WITHOUT ROWID;
INSERT INTO meta VALUES ('schema', 5);
"""
_COMPACTION = """
CREATE TABLE snapshots (
    seq INTEGER PRIMARY KEY, body BLOB NOT NULL, audit_size INTEGER NOT NULL, audit_sha256 TEXT NOT NULL
);
CREATE TABLE segments (
    first INTEGER PRIMARY KEY, last INTEGER NOT NULL, file TEXT NOT NULL, sha256 TEXT NOT NULL
);
"""

_INSERT = "INSERT INTO rows VALUES (?, ?, ?, ?, ?, ?)"
_TEMPORARY = "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;"
"""For a segment, which is synced as a whole before it gets its name."""


class Journal(JournalReader):
    """A journal open for writing, made when missing; exactly one process at a time.

    Raises UnavailableError when another coordinator holds it or the folder cannot be written, CorruptError when the
    file is not a journal, RefusedError with rule 'newer-schema' or 'older-schema' when another
    release wrote it.
    """

    def __init__(self, path: Path) -> None:
        with contextlib.ExitStack() as on_error:
            # A file of its own: closing any descriptor of the database file would drop SQLite's locks on it.
            self._writer = FolderLock(path.with_name(f"{path.name}.lock"), holder="coordinator")
            on_error.callback(self._writer.close)
            self._prepare(path)
            with self._named():
                self._db = rows.connect(f"{path.resolve().as_uri()}?mode=rwc")
                on_error.callback(self._db.close)
                self._set_up()
                self._length, self._head = self._last()
            on_error.pop_all()

    @classmethod
    def open_read(cls, path: Path) -> JournalReader:
        """Open for reading, whether or not a coordinator runs; ConfigError when there is no journal."""
        return JournalReader(path)

    @property
    def length(self) -> int:
        """Number of rows there ever were, which is the seq of the last one."""
        return self._length

    @property
    def head(self) -> bytes:
        """Hash of the last row."""
        return self._head

    @property
    def loose(self) -> int:
        """Rows since the newest snapshot: what a restart has to replay."""
        found: int | None = self._query("SELECT max(seq) FROM snapshots")[0][0]
        return self._length - (found or 0)

    def append(self, facts: Sequence[Record]) -> tuple[Row, ...]:
        """Store all `facts` in one transaction, synced when this returns, or none of them; return their rows.

        NoRoomError when the disk is full (the journal stays usable), UnavailableError when it fails (it does not:
        whether the rows survived is known after opening it again).
        """
        with self._lock, self._named():
            written = self._linked(facts)
            self._commit(lambda: self._insert(self._db, written))
            self._length, self._head = (written[-1].seq, written[-1].hash) if written else (self._length, self._head)
            return written

    def compact(self, ledger: Ledger, mark: Mark, at: float) -> int:
        """Sum up all rows so far in a snapshot, move them into a segment, and return how many were moved.

        `ledger` is the state after the last row, `mark` where audit.jsonl stands, `at` unix seconds. Errors as
        `append`; CorruptError when the rows are not what was written, and then nothing is moved.
        """
        first = self._first()
        last = self._length
        if first >= last:
            return 0
        file, sha256 = self._archive(first, last)
        body = snapshots.to_bytes(ledger)
        digest = hashlib.sha256(body).hexdigest()
        with self._lock, self._named():
            (row,) = self._linked([Snapshot(ledger.version, len(ledger.known), digest, at)])

            def swap() -> None:
                self._insert(self._db, [row])
                self._db.execute("DELETE FROM snapshots")
                self._db.execute("INSERT INTO snapshots VALUES (?, ?, ?, ?)", (row.seq, body, mark.size, mark.sha256))
                self._db.execute("INSERT INTO segments VALUES (?, ?, ?, ?)", (first, last, file, sha256))
                self._db.execute("DELETE FROM rows WHERE seq <= ?", (last,))

            self._commit(swap)
            self._length, self._head = row.seq, row.hash
        return last - first + 1

    def close(self) -> None:
        """Fold the log into the file, close it and let another coordinator in."""
        super().close()
        self._writer.close()

    def _set_up(self) -> None:
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        if self._db.execute("SELECT count(*) FROM sqlite_schema").fetchone() == (0,):
            self._db.executescript(f"BEGIN IMMEDIATE; {_META} {_ROWS} {_COMPACTION} COMMIT;")
        self.schema = self._read_schema()

    def _last(self) -> tuple[int, bytes]:
        found = self._query("SELECT seq, hash FROM rows ORDER BY seq DESC LIMIT 1")
        return (found[0][0], found[0][1]) if found else (0, GENESIS)

    def _first(self) -> int:
        found: int | None = self._query("SELECT min(seq) FROM rows")[0][0]
        return found or 0

    def _linked(self, facts: Sequence[Record]) -> tuple[Row, ...]:
        linked: list[Row] = []
        length, head = self._length, self._head
        for fact in facts:
            row = audit.linked(head, length + 1, records.recorded_at(fact), fact.kind, records.to_bytes(fact))
            length, head = row.seq, row.hash
            linked.append(row)
        return tuple(linked)

    def _archive(self, first: int, last: int) -> tuple[str, str]:
        """Make the segment of these rows durable, each checked against the chain; return its name and SHA-256."""
        folder = self.path.parent / ARCHIVE
        durable.make_folder(folder)
        durable.remove_temporaries(folder)
        name = rows.segment_name(first, last)
        (begin,) = self.rows(first - 1, limit=1)
        with durable.temporary_file(folder) as (temporary, fd):
            with contextlib.closing(rows.connect(temporary.resolve().as_uri())) as db, self._named(folder / name):
                db.executescript(f"{_TEMPORARY} {_ROWS} BEGIN;")
                found = self.rows(first - 1, limit=last - first + 1)
                self._insert(db, audit.verified(found, str(self.path), after=first - 1, prev=begin.prev))
                db.execute("COMMIT")
            with durable.storage_errors(folder):
                durable.sync_file(fd)
            with temporary.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            temporary.replace(folder / name)
        durable.fsync_dir(folder)
        return name, sha256

    def _insert(self, db: sqlite3.Connection, written: Sequence[Row] | Iterator[Row]) -> None:
        db.executemany(_INSERT, ((row.seq, row.at, row.kind, row.body, row.prev, row.hash) for row in written))

    def _commit(self, change: Callable[[], None]) -> None:
        """Make a change in one transaction, synced when this returns."""
        try:
            self._db.execute("BEGIN IMMEDIATE")
            change()
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            if rows.primary_code(error) != sqlite3.SQLITE_FULL:
                # After a failed sync the kernel may have forgotten the pages: a second try could succeed falsely.
                self._db.close()
            elif self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise
