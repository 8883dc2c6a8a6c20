"""Reader of MIMIC-III as distributed: discharge summaries of NOTEEVENTS.csv, codes of DIAGNOSES_ICD.csv.

Either file may be gzipped (`.csv.gz`). A note is a hospital stay (HADM_ID): its discharge summaries and, after them,
their addenda, in the order of the file (as Mullenbach et al., arXiv 1802.05695, put them together), with those of its
ICD-9 codes that are in the label set. A stay with none of them is left out, as in that paper's setting of the 50 most
frequent codes. Johnson et al. (2016), "MIMIC-III, a freely accessible critical care database", Scientific Data 3.

NOTEEVENTS has two million rows and four gigabytes. It is read as a stream: only the text of the stays that are wanted
is kept, 0.6 GB for all of them.
"""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from edge_client.data.checks import Where
from edge_client.data.notes import TextNote
from shared.errors import RefusedError, UnavailableError

NOTES, CODES = "NOTEEVENTS.csv", "DIAGNOSES_ICD.csv"
SUMMARY = "discharge summary"
MAX_FIELD = 1 << 20
"""Characters of one field. The longest note has some 60,000; a quote that is never closed stops here."""


@dataclass(frozen=True, slots=True)
class Code:
    """One row of DIAGNOSES_ICD; the priority counts from 1, the primary diagnosis."""

    stay: str
    priority: int
    code: str


@dataclass(slots=True)
class _Stay:
    """A stay while its notes are gathered; each part comes with False for a report and True for an addendum."""

    patient: str
    parts: list[tuple[bool, str]] = field(default_factory=list)


def is_mimic(path: Path) -> bool:
    """Tell whether `path` is a folder with the notes of MIMIC-III in it."""
    return any((path / name).is_file() for name in (NOTES, f"{NOTES}.gz"))


def read_mimic(folder: Path, labels: Sequence[str], *, primary: bool) -> Iterator[TextNote | RefusedError]:
    """Yield each stay that has a discharge summary and a code in `labels`, and each row that is refused.

    `labels` are ICD-9 codes as the file writes them, without a dot. With `primary` a stay has its primary diagnosis
    alone, and is left out when that is not in `labels`. Raises RefusedError for a file that is missing, has other
    columns, ends too early or is no CSV from some line on; none of that can be skipped over.
    """
    wanted, stays = set(labels), dict[str, _Stay]()
    codes: dict[str, list[str]] = {}
    for row in read_codes(folder):
        if isinstance(row, RefusedError):
            yield row
        elif row.code in wanted and (row.priority == 1 or not primary):
            codes.setdefault(row.stay, []).append(row.code)
    for where, columns in _table(_existing(folder, NOTES), _NOTE_COLUMNS):
        refusal = _gather(columns, stays, codes, where) if isinstance(columns, Mapping) else columns
        if refusal is not None:
            yield refusal
    for stay, gathered in stays.items():
        text = "\n".join(text for _, text in sorted(gathered.parts, key=lambda part: part[0]))
        yield TextNote(stay, gathered.patient, text, tuple(dict.fromkeys(codes[stay])))


def read_codes(folder: Path) -> Iterator[Code | RefusedError]:
    """Yield the rows of DIAGNOSES_ICD, or why one is refused; the few that name neither priority nor code are no codes.

    Raises as `read_mimic`.
    """
    for where, columns in _table(_existing(folder, CODES), ("HADM_ID", "SEQ_NUM", "ICD9_CODE")):
        if isinstance(columns, RefusedError):
            yield columns
            continue
        stay, priority, code = (columns[name] for name in ("HADM_ID", "SEQ_NUM", "ICD9_CODE"))
        if not priority and not code:
            continue
        if stay.isdecimal() and priority.isdecimal() and code.isascii() and code.isalnum():
            yield Code(stay, int(priority), code)
        else:
            yield where.refuse(
                "not a coded diagnosis", hint="expected numbers in HADM_ID and SEQ_NUM and an ICD-9 code"
            )


def top_codes(folder: Path, count: int) -> list[tuple[str, int]]:
    """Return the `count` codes that most stays have, with the number of stays; of equals the smaller code first.

    Raises RefusedError for the first row that is refused, and as `read_mimic`.
    """
    pairs = set()
    for row in read_codes(folder):
        if isinstance(row, RefusedError):
            raise row
        pairs.add((row.stay, row.code))
    counted = Counter(code for _, code in pairs)
    return sorted(counted.items(), key=lambda item: (-item[1], item[0]))[:count]


_NOTE_COLUMNS = ("SUBJECT_ID", "HADM_ID", "CATEGORY", "DESCRIPTION", "ISERROR", "TEXT")


def _gather(
    row: Mapping[str, str], stays: dict[str, _Stay], codes: Mapping[str, object], where: Where
) -> RefusedError | None:
    """Add a row of NOTEEVENTS to its stay if it is wanted, or say why it is refused."""
    if row["CATEGORY"].strip().lower() != SUMMARY or row["ISERROR"].strip() == "1":
        return None
    patient, stay = row["SUBJECT_ID"], row["HADM_ID"]
    if not (patient.isdecimal() and stay.isdecimal()):
        return where.refuse(
            "a discharge summary of no stay", hint="expected numbers in SUBJECT_ID and HADM_ID of a discharge summary"
        )
    if not row["TEXT"].strip():
        return where.refuse("a discharge summary without text", hint="is the copy complete?")
    if stay in codes:
        addendum = row["DESCRIPTION"].strip().lower() == "addendum"
        stays.setdefault(stay, _Stay(patient)).parts.append((addendum, row["TEXT"]))
    return None


def _existing(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise RefusedError(
        f"{folder / name} is missing",
        rule="note-missing",
        hint=f"{NOTES} and {CODES} of MIMIC-III lie in one folder, gzipped or not",
    )


def _table(path: Path, needed: Sequence[str]) -> Iterator[tuple[Where, Mapping[str, str] | RefusedError]]:
    """The needed columns of each row, with the line that the row begins in, or why the row is refused."""
    try:
        with (
            gzip.open(path) if path.suffix == ".gz" else path.open("rb") as raw,
            io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline="") as text,
        ):
            yield from _rows(text, path, needed)
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise RefusedError(
            f"{path} is no whole gzip file", rule="note-format", hint="copy the file again and compare checksums"
        ) from None
    except OSError as error:
        raise UnavailableError(
            f"{path} cannot be read: {error.strerror}",
            hint="give the account that runs the site the right to read its notes",
        ) from error


def _rows(text: IO[str], path: Path, needed: Sequence[str]) -> Iterator[tuple[Where, Mapping[str, str] | RefusedError]]:
    csv.field_size_limit(MAX_FIELD)
    rows, line = csv.reader(text, strict=True), 1
    try:
        names = [name.strip().upper() for name in next(rows, [])]
        missing = [name for name in needed if name not in names]
        if missing:
            raise Where(path, 1).refuse(f"no column {missing[0]}", hint="keep the first line, which names the columns")
        places = {name: names.index(name) for name in needed}
        line = rows.line_num + 1
        for row in rows:
            where = Where(path, line)
            line = rows.line_num + 1
            if len(row) == len(names):
                yield where, {name: _decoded(row[place]) for name, place in places.items()}
            elif row:
                hint = "is the copy complete?"
                yield where, where.refuse(f"a row of {len(row)} columns, not {len(names)}", hint=hint)
    except csv.Error:
        raise Where(path, line).refuse(
            "no CSV from here on: a quote is not closed, or closed too early", hint="copy the file again"
        ) from None


def _decoded(text: str) -> str:
    """The text, taken as Latin-1 where it is not UTF-8, with one kind of line end."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        text = text.encode("utf-8", "surrogateescape").decode("latin-1")
    return text.replace("\r\n", "\n")
