"""Notes that nobody has annotated."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_client.data import TextNote, read_plain
from shared.errors import RefusedError


def ids(path: Path) -> list[str]:
    """The notes' ids in order; none is refused."""
    notes = list(read_plain(path))
    assert all(isinstance(note, TextNote) for note in notes)
    return [note.id for note in notes if isinstance(note, TextNote)]


def test_text_files_and_json_lines_are_read(tmp_path: Path) -> None:
    """A file or a folder; a text file is a note under its name, a JSON line one under its id; other files are left."""
    (tmp_path / "b.txt").write_text("no fever\r\nfebrile\n")
    (tmp_path / "a.jsonl").write_text('{"id": "x", "text": "", "labels": ["fever"]}\n\n{"id": "y", "text": "z"}\n')
    (tmp_path / "c.csv").write_text("1,2")
    assert ids(tmp_path) == ["x", "y", "b"]
    assert ids(tmp_path / "b.txt") == ["b"]
    (note,) = read_plain(tmp_path / "b.txt")
    assert isinstance(note, TextNote)
    assert (note.text, note.labels, "fever" in repr(note)) == ("no fever\nfebrile", (), False)


def test_the_text_of_a_marked_corpus_is_read(tmp_path: Path) -> None:
    """A folder in the layout of i2b2 2010 has its notes in txt/."""
    (tmp_path / "txt").mkdir()
    (tmp_path / "txt" / "n1.txt").write_text("a")
    assert ids(tmp_path) == ["n1"]


def test_a_bad_line_is_named_and_never_quoted(tmp_path: Path) -> None:
    """By file and line, with what was expected; the notes beside it are read."""
    (tmp_path / "a.jsonl").write_text('{"id": "x", "text": "t"}\n{"id": "SECRET", "txt": "WORDS"}\nSECRET\n')
    first, second, third = read_plain(tmp_path)
    assert isinstance(first, TextNote)
    for number, refused in ((2, second), (3, third)):
        assert isinstance(refused, RefusedError)
        assert f"a.jsonl, line {number}: not a note" in refused.message
        assert not {"SECRET", "WORDS"} & set(f"{refused.message} {refused.hint}".replace('"', " ").split())


def test_a_place_without_notes_is_named(tmp_path: Path) -> None:
    """Whether it is empty or not there, the error says what was looked for."""
    for path, says in ((tmp_path, "holds no notes"), (tmp_path / "no", "does not exist")):
        with pytest.raises(RefusedError, match=says) as caught:
            list(read_plain(path))
        assert ".jsonl" in caught.value.hint
