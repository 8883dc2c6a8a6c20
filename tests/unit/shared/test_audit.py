from __future__ import annotations

import hashlib
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.audit import (
    GENESIS,
    AuditLog,
    Line,
    Query,
    Row,
    chain_hash,
    line_bytes,
    line_of,
    linked,
    render,
    select,
    verified,
)
from shared.errors import CorruptError, UnavailableError
from shared.manifest import Manifest, StateFacts

STATE = Manifest(
    transfer_id="5e" * 16,
    federation="north",
    fingerprint="0f" * 32,
    codec="bf16",
    group=2,
    slice_size=4096,
    file_size=5000,
    file_digest="5f" * 32,
    frame_lengths=(4000, 900),
    frame_hashes=bytes(64),
    created=1000.0,
    facts=StateFacts(version=0),
).to_bytes()


def part(update: str, site: str, **fields: Any) -> dict[str, Any]:
    """One contribution."""
    return {"update_id": update * 32, "site": site, "staleness": 0, "base_version": 0, "weight": 0.5, **fields}


HISTORY: list[dict[str, Any]] = [
    {"t": "opened", "fingerprint": "0f" * 32, "state": STATE, "at": 1000.0},
    {"t": "accepted", "update_id": "a" * 32, "site": "st-mary", "base_version": 0, "examples": 812, "norm": 0.4375},
    {"t": "accepted", "update_id": "b" * 32, "site": "st-john", "base_version": 0, "examples": 90, "norm": 12.0},
    {"t": "committed", "version": 1, "contributions": [part("a", "st-mary"), part("b", "st-john")], "state": STATE},
    {"t": "rejected", "update_id": "c" * 32, "site": "st-john", "rule": "bad-digest", "detail": "frame 3"},
    {"t": "accepted", "update_id": "d" * 32, "site": "st-mary", "base_version": 1, "examples": 7, "norm": 1.0},
    {"t": "accepted", "update_id": "e" * 32, "site": "st-john", "base_version": 0, "examples": 9, "norm": 1.0},
    {
        "t": "committed",
        "version": 2,
        "contributions": [part("e", "st-john", staleness=1, weight=0.25)],
        "state": STATE,
        "optimizer_digest": None,
    },
    {"t": "finished", "version": 2},
    {"t": "dropped", "update_id": "d" * 32, "rule": "run-ended"},
    {"t": "signed", "version": 2, "seq": 9, "head": "ab" * 32, "signature": b"s", "member": b"m"},
    {"t": "accepted", "update_id": "f" * 32, "site": "st-mary", "base_version": 1, "examples": 7, "norm": 1.0},
    {"t": "witnessed", "update_id": "f" * 32, "site": "st-mary", "seq": 9, "head": "ab" * 32, "signature": b"s"},
]


def history() -> list[Row]:
    """The rows of a small run, chained."""
    rows: list[Row] = []
    for number, fields in enumerate(HISTORY):
        wire = {"v": 1, "at": 1000.0 + number, **fields}
        prev = rows[-1].hash if rows else GENESIS
        rows.append(linked(prev, number + 1, wire["at"], wire["t"], msgpack.packb(wire)))
    return rows


ROWS = history()
LINES: list[Line] = [line_of(row) for row in ROWS]


# -- the chain ---


def test_the_hash_is_the_documented_one() -> None:
    """SHA-256 over previous hash, seq as 8 bytes big-endian, kind, a zero byte, body."""
    expected = hashlib.sha256(b"\x07" * 32 + b"\0\0\0\0\0\0\x01\x02" + b"accepted" + b"\0" + b"body").digest()
    assert chain_hash(b"\x07" * 32, 258, "accepted", b"body") == expected


def test_kind_and_body_cannot_trade_bytes() -> None:
    """A letter moved from the kind to the body changes the hash."""
    assert chain_hash(GENESIS, 1, "ab", b"c") != chain_hash(GENESIS, 1, "a", b"bc")


def test_a_sound_chain_passes_whole_and_from_any_row() -> None:
    """Verification may start after any row whose hash is known."""
    assert list(verified(ROWS, "j")) == ROWS
    assert list(verified(ROWS[4:], "j", after=4, prev=ROWS[3].hash)) == ROWS[4:]


@settings(deadline=None)
@given(st.integers(0, len(ROWS) - 1), st.sampled_from(["seq", "kind", "body", "prev", "hash"]))
def test_any_changed_field_is_found_at_its_row(index: int, field: str) -> None:
    """Rows before the change are yielded; the changed one is named."""
    row = ROWS[index]
    values = {name: getattr(row, name) for name in Row.__slots__}
    values[field] = {"seq": row.seq + 1, "kind": "other", "body": row.body + b"\0"}.get(field, b"\x01" * 32)
    changed = [*ROWS[:index], Row(**values), *ROWS[index + 1 :]]
    checked = verified(changed, "j")
    assert list(itertools.islice(checked, index)) == ROWS[:index]
    with pytest.raises(CorruptError, match=f"^j: row {values['seq']} "):
        next(checked)


@pytest.mark.parametrize(
    "reorder",
    [lambda rows: rows[1:], lambda rows: [rows[0], *rows[2:]], lambda rows: [rows[0], rows[0], *rows[1:]]],
    ids=["first gone", "one gone", "one doubled"],
)
def test_missing_and_doubled_rows_are_found(reorder: Callable[[list[Row]], list[Row]]) -> None:
    """The chain has no gaps and no repetitions."""
    with pytest.raises(CorruptError):
        list(verified(reorder(ROWS), "j"))


# -- lines ---


def test_a_line_holds_the_record_and_its_hash() -> None:
    """Number, time, kind, the record's own fields, the chain's hash; nothing about encoding."""
    assert LINES[1] == {
        "seq": 2,
        "at": 1001.0,
        "kind": "accepted",
        "update_id": "a" * 32,
        "site": "st-mary",
        "base_version": 0,
        "examples": 812,
        "norm": 0.4375,
        "hash": ROWS[1].hash.hex(),
    }


def test_a_line_is_numbered_by_its_own_row() -> None:
    """Also where the record speaks of another row: whoever tails the file counts the lines."""
    assert [line["seq"] for line in LINES] == list(range(1, len(ROWS) + 1))
    assert [line["row"] for line in LINES if "row" in line] == [9, 9]


def test_a_manifest_is_cut_down() -> None:
    """A state of many frames still makes a short line, with the digest of its file."""
    assert LINES[0]["state"] == {
        "transfer_id": "5e" * 16,
        "file_digest": "5f" * 32,
        "file_size": 5000,
        "wire_bytes": 4900,
        "codec": "bf16",
    }


def test_line_bytes_are_one_json_line() -> None:
    """Each line parses by itself and holds no newline but the last byte."""
    for row, line in zip(ROWS, LINES, strict=True):
        raw = line_bytes(row)
        assert json.loads(raw) == line
        assert raw.index(b"\n") == len(raw) - 1


@pytest.mark.parametrize(
    ("index", "text"),
    [
        (0, "#1     opened     version 0  state 5f5f5f5f  fingerprint 0f0f0f0f"),
        (
            1,
            "#2     accepted   st-mary  update aaaaaaaa  from version 0  examples 812  norm 0.4375",
        ),
        (4, "#5     rejected   st-john  update cccccccc  bad-digest: frame 3"),
        (
            7,
            "#8     committed  version 2  state 5f5f5f5f  from st-john eeeeeeee (1 late, weight 0.25)",
        ),
        (8, "#9     finished   version 2 is the last"),
        (9, "#10    dropped    update dddddddd  run-ended"),
        (10, "#11    signed     version 2  row 9 has hash abababab, signed"),
        (12, "#13    witnessed  st-mary  update ffffffff  signed; had seen row 9 with hash abababab"),
    ],
)
def test_text_for_people(index: int, text: str) -> None:
    """Each kind reads as one line."""
    assert render(LINES[index]) == f"1970-01-01 00:16:{40 + index}Z  {text}"


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        (
            {"kind": "validated", "update_id": "a" * 32, "loss": 0.71828},
            "#7     validated  update aaaaaaaa  loss 0.7183",
        ),
        (
            {"kind": "substituted", "version": 2, "rule": "median", "updates": 3, "needed": 5},
            "#7     substituted version 2  3 updates, the agreed rule needs 5: merged by median",
        ),
    ],
)
def test_text_of_what_rules_of_merging_write(fields: dict[str, Any], text: str) -> None:
    """The loss of an update, and what stood in for a rule that had too few."""
    assert render({"seq": 7, "at": 1000.0, "hash": "", **fields}) == f"1970-01-01 00:16:40Z  {text}"


def test_a_kind_of_tomorrow_still_shows() -> None:
    """An unknown kind is a line that says so, not a failure of the tail."""
    row = linked(GENESIS, 1, 5.0, "pardoned", msgpack.packb({"v": 9, "t": "pardoned", "at": 5.0}))
    assert render(line_of(row)).endswith("pardoned   written by a newer release")


# -- filters ---


@pytest.mark.parametrize(
    ("query", "seqs"),
    [
        (Query(), list(range(1, 14))),
        (Query(version=0), [1, 2, 3, 7]),
        (Query(version=1), [4, 6, 10, 12, 13]),
        (Query(version=2), [8, 9, 11]),
        (Query(site="st-mary"), [2, 4, 6, 10, 12, 13]),
        (Query(site="st-john"), [3, 4, 5, 7, 8]),
        (Query(version=1, site="st-john"), [4]),
        (Query(update_id="d" * 32), [6, 10]),
        (Query(update_id="b" * 32), [3, 4]),
        (Query(site="nowhere"), []),
        (Query(rule="bad-digest"), [5]),
        (Query(rule="run-ended"), [10]),
        (Query(rule="run-ended", site="st-mary"), [10]),
        (Query(rule="run-ended", site="st-john"), []),
        (Query(rule="frame 3"), []),
    ],
)
def test_filters(query: Query, seqs: list[int]) -> None:
    """A version shows its making and the updates from it; a site its updates, versions and drops; a rule its prey."""
    assert [line["seq"] for line in select(LINES, query)] == seqs


def test_filters_follow_a_live_source() -> None:
    """Lines come out as they come in: nothing waits for the end."""
    chosen = select(iter(LINES), Query(site="st-mary"))
    assert next(chosen)["seq"] == 2


# -- the file ---

WHOLE = b"".join(map(line_bytes, ROWS))


class Journal:
    """A journal that grows."""

    def __init__(self, length: int) -> None:
        self.length = length

    def rows(self, after: int) -> list[Row]:
        """The rows with seq above `after`."""
        return ROWS[after : self.length]


def test_the_file_follows_the_rows(tmp_path: Path) -> None:
    """Rows known at opening and rows that came later all stand there, in order, at once."""
    path = tmp_path / "deep" / "audit.jsonl"
    journal = Journal(4)
    log = AuditLog(path, journal.rows)
    assert log.mended == 4
    journal.length = 6
    assert log.follow() == 2
    assert path.read_bytes() == b"".join(map(line_bytes, ROWS[:6]))
    assert log.follow() == 0
    journal.length = len(ROWS)
    log.follow()
    assert path.read_bytes() == WHOLE


def test_rows_that_were_just_stored_are_not_asked_for(tmp_path: Path) -> None:
    """Handed over they make the same file; where others come before them the source is asked for all."""
    path, journal = tmp_path / "audit.jsonl", Journal(3)
    asked: list[int] = []

    def rows(after: int) -> list[Row]:
        asked.append(after)
        return journal.rows(after)

    log = AuditLog(path, rows)
    asked.clear()
    assert log.follow(ROWS[3:4]) == 1
    assert asked == []
    journal.length = 6
    assert log.follow(ROWS[5:6]) == 2
    assert asked == [4]
    assert path.read_bytes() == b"".join(map(line_bytes, ROWS[:6]))


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "sound": lambda data: data,
    "empty": lambda _: b"",
    "short": lambda data: data[: data.index(b"\n", 900) + 1],
    "torn": lambda data: data[:-7],
    "without last newline": lambda data: data[:-1],
    "edited": lambda data: data.replace(b"st-mary", b"st-sham", 1),
    "line gone": lambda data: data[data.index(b"\n") + 1 :],
    "too long": lambda data: data + b'{"seq":11}\n',
    "garbage": lambda data: data[::-1],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_whatever_happened_to_the_file_the_journal_wins(tmp_path: Path, damage: str) -> None:
    """At opening the file becomes what the journal says, however it was damaged, and goes on behind that."""
    path = tmp_path / "audit.jsonl"
    path.write_bytes(DAMAGE[damage](b"".join(map(line_bytes, ROWS[:9]))))
    journal = Journal(9)
    log = AuditLog(path, journal.rows)
    assert (log.mended == 0) == (damage in {"sound", "too long"})
    journal.length = len(ROWS)
    log.follow()
    assert path.read_bytes() == WHOLE


def test_a_missing_file_is_written_anew(tmp_path: Path) -> None:
    """Losing the file loses nothing."""
    assert AuditLog(tmp_path / "audit.jsonl", Journal(len(ROWS)).rows).mended == len(ROWS)
    assert (tmp_path / "audit.jsonl").read_bytes() == WHOLE


def test_a_file_that_cannot_be_written_is_unavailable(tmp_path: Path) -> None:
    """The message names the file."""
    (tmp_path / "audit.jsonl").mkdir()
    with pytest.raises(UnavailableError, match=r"audit\.jsonl cannot be written"):
        AuditLog(tmp_path / "audit.jsonl", Journal(10).rows)


FULL_DISK = """
import resource, sys
from pathlib import Path
from shared.audit import GENESIS, AuditLog, linked
from shared.errors import UnavailableError
import msgpack
rows = []
for seq in range(1, 41):
    body = msgpack.packb({"v": 1, "t": "finished", "at": 1.0, "version": seq})
    rows.append(linked(rows[-1].hash if rows else GENESIS, seq, 1.0, "finished", body))
journal = rows[:2]
log = AuditLog(Path(sys.argv[1]), lambda after: journal[after:])
journal = rows
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
try:
    log.follow()
except UnavailableError as error:
    print(error)
print(Path(sys.argv[1]).stat().st_size)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(log.follow() < 38, AuditLog(Path(sys.argv[1]), lambda after: journal[after:]).mended)
"""


def test_a_full_disk_is_unavailable_and_passes(tmp_path: Path) -> None:
    """The error names the file; once there is room the rest is written and nothing needs mending."""
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / "audit.jsonl")],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.splitlines()[1:] == ["1000", "True 0"]
    assert "audit.jsonl cannot be written: File too large" in done.stdout
