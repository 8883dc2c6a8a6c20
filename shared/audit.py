"""The audit trail: the hash chain over the journal's rows, and the JSON lines that people tail.

The journal is the truth. `audit.jsonl` is a view of it, one line a row, written after the row is committed and mended
from the journal at every start, so that losing or editing it loses nothing.

    hash = SHA-256(previous hash || seq, 8 bytes big-endian || kind || 0x00 || body)

The first row's previous hash is 32 zero bytes. The zero byte ends the kind, so that no two rows feed the same bytes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import msgpack

from shared.errors import CorruptError, NoRoomError, UnavailableError
from shared.manifest import StepFacts, manifest_from_bytes

if TYPE_CHECKING:
    from hashlib import _Hash

_PIECE = 1 << 20
GENESIS = bytes(32)
"""Hash before the first row."""

Line = Mapping[str, Any]
"""One row for people: seq, at (unix seconds), kind, the record's fields, hash (hex)."""


# -- the chain ---


@dataclass(frozen=True, slots=True)
class Row:
    """One journal row; `body` is the record's msgpack, `prev` and `hash` are 32 bytes each."""

    seq: int
    at: float
    kind: str
    body: bytes
    prev: bytes
    hash: bytes


def chain_hash(prev: bytes, seq: int, kind: str, body: bytes) -> bytes:
    """SHA-256 (32 bytes) that binds a row to all rows before it; see the module's docstring."""
    return hashlib.sha256(b"".join((prev, seq.to_bytes(8, "big"), kind.encode(), b"\0", body))).digest()


def linked(prev: bytes, seq: int, at: float, kind: str, body: bytes) -> Row:
    """Return the row that follows the one whose hash is `prev`."""
    return Row(seq, at, kind, body, prev, chain_hash(prev, seq, kind, body))


def verified(rows: Iterable[Row], where: str, *, after: int = 0, prev: bytes = GENESIS) -> Iterator[Row]:
    """Yield `rows`, each once it is proven to follow the one before; CorruptError names `where` and the row.

    `after` and `prev` are number and hash of the row before the first.
    """
    for row in rows:
        if row.seq != after + 1:
            raise _broken(where, row.seq, f"follows row {after}")
        if row.prev != prev:
            raise _broken(where, row.seq, "does not carry the hash of the row before it")
        if row.hash != chain_hash(prev, row.seq, row.kind, row.body):
            raise _broken(where, row.seq, "was changed after it was written")
        after, prev = row.seq, row.hash
        yield row


def _broken(where: str, seq: int, what: str) -> CorruptError:
    return CorruptError(
        f"{where}: row {seq} {what}", hint="restore the journal from a backup; do not continue this run"
    )


# -- one line a row ---

_SHOWN_AS = {"seq": "row"}


def line_of(row: Row) -> Line:
    """Return a row's line; a manifest inside it is cut down to id, file digest, sizes, and the state that a step makes.

    A membership is left out, other bytes are in hex, and the earlier row that a signature speaks of is `row`: `seq` is
    the line's own number.
    """
    fields: dict[str, Any] = msgpack.unpackb(row.body, raw=False, strict_map_key=True)
    shown = {
        _SHOWN_AS.get(key, key): value.hex() if isinstance(value, bytes) else value
        for key, value in fields.items()
        if key not in {"v", "t", "at", "state", "member"}
    }
    if "state" in fields:
        manifest = manifest_from_bytes(fields["state"])
        state: dict[str, Any] = {
            "transfer_id": manifest.transfer_id,
            "file_digest": manifest.file_digest,
            "file_size": manifest.file_size,
            "wire_bytes": manifest.wire_bytes,
            "codec": manifest.codec,
        }
        if isinstance(manifest.facts, StepFacts):
            state["makes_digest"] = manifest.leads_to
        shown["state"] = state
    return {"seq": row.seq, "at": row.at, "kind": row.kind, **shown, "hash": row.hash.hex()}


def line_bytes(row: Row) -> bytes:
    """The line as it stands in audit.jsonl: minimal JSON in ASCII, ended by one newline."""
    return json.dumps(line_of(row), separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode() + b"\n"


def render(line: Line) -> str:
    """One line of text for people, times in UTC, ids cut to 8 characters."""
    when = datetime.fromtimestamp(line["at"], tz=UTC).strftime("%Y-%m-%d %H:%M:%SZ")
    return f"{when}  #{line['seq']:<5d} {line['kind']:<10s} {_told(line)}"


def _told(line: Line) -> str:
    if "state" in line:
        return _told_version(line)
    match line["kind"]:
        case "substituted":
            too_few = f"{line['updates']} updates, the agreed rule needs {line['needed']}"
            return f"version {line['version']}  {too_few}: merged by {line['rule']}"
        case "finished":
            return f"version {line['version']} is the last"
        case "signed":
            return f"version {line['version']}  row {line['row']} has hash {line['head'][:8]}, signed"
        case "pruned":
            return f"updates merged up to version {line['version']} are kept no more; their digests are"
        case "snapshot":
            return f"version {line['version']}, {line['updates']} updates  digest {line['sha256'][:8]}"
    return _told_of_update(line)


def _told_of_update(line: Line) -> str:
    match line["kind"]:
        case "accepted":
            start = f"{line['site']}  update {line['update_id'][:8]}  from version {line['base_version']}"
            return f"{start}  examples {line['examples']}  norm {line['norm']:.4g}"
        case "validated":
            return f"update {line['update_id'][:8]}  loss {line['loss']:.4g}"
        case "rejected":
            return f"{line['site']}  update {line['update_id'][:8]}  {line['rule']}: {line['detail']}"
        case "quarantined":
            return f"update {line['update_id'][:8]}  {line['rule']}: {line['detail']}"
        case "released":
            return f"update {line['update_id'][:8]}  out of quarantine"
        case "dropped":
            return f"update {line['update_id'][:8]}  {line['rule']}"
        case "witnessed":
            seen = f"had seen row {line['row']} with hash {line['head'][:8]}" if line["row"] else "had seen no head"
            return f"{line['site']}  update {line['update_id'][:8]}  signed; {seen}"
    return "written by a newer release"


def _told_version(line: Line) -> str:
    stepped = line["state"].get("makes_digest")
    state = f"version {line.get('version', 0)}  state {(stepped or line['state']['file_digest'])[:8]}"
    match line["kind"]:
        case "opened":
            return f"{state}  fingerprint {line['fingerprint'][:8]}"
        case "committed":
            parts = ", ".join(
                f"{part['site']} {part['update_id'][:8]} ({part['staleness']} late, weight {part['weight']:.4g})"
                for part in line["contributions"]
            )
            return f"{state}{', by a step' if stepped else ''}  from {parts}"
        case "anchored":
            return f"{state}  can be had whole, too"
    return "written by a newer release"


# -- filters ---


@dataclass(frozen=True, slots=True)
class Query:
    """Which lines to show; a field that is None lets every line pass."""

    version: int | None = None
    """The line that makes this version, and the fate of updates that start from it."""
    site: str | None = None
    """Updates of this site, and the versions that they are part of."""
    update_id: str | None = None
    rule: str | None = None
    """What was rejected, dropped or put into quarantine under this rule."""


_OF_WAITING = {"dropped", "quarantined", "released", "validated", "witnessed"}
"""Kinds of lines about an update that do not say which version it started from."""


def select(lines: Iterable[Line], query: Query) -> Iterator[Line]:
    """Yield the lines that `query` asks for; `lines` start at the first row, or a `dropped` line has no known site.

    Memory: one small entry for each update accepted and not yet merged.
    """
    waiting: dict[str, Line] = {}
    for line in lines:
        about = [line, *line.get("contributions", ())]
        if line["kind"] == "accepted":
            waiting[line["update_id"]] = line
        elif line["kind"] in _OF_WAITING and (origin := waiting.get(line["update_id"])) is not None:
            about.append(origin)
            if line["kind"] == "dropped":
                del waiting[line["update_id"]]
        for part in line.get("contributions", ()):
            waiting.pop(part["update_id"], None)
        if (
            (query.version is None or query.version in _versions(line, about))
            and (query.site is None or query.site in {each.get("site") for each in about})
            and (query.update_id is None or query.update_id in {each.get("update_id") for each in about})
            and (query.rule is None or query.rule == line.get("rule"))
        ):
            yield line


def _versions(line: Line, about: Iterable[Line]) -> set[int | None]:
    if line["kind"] == "opened":
        return {0}
    if line["kind"] in {"committed", "finished", "signed", "substituted"}:
        return {line["version"]}
    return {each.get("base_version") for each in about}


# -- the file ---


@dataclass(frozen=True, slots=True)
class Mark:
    """Where audit.jsonl stood after row `seq`: its bytes so far, and their SHA-256 in hex."""

    seq: int
    size: int
    sha256: str


class AuditLog:
    """`audit.jsonl`, kept in step with a journal; for one thread at a time.

    `source(after)` yields the journal's rows with seq above `after`. Opening compares every line with its row and
    writes the file anew from the first difference on: a file that is missing, short, torn in its last line, edited or
    too long ends up as the journal says. Lines up to `mark`, written by an earlier process, are compared by their
    digest alone. Rows up to `pruned` are not in the source any more: a file whose lines of them were lost begins
    behind them. Nothing is synced: what a power cut takes is written at the next start.
    """

    def __init__(
        self, path: Path, source: Callable[[int], Iterable[Row]], *, mark: Mark | None = None, pruned: int = 0
    ) -> None:
        self.path = path
        self._source = source
        self._seq = pruned
        self._size = 0
        self._sha256 = hashlib.sha256()
        with self._named():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            self._measure(mark)
        self.mended = self.follow()
        """Lines that opening had to write."""

    @property
    def mark(self) -> Mark:
        """Where the file stands."""
        return Mark(self._seq, self._size, self._sha256.hexdigest())

    def follow(self, fresh: Sequence[Row] = ()) -> int:
        """Write the lines of all rows that are not there yet and return their number.

        `fresh` may be the rows that were stored last: where they are the next ones, the source is not asked for them.
        UnavailableError when the disk is full; a later call then writes what this one could not.
        """
        before = self._seq
        rows = fresh if fresh and fresh[0].seq == before + 1 else self._source(before)
        with self._named(), self.path.open("r+b", buffering=0) as file:
            # What lies behind the last whole line of ours is a torn write, or nothing.
            file.truncate(self._size)
            file.seek(self._size)
            for row in rows:
                line = line_bytes(row)
                self._size += _write_all(file, line)
                self._sha256.update(line)
                self._seq = row.seq
        return self._seq - before

    def _measure(self, mark: Mark | None) -> None:
        """Set number and end of the last line that is as it must be."""
        with self.path.open("rb") as file:
            if mark is not None:
                begun = _digest(file, mark.size)
                if begun.hexdigest() == mark.sha256:
                    self._seq, self._size, self._sha256 = mark.seq, mark.size, begun
                else:
                    file.seek(0)
            for row in self._source(self._seq):
                wanted = line_bytes(row)
                if file.readline() != wanted:
                    return
                self._sha256.update(wanted)
                self._seq, self._size = row.seq, self._size + len(wanted)

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            family = NoRoomError if error.errno in {errno.ENOSPC, errno.EDQUOT} else UnavailableError
            raise family(
                f"{self.path} cannot be written: {error.strerror}", hint="make room or mend its permissions"
            ) from None


def _write_all(file: FileIO, data: bytes) -> int:
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]
    return len(data)


def _digest(file: IO[bytes], size: int) -> _Hash:
    """SHA-256 over the next `size` bytes, or fewer where the file ends."""
    digest = hashlib.sha256()
    while size and (piece := file.read(min(size, _PIECE))):
        digest.update(piece)
        size -= len(piece)
    return digest
