"""The journal open for reading: rows, records and the newest snapshot, beside a coordinator that writes or at rest.

Beside a coordinator SQLite's write-ahead log is read too. At rest the file is opened as immutable: nothing is written
beside it, and it may lie on media that cannot be written. A coordinator that starts meanwhile is noticed, and the file
is opened anew; no answer is given from pages that changed under the reader.

Rows that a snapshot has summed up lie in segments: SQLite files of the same table in the folder `archive` beside the
journal. They may be moved away (`PrunedError` then says which file is missed); the coordinator needs none of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import sqlite3
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from coordinator import records, snapshots
from coordinator.ledger import Ledger
from coordinator.records import Record, Snapshot
from shared import audit
from shared.audit import GENESIS, Mark, Row
from shared.errors import ConfigError, CorruptError, MailboatError, NoRoomError, RefusedError, UnavailableError

SCHEMA_VERSION = 5
BUSY_MS = 5_000
"""How long to wait for SQLite's own short locks, held while a log is folded into the file or recovered."""

PAGE_ROWS = 32
"""Rows read at a time; a row that holds a manifest has up to 1 MB."""

ARCHIVE = "archive"
"""Folder of the segments, beside the journal."""

RESTORE = "restore the journal from a backup; do not continue this run"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PAGE = "SELECT seq, at, kind, body, prev, hash FROM rows WHERE seq > ? ORDER BY seq LIMIT ?"
_SNAPSHOT = """
SELECT rows.seq, at, kind, rows.body, prev, hash, snapshots.body, audit_size, audit_sha256
FROM snapshots LEFT JOIN rows USING (seq) ORDER BY snapshots.seq DESC LIMIT 1
"""
_SEGMENTS = "SELECT first, last, file, sha256 FROM segments ORDER BY first"


class PrunedError(ConfigError):
    """Rows are in a segment that somebody moved away."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows `first` to `last`, moved into a file of their own; `sha256` (hex) is the file's."""

    first: int
    last: int
    path: Path
    sha256: str

    def __str__(self) -> str:
        place = f"{ARCHIVE}/{self.path.name}, SHA-256 {self.sha256}"
        return f"rows {self.first} to {self.last} are in {place}; checked from the snapshot behind them on"


@dataclass(frozen=True, slots=True)
class Restored:
    """The newest snapshot: the row that names it, the state of the run before that row, and where audit.jsonl stood."""

    row: Row
    ledger: Ledger
    mark: Mark


class JournalReader:
    """A journal open for reading; a context manager, usable from any thread.

    Raises ConfigError when there is none, CorruptError when the file is not a journal, RefusedError with rule
    'newer-schema' or 'older-schema' when another release wrote it, UnavailableError when it cannot be read where it
    lies.
    """

    schema: int

    def __init__(self, path: Path) -> None:
        none = ConfigError(f"{path}: no journal there", hint="name the storage folder of a run that has begun")
        if not path.is_file():
            raise none
        self._prepare(path)
        self._connect()
        with contextlib.ExitStack() as on_error:
            on_error.callback(self.close)
            if self._query("SELECT count(*) FROM sqlite_schema") == [(0,)]:
                raise none  # a coordinator is making it, or was stopped in that instant
            self.schema = self._read_schema()
            on_error.pop_all()

    def rows(self, after: int = 0, limit: int | None = None) -> Iterator[Row]:
        """Yield up to `limit` rows with seq above `after`, in order, as stored; `replay` checks them.

        No transaction stays open between pages, so that a slow reader does not hold up the writer. PrunedError when
        they are in a segment that is not there.
        """
        while limit is None or limit > 0:
            page = self._page(after, PAGE_ROWS if limit is None else min(limit, PAGE_ROWS))
            if not page:
                return
            for found in page:
                row = self._row(found)
                if row.seq <= after:  # in a damaged index the next page can be an earlier one, for ever
                    raise CorruptError(f"{self.path}: row {row.seq} comes again after row {after}", hint=RESTORE)
                after = row.seq
                yield row
            limit = None if limit is None else limit - len(page)

    def replay(self, since: Row | None = None) -> Iterator[Record]:
        """Yield all records in order (behind row `since`), each checked against the chain and its own columns.

        Raises CorruptError that names file and row, RefusedError(rule='newer-schema') for a newer release's record,
        and PrunedError as `rows`.
        """
        after, prev = (since.seq, since.hash) if since else (0, GENESIS)
        for row in audit.verified(self.rows(after), str(self.path), after=after, prev=prev):
            yield self._record(row)

    def restore(self) -> Restored | None:
        """Return the newest snapshot, checked against the row that carries its digest; None when there is none.

        CorruptError when it is not what was written: the rows before it, while they are there, still tell everything.
        """
        found = self._query(_SNAPSHOT)
        if not found:
            return None
        row = self._row(found[0][:6])
        record = self._record(row)
        match found[0][6:]:
            case (bytes(body), int(size), str(sha256)):
                chained = row.hash == audit.chain_hash(row.prev, row.seq, row.kind, row.body)
                named = isinstance(record, Snapshot) and record.sha256 == hashlib.sha256(body).hexdigest()
                if chained and named:
                    return Restored(row, snapshots.from_bytes(body), Mark(row.seq - 1, size, sha256))
        raise CorruptError(f"{self.path}: the snapshot of row {row.seq} is not what was written", hint=RESTORE)

    def segments(self) -> list[Segment]:
        """Segments in order, whether or not their files are there."""
        return [self._listed(found) for found in self._query(_SEGMENTS)]

    def pruned(self) -> list[Segment]:
        """Segments whose files are not there."""
        return [segment for segment in self.segments() if not segment.path.is_file()]

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._close_segment()
            self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    # -- connections ---

    def _prepare(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._rest: tuple[int, ...] | None = None
        self._segment: tuple[Segment, sqlite3.Connection] | None = None

    def _connect(self) -> None:
        self._rest = at_rest(self.path)
        mode = "mode=ro" if self._rest is None else "mode=ro&immutable=1"
        with self._named():
            self._db = connect(f"{self.path.resolve().as_uri()}?{mode}")

    def _query(self, statement: str, values: tuple[object, ...] = ()) -> list[tuple[Any, ...]]:
        with self._lock, self._named():
            if self._rest is None:
                return self._db.execute(statement, values).fetchall()
            try:
                found = self._db.execute(statement, values).fetchall()
            except sqlite3.DatabaseError:
                if self._undisturbed():
                    raise
            else:
                if self._undisturbed():
                    return found
            # A coordinator has begun to write: what an immutable file answered is worth nothing.
            self._db.close()
            self._rest = None
            self._db = connect(f"{self.path.resolve().as_uri()}?mode=ro")
            return self._db.execute(statement, values).fetchall()

    def _undisturbed(self) -> bool:
        return self._rest == at_rest(self.path)

    def _page(self, after: int, wanted: int) -> list[tuple[Any, ...]]:
        found = self._query(_PAGE, (after, wanted))
        if found and found[0][0] == after + 1:
            return found
        # Looked at after the rows: what was moved since has its segment by now.
        segment = next((each for each in self.segments() if each.first <= after + 1 <= each.last), None)
        if segment is None:
            return found
        with self._lock, self._named(segment.path):
            return self._open_segment(segment).execute(_PAGE, (after, wanted)).fetchall()

    def _open_segment(self, segment: Segment) -> sqlite3.Connection:
        if self._segment is not None and self._segment[0] == segment:
            return self._segment[1]
        self._close_segment()
        if not segment.path.is_file():
            raise PrunedError(
                f"{segment.path} is not there, and it holds rows {segment.first} to {segment.last} of the journal",
                hint=f"bring it back from where it was put; its SHA-256 is {segment.sha256}",
            )
        db = connect(f"{segment.path.resolve().as_uri()}?mode=ro&immutable=1")
        self._segment = (segment, db)
        return db

    def _close_segment(self) -> None:
        if self._segment is not None:
            self._segment[1].close()
            self._segment = None

    # -- values ---

    def _row(self, found: tuple[Any, ...]) -> Row:
        match found:
            case (int(), float(), str(), bytes(), bytes(), bytes()):
                return Row(*found)
        raise CorruptError(f"{self.path}: row {found[0]} has values of wrong types", hint=RESTORE)

    def _listed(self, found: tuple[Any, ...]) -> Segment:
        match found:
            case (int(first), int(last), str(file), str(sha256)):
                if file == segment_name(first, last) and _SHA256.fullmatch(sha256):
                    return Segment(first, last, self.path.parent / ARCHIVE / file, sha256)
        raise CorruptError(f"{self.path}: its list of segments is not what was written", hint=RESTORE)

    def _record(self, row: Row) -> Record:
        where = f"{self.path}: row {row.seq}"
        try:
            record = records.from_bytes(row.body)
        except CorruptError as error:
            raise CorruptError(f"{where}: {error.message}", hint=error.hint) from None
        except RefusedError as error:
            raise RefusedError(f"{where}: {error.message}", rule=error.rule, hint=error.hint) from None
        if (row.kind, row.at) != (record.kind, records.recorded_at(record)):
            raise CorruptError(f"{where}: its columns differ from its body", hint=RESTORE)
        return record

    def _read_schema(self) -> int:
        found = self._query("SELECT value FROM meta WHERE key = 'schema'")
        version = found[0][0] if found else None
        if not isinstance(version, int) or version < 1:
            raise CorruptError(f"{self.path}: no schema version in it", hint=RESTORE)
        if version > SCHEMA_VERSION:
            raise RefusedError(
                f"{self.path}: schema version {version}, this release knows {SCHEMA_VERSION}",
                rule="newer-schema",
                hint="run the release that wrote the journal, or a later one",
            )
        if version < SCHEMA_VERSION:
            raise RefusedError(
                f"{self.path}: schema version {version}, this release knows {SCHEMA_VERSION}",
                rule="older-schema",
                hint="end, audit and export this run with the release that wrote it; another run wants another folder",
            )
        return version

    @contextlib.contextmanager
    def _named(self, path: Path | None = None) -> Iterator[None]:
        """Turn SQLite's errors into ours, with the file's name."""
        path = path or self.path
        try:
            yield
        except sqlite3.Error as error:
            raise translated(path, error) from None
        except UnicodeDecodeError:
            raise CorruptError(f"{path} holds text that is not UTF-8", hint=RESTORE) from None


def segment_name(first: int, last: int) -> str:
    """Return the name of the file of rows `first` to `last`; a journal that names another one is not ours."""
    return f"rows-{first:012d}-{last:012d}.sqlite"


def at_rest(path: Path) -> tuple[int, ...] | None:
    """Return what changes when a database file is written, or None while its write-ahead log holds anything.

    All that the log held is in the file once a writer has ended in good order; a log that a crash left needs recovery.
    """
    log = path.with_name(f"{path.name}-wal")
    with contextlib.suppress(FileNotFoundError):
        if log.stat().st_size:
            return None
    found = path.stat()
    return (found.st_ino, found.st_size, found.st_mtime_ns)


def connect(uri: str) -> sqlite3.Connection:
    """Open a database; statements are serialised by the caller's lock, transactions are written out by hand."""
    db = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)
    db.execute(f"PRAGMA busy_timeout = {BUSY_MS}")
    return db


def primary_code(error: sqlite3.Error) -> int | None:
    """SQLite's primary result code; None for what Python's module found itself."""
    code: int | None = getattr(error, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF


def translated(path: Path, error: sqlite3.Error) -> MailboatError:
    """Return our error for one of SQLite's."""
    if isinstance(error, sqlite3.ProgrammingError):
        return UnavailableError(f"{path} is closed", hint="open it again; its rows tell what was stored")
    match primary_code(error):
        case sqlite3.SQLITE_FULL:
            return NoRoomError(f"{path}: the disk is full", hint="make room; nothing stored before is lost")
        case sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_READONLY:
            return UnavailableError(
                f"{path} was not closed in good order, and its log cannot be read where it lies: {error}",
                hint="copy the folder to where it may be written, and name the copy",
            )
        case sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_NOTADB | sqlite3.SQLITE_ERROR | None:
            return CorruptError(f"{path} is not a sound journal: {error}", hint=RESTORE)
    return UnavailableError(f"{path} cannot be used: {error}", hint="check the disk, then start again")
