from __future__ import annotations

import csv
import gzip
import io
from pathlib import Path
from typing import Any

import pytest

from edge_client.data import TextNote, load_notes
from edge_client.data.mimic import top_codes
from edge_client.tasks.classification import ClassificationTask
from edge_client.tasks.multilabel import MultiLabelTask
from shared.errors import RefusedError

LABELS = ("4019", "4280", "V4581")
NOTE_COLUMNS = (
    *("ROW_ID", "SUBJECT_ID", "HADM_ID", "CHARTDATE", "CHARTTIME", "STORETIME"),
    *("CATEGORY", "DESCRIPTION", "CGID", "ISERROR", "TEXT"),
)
SECRET = "Mrs. Example, 4 Elm Street"


def note(stay: object, text: str, **changes: object) -> dict[str, object]:
    """A row of NOTEEVENTS, a discharge summary unless `changes` say otherwise; the patient is the stay's last digit."""
    row: dict[str, object] = dict.fromkeys(NOTE_COLUMNS, "")
    said = {"SUBJECT_ID": str(stay)[-1:], "HADM_ID": stay, "CATEGORY": "Discharge summary", "DESCRIPTION": "Report"}
    return {**row, **said, "TEXT": text, **changes}


def table(columns: tuple[str, ...], rows: list[dict[str, object]]) -> bytes:
    """The bytes of a CSV file with every text quoted, as MIMIC has them."""
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, columns, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def codes(*rows: tuple[object, object, str]) -> list[dict[str, object]]:
    """Rows of DIAGNOSES_ICD: stay, priority, code."""
    return [
        {"ROW_ID": n, "SUBJECT_ID": 1, "HADM_ID": stay, "SEQ_NUM": priority, "ICD9_CODE": code}
        for n, (stay, priority, code) in enumerate(rows, start=1)
    ]


CODE_COLUMNS = ("ROW_ID", "SUBJECT_ID", "HADM_ID", "SEQ_NUM", "ICD9_CODE")
CODES = codes((11, 1, "4280"), (11, 2, "4019"), (11, 3, "9999"), (12, 1, "9999"), (13, 1, "9999"), (13, 2, "V4581"))
NOTES = [
    note(11, "second part", DESCRIPTION="Addendum"),
    note(11, 'First line, with "quotes"\nsecond line'),
    note(12, "no code of the set"),
    note(11, "a nurse writes", CATEGORY="Nursing"),
    note("", "of no stay", CATEGORY="Radiology"),
    note(13, "struck out", ISERROR="1"),
    note(13, "kept"),
]


def write(
    folder: Path,
    notes: list[dict[str, object]] = NOTES,
    diagnoses: list[dict[str, object]] = CODES,
    *,
    zipped: bool = False,
) -> Path:
    """A folder in the layout of MIMIC-III."""
    for name, columns, rows in (("NOTEEVENTS", NOTE_COLUMNS, notes), ("DIAGNOSES_ICD", CODE_COLUMNS, diagnoses)):
        raw = table(columns, rows)
        if zipped:
            (folder / f"{name}.csv.gz").write_bytes(gzip.compress(raw))
        else:
            (folder / f"{name}.csv").write_bytes(raw)
    return folder


@pytest.mark.parametrize("zipped", [False, True])
def test_a_stay_is_its_summary_then_its_addenda_with_its_codes(tmp_path: Path, zipped: bool) -> None:
    """Other notes, struck out ones and stays without a code of the set are left out; plain and gzipped alike."""
    found = load_notes(write(tmp_path, zipped=zipped), MultiLabelTask(LABELS))
    assert found.notes == (
        TextNote("11", "1", 'First line, with "quotes"\nsecond line\nsecond part', ("4280", "4019")),
        TextNote("13", "3", "kept", ("V4581",)),
    )
    assert found.skipped == 0


def test_one_label_is_the_primary_diagnosis(tmp_path: Path) -> None:
    """A stay whose first code is not in the set is left out, whatever its others."""
    found = load_notes(write(tmp_path), ClassificationTask(LABELS))
    assert [(stay.id, stay.labels) for stay in found.notes] == [("11", ("4280",))]


def test_rows_without_priority_and_code_are_no_codes(tmp_path: Path) -> None:
    """MIMIC-III has a few of them; they are neither codes nor errors."""
    found = load_notes(write(tmp_path, diagnoses=[*CODES, *codes((11, "", ""))]), MultiLabelTask(LABELS))
    assert len(found.notes) == 2


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"notes": [*NOTES, note("", SECRET)]}, "NOTEEVENTS.csv, line 10: a discharge summary of no stay"),
        ({"notes": [*NOTES, note("x", SECRET)]}, "NOTEEVENTS.csv, line 10: a discharge summary of no stay"),
        ({"notes": [*NOTES, note(11, " \n ")]}, "NOTEEVENTS.csv, line 10: a discharge summary without text"),
        ({"diagnoses": [*CODES, *codes((SECRET, 1, "4019"))]}, "DIAGNOSES_ICD.csv, line 8: not a coded diagnosis"),
        ({"diagnoses": [*CODES, *codes((11, SECRET, "4019"))]}, "DIAGNOSES_ICD.csv, line 8: not a coded diagnosis"),
        ({"diagnoses": [*CODES, *codes((11, 1, SECRET))]}, "DIAGNOSES_ICD.csv, line 8: not a coded diagnosis"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line_or_left_out(tmp_path: Path, bad: dict[str, Any], says: str) -> None:
    """The line counted is that of the file, line breaks inside notes included; no word of the row is told."""
    folder = write(tmp_path, **bad)
    with pytest.raises(RefusedError, match=says) as caught:
        load_notes(folder, MultiLabelTask(LABELS))
    assert "Example" not in str(caught.value)
    found = load_notes(folder, MultiLabelTask(LABELS), skip_bad=True)
    assert (len(found.notes), found.skipped) == (2, 1)


def test_a_row_of_too_few_columns_is_a_bad_row(tmp_path: Path) -> None:
    """A cut row is refused and what follows is read."""
    folder = write(tmp_path)
    with (folder / "DIAGNOSES_ICD.csv").open("a") as file:
        file.write('9,1,11\n10,1,13,3,"4019"\n')
    with pytest.raises(RefusedError, match=r"DIAGNOSES_ICD\.csv, line 8: a row of 3 columns, not 5"):
        load_notes(folder, MultiLabelTask(LABELS))
    found = load_notes(folder, MultiLabelTask(LABELS), skip_bad=True)
    assert found.notes[1].labels == ("V4581", "4019")


def test_a_quote_that_is_never_closed_cannot_be_skipped(tmp_path: Path) -> None:
    """Nobody knows where the next row begins, so that leaving out a row would leave out all that follow unseen."""
    folder = write(tmp_path)
    with (folder / "NOTEEVENTS.csv").open("a") as file:
        file.write(f'9,1,11,,,,"Discharge summary","Report",,,"{SECRET}\n')
    with pytest.raises(RefusedError, match=r"NOTEEVENTS\.csv, line 10: no CSV from here on") as caught:
        load_notes(folder, MultiLabelTask(LABELS), skip_bad=True)
    assert "Example" not in str(caught.value)


def test_a_gzip_file_that_was_cut_short_cannot_be_skipped(tmp_path: Path) -> None:
    """Half of a download is refused by its name, not taken for all of it."""
    folder = write(tmp_path, [note(11, "text " * 10_000)], zipped=True)
    path = folder / "NOTEEVENTS.csv.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(RefusedError, match=r"NOTEEVENTS\.csv\.gz is no whole gzip file"):
        load_notes(folder, MultiLabelTask(LABELS), skip_bad=True)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    """Without the codes, and with other columns, the error names the file and the column."""
    folder = write(tmp_path)
    (folder / "DIAGNOSES_ICD.csv").unlink()
    with pytest.raises(RefusedError, match=r"DIAGNOSES_ICD\.csv is missing"):
        load_notes(folder, MultiLabelTask(LABELS))
    (folder / "DIAGNOSES_ICD.csv").write_text("a,b\n1,2\n")
    with pytest.raises(RefusedError, match=r"DIAGNOSES_ICD\.csv, line 1: no column HADM_ID"):
        load_notes(folder, MultiLabelTask(LABELS))


def test_bytes_that_are_not_utf_8_are_latin_1(tmp_path: Path) -> None:
    """One note in an old encoding spoils neither itself nor the others."""
    folder = write(tmp_path)
    path = folder / "NOTEEVENTS.csv"
    path.write_bytes(path.read_bytes().replace(b"kept", b"38\xb0C").replace(b"second line", "37°C".encode()))
    texts = [stay.text for stay in load_notes(folder, MultiLabelTask(LABELS)).notes]
    assert "37°C" in texts[0]
    assert texts[1] == "38°C"


def test_the_most_frequent_codes(tmp_path: Path) -> None:
    """A code counts once a stay; equals come in the order of their digits."""
    twice = codes((14, 1, "4019"), (14, 2, "4019"), (15, 1, "4280"))
    assert top_codes(write(tmp_path, diagnoses=[*CODES, *twice]), 3) == [("9999", 3), ("4019", 2), ("4280", 2)]
