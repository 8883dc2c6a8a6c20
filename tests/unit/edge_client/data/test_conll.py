"""The CoNLL column reader."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_client.data import Entity, load_notes
from edge_client.tasks.ner import NerTask
from shared.errors import RefusedError

LABELS = ("problem", "treatment", "test")
SECRET = "Zyxwv"


def write(folder: Path, text: str) -> Path:
    """A CoNLL file with this text."""
    path = folder / "notes.conll"
    path.write_bytes(text.encode())
    return path


def test_notes_sentences_and_entities(tmp_path: Path) -> None:
    """A blank line ends a sentence, -DOCSTART- ends a note, the first column is the token, the last the tag."""
    text = (
        "-DOCSTART- -X- O\n\nNo DT O\nchest NN B-problem\npain NN I-problem\n\nfever NN B-problem\n\n\n"
        "-DOCSTART- -X- O\nCBC\tNN\tB-test\r\n"
    )
    notes = load_notes(write(tmp_path, text), NerTask(LABELS)).notes
    assert [note.id for note in notes] == ["notes-1", "notes-2"]
    assert [sentence.tokens for sentence in notes[0].sentences] == [("No", "chest", "pain"), ("fever",)]
    assert notes[0].sentences[0].entities == (Entity(1, 3, "problem"),)
    assert notes[1].sentences[0].entities == (Entity(0, 1, "test"),)


@pytest.mark.parametrize(
    ("tags", "entities"),
    [
        ("B-test B-test", [(0, 1), (1, 2)]),
        ("B-test I-test O", [(0, 2)]),
        ("I-test I-test", [(0, 2)]),
        ("O I-test", [(1, 2)]),
        ("B-test O I-test", [(0, 1), (2, 3)]),
        ("B-problem I-test", [(0, 1), (1, 2)]),
    ],
)
def test_tag_runs(tmp_path: Path, tags: str, entities: list[tuple[int, int]]) -> None:
    """B always starts an entity; I continues one of its label and starts one otherwise."""
    path = write(tmp_path, "".join(f"w {tag}\n" for tag in tags.split()))
    (sentence,) = load_notes(path, NerTask(LABELS)).notes[0].sentences
    assert [(entity.start, entity.end) for entity in sentence.entities] == entities


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (SECRET, "not a token followed by a tag"),
        ("O", "not a token followed by a tag"),
        (f"{SECRET} S-problem", "not a token followed by a tag"),
        (f"aspirin {SECRET}", "not a token followed by a tag"),
        (f"aspirin B-{SECRET}", "label set (problem, treatment, test)"),
    ],
)
def test_bad_line(tmp_path: Path, line: str, problem: str) -> None:
    """A bad line is refused by file and number, without its content."""
    with pytest.raises(RefusedError) as caught:
        load_notes(write(tmp_path, f"-DOCSTART- O\n\nfine O\n{line}\n"), NerTask(LABELS))
    assert problem in caught.value.message
    assert caught.value.message.startswith(f"{tmp_path / 'notes.conll'}, line 4:")
    assert SECRET not in str(caught.value).replace(str(tmp_path), "")
