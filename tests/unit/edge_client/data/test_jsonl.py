"""The JSON-lines reader."""

from __future__ import annotations

import json
import traceback
from pathlib import Path
from typing import Any

import pytest

from edge_client.data import Entity, load_notes
from edge_client.tasks.ner import NerTask
from shared.errors import RefusedError

LABELS = ("problem", "treatment", "test")
SECRET = "Zyxwv"
SENTENCE = {"tokens": [SECRET, "took", "aspirin"], "entities": [{"start": 2, "end": 3, "label": "treatment"}]}
GOOD = {"id": "a", "sentences": [SENTENCE]}


def write(folder: Path, *rows: object) -> Path:
    """A JSON-lines file; a row that is text is written as it is."""
    path = folder / "notes.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def changed(**entity: Any) -> dict[str, Any]:
    """A note whose one entity has other values."""
    return {"id": "a", "sentences": [{**SENTENCE, "entities": [{"start": 2, "end": 3, "label": "test", **entity}]}]}


def test_note_on_each_line(tmp_path: Path) -> None:
    """Each line that is not blank is a note with its own id."""
    notes = load_notes(write(tmp_path, GOOD, "", {**GOOD, "id": "b", "more": 1}), NerTask(LABELS)).notes
    assert [note.id for note in notes] == ["a", "b"]
    assert notes[0].sentences[0].tokens == (SECRET, "took", "aspirin")
    assert notes[0].sentences[0].entities == (Entity(2, 3, "treatment"),)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (f'{{"id": "{SECRET}', "not a note: the line is wrong (json_invalid)"),
        (f'"{SECRET}"', "not a note: the line is wrong (model_type)"),
        ({"id": SECRET}, "not a note: sentences is wrong (missing)"),
        ({"id": 7, "sentences": []}, "not a note: id is wrong (string_type)"),
        ({"id": "", "sentences": []}, "not a note: id is wrong (string_too_short)"),
        ({"id": "a", "sentences": [{"tokens": [SECRET]}]}, "not a note: sentences.0.entities is wrong (missing)"),
        (
            {"id": "a", "sentences": [{"tokens": [SECRET, 1], "entities": []}]},
            "not a note: sentences.0.tokens.1 is wrong (string_type)",
        ),
        (changed(start="2"), "not a note: sentences.0.entities.0.start is wrong (int_type)"),
        (changed(end=4), "does not lie inside its sentence of 3 tokens"),
        (changed(start=3), "does not lie inside"),
        (changed(start=-1), "does not lie inside"),
        (changed(label=SECRET), "label set (problem, treatment, test)"),
    ],
)
def test_bad_line(tmp_path: Path, row: object, problem: str) -> None:
    """A bad line is refused by file, line and field; not even the traceback holds its content."""
    with pytest.raises(RefusedError) as caught:
        load_notes(write(tmp_path, GOOD, row), NerTask(LABELS))
    assert problem in caught.value.message
    assert caught.value.message.startswith(f"{tmp_path / 'notes.jsonl'}, line 2:")
    assert SECRET not in "".join(traceback.format_exception(caught.value)).replace(str(tmp_path), "")
