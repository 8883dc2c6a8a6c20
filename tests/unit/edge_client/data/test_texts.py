from __future__ import annotations

import json
from pathlib import Path

import pytest

from edge_client.data import TextNote, load_notes
from edge_client.tasks.classification import ClassificationTask
from edge_client.tasks.multilabel import MultiLabelTask
from shared.errors import RefusedError

ONE, ANY = ClassificationTask(("mild", "severe")), MultiLabelTask(("mild", "severe"))
SECRET = "Mrs. Example"


def write(folder: Path, *rows: object) -> Path:
    """A JSON lines file; a string goes into it as it is."""
    path = folder / "notes.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_one_label_and_any_number_of_them(tmp_path: Path) -> None:
    """Each task reads its own key; labels given twice count once, and a note is its own patient unless it says more."""
    one = write(tmp_path, {"id": "a", "text": "x\ny", "label": "mild"}, "", {"id": "b", "text": "z", "label": "severe"})
    assert load_notes(one, ONE).notes == (TextNote("a", "a", "x\ny", ("mild",)), TextNote("b", "b", "z", ("severe",)))
    rows = (
        {"id": "a", "text": "x", "labels": ["severe", "mild", "severe"], "patient": "p", "more": 1},
        {"id": "b", "text": "y", "labels": [], "patient": "p"},
    )
    found = load_notes(write(tmp_path, *rows), ANY)
    assert found.notes == (TextNote("a", "p", "x", ("severe", "mild")), TextNote("b", "p", "y", ()))


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (f'{{"id": "{SECRET}"', "the line is wrong"),
        ({"id": "b", "text": SECRET}, "labels is wrong"),
        ({"id": "b", "text": " \n", "labels": []}, "text is wrong"),
        ({"id": "b", "text": SECRET, "labels": "mild"}, "labels is wrong"),
        ({"id": "b", "text": SECRET, "labels": [1]}, "labels.0 is wrong"),
        ({"id": "b", "text": "x", "labels": [SECRET]}, r"not one of the label set \(mild, severe\)"),
    ],
    ids=str,
)
def test_a_bad_line_is_named_and_never_quoted(tmp_path: Path, row: object, says: str) -> None:
    """File, line and key are told; with skip_bad the line is left out and counted."""
    path = write(tmp_path, {"id": "a", "text": "x", "labels": []}, row)
    with pytest.raises(RefusedError, match=rf"notes.jsonl, line 2: .*{says}") as caught:
        load_notes(path, ANY)
    assert "Example" not in str(caught.value)
    assert caught.value.__context__ is None
    assert load_notes(path, ANY, skip_bad=True).skipped == 1


def test_a_note_shows_its_shape_and_not_its_text() -> None:
    """What lands in a log by mistake holds neither words nor whose note it is."""
    shown = repr(TextNote("n1", "patient-7", SECRET, ("mild",)))
    assert "Example" not in shown
    assert "patient-7" not in shown


def test_a_place_without_notes_says_what_was_looked_for(tmp_path: Path) -> None:
    """The hint names the formats of the task at hand, not those of another."""
    with pytest.raises(RefusedError, match="holds no notes") as caught:
        load_notes(tmp_path, ANY)
    assert "NOTEEVENTS.csv" in caught.value.hint
    assert "concept" not in caught.value.hint
