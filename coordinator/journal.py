"""The journal: every fact of a run in one SQLite file, chained by hashes; a promise becomes true when a row is synced.

One coordinator writes: it holds a lock on `<journal>.lock` for as long as it lives. Anyone may read meanwhile
(`Journal.open_read`): in WAL mode readers and the writer do not wait for each other.

    meta   key, value                            schema = 1
    rows   seq, at, kind, body, prev, hash       seq from 1 without gaps; body is a record's msgpack
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from coordinator import records
from coordinator.records import Record
from shared import audit
from shared.audit import GENESIS, Row
from shared.errors import ConfigError, CorruptError, MailboatError, RefusedError, UnavailableError

SCHEMA_VERSION = 1
BUSY_MS = 5_000
"""How long to wait for SQLite's own short locks, held while a log is folded into the file or recovered."""

PAGE_ROWS = 32
"""Rows read at a time; a row that holds a manifest has up to 1 MB."""

_RESTORE = "restore the journal from a backup; do not continue this run"
_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value NOT NULL) WITHOUT ROWID;
CREATE TABLE rows (
    seq INTEGER PRIMARY KEY, at REAL NOT NULL, kind TEXT NOT NULL,
    body BLOB NOT NULL, prev BLOB NOT NULL, hash BLOB NOT NULL
);
INSERT INTO meta VALUES ('schema', 1);
"""
_PAGE = "SELECT seq, at, kind, body, prev, hash FROM rows WHERE seq > ? ORDER BY seq LIMIT ?"


class JournalReader:
    """A journal open for reading, beside the coordinator that writes it; a context manager, usable from any thread."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise ConfigError(f"{path}: no journal there", hint="name the storage folder of a run that has begun")
        self.path = path
        self._lock = threading.Lock()
        with self._named():
            self._db = _connect(f"{path.resolve().as_uri()}?mode=ro")
        with self._closed_on_error(), self._named():
            self._check_schema()

    def rows(self, after: int = 0, limit: int | None = None) -> Iterator[Row]:
        """Yield up to `limit` rows with seq above `after`, in order, as stored; `verified` rows come from `verified`.

        No transaction stays open between pages, so that a slow reader does not hold up the writer.
        """
        while limit is None or limit > 0:
            wanted = PAGE_ROWS if limit is None else min(limit, PAGE_ROWS)
            with self._lock, self._named():
                page = self._db.execute(_PAGE, (after, wanted)).fetchall()
            for found in page:
                row = self._row(found)
                if row.seq <= after:  # in a damaged index the next page can be an earlier one, for ever
                    raise CorruptError(f"{self.path}: row {row.seq} comes again after row {after}", hint=_RESTORE)
                after = row.seq
                yield row
            if len(page) < wanted:
                return
            limit = None if limit is None else limit - len(page)

    def replay(self) -> Iterator[Record]:
        """Yield all records in order, each row checked against the chain and its own columns.

        Raises CorruptError that names file and row, and RefusedError(rule='newer-schema') for a newer release's record.
        """
        for row in audit.verified(self.rows(), str(self.path)):
            yield self._record(row)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def _row(self, found: tuple[Any, ...]) -> Row:
        match found:
            case (int(), float(), str(), bytes(), bytes(), bytes()):
                return Row(*found)
        raise CorruptError(f"{self.path}: row {found[0]} has values of wrong types", hint=_RESTORE)

    def _record(self, row: Row) -> Record:
        where = f"{self.path}: row {row.seq}"
        try:
            record = records.from_bytes(row.body)
        except CorruptError as error:
            raise CorruptError(f"{where}: {error.message}", hint=error.hint) from None
        except RefusedError as error:
            raise RefusedError(f"{where}: {error.message}", rule=error.rule, hint=error.hint) from None
        if (row.kind, row.at) != (record.kind, records.recorded_at(record)):
            raise CorruptError(f"{where}: its columns differ from its body", hint=_RESTORE)
        return record

    def _check_schema(self) -> None:
        found = self._db.execute("SELECT value FROM meta WHERE key = 'schema'").fetchone()
        version = found[0] if found else None
        if not isinstance(version, int) or version < 1:
            raise CorruptError(f"{self.path}: no schema version in it", hint=_RESTORE)
        if version > SCHEMA_VERSION:
            raise RefusedError(
                f"{self.path}: schema version {version}, this release knows {SCHEMA_VERSION}",
                rule="newer-schema",
                hint="run the release that wrote the journal, or a later one",
            )

    @contextlib.contextmanager
    def _closed_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._db.close()
            raise

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Turn SQLite's errors into ours, with the file's name."""
        try:
            yield
        except sqlite3.Error as error:
            raise _translated(self.path, error) from None
        except UnicodeDecodeError:
            raise CorruptError(f"{self.path} holds text that is not UTF-8", hint=_RESTORE) from None


class Journal(JournalReader):
    """A journal open for writing, made when missing; exactly one process at a time.

    Raises UnavailableError when another coordinator holds it or the folder cannot be written, CorruptError when the
    file is not a journal, RefusedError(rule='newer-schema') when a newer release wrote it.
    """

    _length: int
    _head: bytes

    def __init__(self, path: Path) -> None:
        self._lock_file = _take_lock(path)
        try:
            self._open(path)
        except BaseException:
            os.close(self._lock_file)
            raise

    @classmethod
    def open_read(cls, path: Path) -> JournalReader:
        """Open for reading, whether or not a coordinator runs; ConfigError when there is no journal."""
        return JournalReader(path)

    @property
    def length(self) -> int:
        """Number of rows, which is the seq of the last one."""
        return self._length

    def append(self, facts: Sequence[Record]) -> tuple[Row, ...]:
        """Store all `facts` in one transaction, synced when this returns, or none of them; return their rows.

        UnavailableError when the disk is full (the journal stays usable) or fails (it does not: whether the
        rows survived is known after opening it again).
        """
        with self._lock, self._named():
            rows: list[Row] = []
            length, head = self._length, self._head
            for fact in facts:
                row = audit.linked(head, length + 1, records.recorded_at(fact), fact.kind, records.to_bytes(fact))
                length, head = row.seq, row.hash
                rows.append(row)
            self._commit(rows)
            self._length, self._head = length, head
            return tuple(rows)

    def close(self) -> None:
        """Fold the log into the file, close it and let another coordinator in."""
        super().close()
        if self._lock_file >= 0:
            os.close(self._lock_file)
            self._lock_file = -1

    def _open(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        with self._named():
            self._db = _connect(f"{path.resolve().as_uri()}?mode=rwc")
        with self._closed_on_error(), self._named():
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            if self._db.execute("SELECT count(*) FROM sqlite_schema").fetchone() == (0,):
                self._db.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} COMMIT;")
            self._check_schema()
            last = self._db.execute("SELECT seq, hash FROM rows ORDER BY seq DESC LIMIT 1").fetchone()
        self._length, self._head = last or (0, GENESIS)

    def _commit(self, rows: Sequence[Row]) -> None:
        try:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany(
                "INSERT INTO rows VALUES (?, ?, ?, ?, ?, ?)",
                [(row.seq, row.at, row.kind, row.body, row.prev, row.hash) for row in rows],
            )
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            if _primary_code(error) != sqlite3.SQLITE_FULL:
                # After a failed sync the kernel may have forgotten the pages: a second try could succeed falsely.
                self._db.close()
            elif self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise


def _connect(uri: str) -> sqlite3.Connection:
    # Statements are serialised by our own lock; transactions are written out by hand.
    db = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)
    db.execute(f"PRAGMA busy_timeout = {BUSY_MS}")
    return db


def _take_lock(path: Path) -> int:
    """Return a descriptor that holds the journal's lock; the system lets go of it when the process ends, however."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A file of its own: closing any descriptor of the database file would drop SQLite's locks on it.
        descriptor = os.open(path.with_name(f"{path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise UnavailableError(
            f"{path.parent} cannot be written: {error.strerror}", hint="mend its permissions or make room"
        ) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UnavailableError(
            f"{path.parent}: another coordinator runs there", hint="stop it, or give this one another storage folder"
        ) from None
    return descriptor


def _primary_code(error: sqlite3.Error) -> int | None:
    """SQLite's primary result code; None for what Python's module found itself."""
    code: int | None = getattr(error, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF


def _translated(path: Path, error: sqlite3.Error) -> MailboatError:
    if isinstance(error, sqlite3.ProgrammingError):
        return UnavailableError(f"{path} is closed", hint="open it again; its rows tell what was stored")
    match _primary_code(error):
        case sqlite3.SQLITE_FULL:
            return UnavailableError(f"{path}: the disk is full", hint="make room; nothing stored before is lost")
        case sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_NOTADB | sqlite3.SQLITE_ERROR | None:
            return CorruptError(f"{path} is not a sound journal: {error}", hint=_RESTORE)
    return UnavailableError(f"{path} cannot be used: {error}", hint="check the disk, then start again")
