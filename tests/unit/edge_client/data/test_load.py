"""The one door to notes on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edge_client.data import Note, Sentence, load_notes
from edge_client.tasks.ner import NerTask
from shared.errors import RefusedError, UnavailableError

LABELS = ("problem", "treatment", "test")


def row(name: str, label: str = "test") -> str:
    """A JSON line with one note of one token."""
    entities = [{"start": 0, "end": 1, "label": label}]
    return json.dumps({"id": name, "sentences": [{"tokens": ["x"], "entities": entities}]}) + "\n"


def test_folder_of_files(tmp_path: Path) -> None:
    """A folder may hold files of several formats; they are read in order of their names, others are left alone."""
    (tmp_path / "b.jsonl").write_text(row("b"))
    (tmp_path / "a.bio").write_text("x O\n")
    (tmp_path / "c.conll").write_text("x O\n")
    (tmp_path / "README.md").write_text("not notes")
    assert [note.id for note in load_notes(tmp_path, NerTask(LABELS)).notes] == ["a-1", "b", "c-1"]


@pytest.mark.parametrize("name", ["", "txt"])
def test_empty_folder(tmp_path: Path, name: str) -> None:
    """An empty folder is refused with all that was looked for."""
    (tmp_path / name).mkdir(exist_ok=True)
    with pytest.raises(RefusedError) as caught:
        load_notes(tmp_path, NerTask(LABELS))
    assert caught.value.message == f"{tmp_path} holds no notes"
    for kind in ("txt/NAME.txt", "concept/NAME.con", ".conll", ".bio", ".jsonl"):
        assert kind in caught.value.hint


def test_no_such_path(tmp_path: Path) -> None:
    """A path that is not there is said not to be there."""
    with pytest.raises(RefusedError, match="nowhere does not exist"):
        load_notes(tmp_path / "nowhere", NerTask(LABELS))


def test_skip_bad_leaves_out_whole_notes_and_counts_them(tmp_path: Path) -> None:
    """With skip_bad the good notes are kept and each bad one counts once, however much is wrong in it."""
    (tmp_path / "a.jsonl").write_text(row("a") + "{\n" + row("b", "drug") + row("c"))
    (tmp_path / "b.conll").write_text("x\ny\n-DOCSTART- O\nz O\n")
    found = load_notes(tmp_path, NerTask(LABELS), skip_bad=True)
    assert [note.id for note in found.notes] == ["a", "c", "b-2"]
    assert found.skipped == 3


def test_skip_bad_with_nothing_left(tmp_path: Path) -> None:
    """When each note is bad, the first reason is raised: training on nothing helps nobody."""
    (tmp_path / "a.jsonl").write_text("{\n")
    with pytest.raises(RefusedError, match=r"a\.jsonl, line 1"):
        load_notes(tmp_path, NerTask(LABELS), skip_bad=True)


def test_same_id_twice(tmp_path: Path) -> None:
    """Two notes with one id are refused, since they may be one note twice."""
    (tmp_path / "a.jsonl").write_text(row("a") + row("a"))
    with pytest.raises(RefusedError, match="two notes have the same id"):
        load_notes(tmp_path, NerTask(LABELS))


def test_unreadable_file(tmp_path: Path) -> None:
    """A file that cannot be opened is named, and skip_bad does not hide it: the disk is at fault, not the note."""
    for name in ("txt", "concept", "txt/a.txt"):
        (tmp_path / name).mkdir()
    (tmp_path / "concept/a.con").write_text("")
    with pytest.raises(UnavailableError, match=r"a\.txt cannot be read: Is a directory"):
        load_notes(tmp_path, NerTask(LABELS), skip_bad=True)


def test_representation_shows_no_text() -> None:
    """A note that ends in a log by mistake shows no word of its text."""
    note = Note("a", (Sentence(("Zyxwv", "took", "aspirin"), ()),))
    assert "Zyxwv" not in repr(note)
