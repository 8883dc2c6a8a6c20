"""The i2b2/VA 2010 reader, on files written as the challenge distributed them."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_client.data import Entity, Note, load_notes
from edge_client.tasks.ner import NerTask
from shared.errors import RefusedError

LABELS = ("problem", "treatment", "test")
# A word that stands in no message unless the reader quotes the note.
SECRET = "Zyxwv"
TEXT = f"Admission Date :\r\n{SECRET}  was given   aspirin 81 mg\r\n\r\nfor his chest\tpain .\r\n"


def write(folder: Path, concepts: str | None, text: str | bytes = TEXT) -> Path:
    """A folder in the layout, with one note named `a`; no `.con` file if `concepts` is None."""
    for name in ("txt", "concept"):
        (folder / name).mkdir()
    raw = text if isinstance(text, bytes) else text.encode()
    (folder / "txt" / "a.txt").write_bytes(raw)
    if concepts is not None:
        (folder / "concept" / "a.con").write_bytes(concepts.encode())
    return folder


def read_one(folder: Path) -> Note:
    """The only note of the folder."""
    (note,) = load_notes(folder, NerTask(LABELS)).notes
    return note


def refusal(folder: Path) -> str:
    """The message of the error that the folder's note raises, checked to hold nothing of the note."""
    with pytest.raises(RefusedError) as caught:
        load_notes(folder, NerTask(LABELS))
    assert SECRET not in str(caught.value).replace(str(folder), "")
    assert caught.value.exit_code == 3
    return str(caught.value)


def test_line_ends_and_repeated_blanks(tmp_path: Path) -> None:
    """CRLF, tabs and repeated blanks do not move an offset, and blank lines still count as lines."""
    note = read_one(
        write(tmp_path, 'c="aspirin" 2:3 2:3||t="treatment"\r\nc="his chest pain" 4:1 4:3||t="problem"\r\n')
    )
    assert [sentence.tokens for sentence in note.sentences] == [
        ("Admission", "Date", ":"),
        (SECRET, "was", "given", "aspirin", "81", "mg"),
        ("for", "his", "chest", "pain", "."),
    ]
    assert [sentence.entities for sentence in note.sentences] == [
        (),
        (Entity(3, 4, "treatment"),),
        (Entity(1, 4, "problem"),),
    ]


def test_concepts_in_any_order(tmp_path: Path) -> None:
    """Entities come sorted by their start, whatever the order of the lines that mark them."""
    note = read_one(write(tmp_path, 'c="mg" 2:5 2:5||t="test"\nc="aspirin" 2:3 2:3||t="treatment"\n\n'))
    assert [entity.start for entity in note.sentences[1].entities] == [3, 5]


def test_words_with_quotes_and_bars(tmp_path: Path) -> None:
    """The words of a concept may hold the marks that separate its fields."""
    text = 'a "bad||t cold today\n'
    note = read_one(write(tmp_path, 'c=""bad||t cold" 1:1 1:2||t="problem"\n', text))
    assert note.sentences[0].entities == (Entity(1, 3, "problem"),)


def test_letter_case_of_words_is_free(tmp_path: Path) -> None:
    """The distribution gives a concept's words in lower case; the text keeps its own."""
    note = read_one(write(tmp_path, 'c="mri of brain" 1:0 1:2||t="test"\n', "MRI of  Brain\n"))
    assert note.sentences[0].entities == (Entity(0, 3, "test"),)


def test_byte_order_mark(tmp_path: Path) -> None:
    """A UTF-8 byte order mark is no part of the first word."""
    note = read_one(write(tmp_path, 'c="fever" 1:0 1:0||t="problem"\n', b"\xef\xbb\xbfFever .\n"))
    assert note.sentences[0].tokens == ("Fever", ".")


def test_latin_1(tmp_path: Path) -> None:
    """A file that is not UTF-8 is read as Latin-1, and its no-break space does not split a word."""
    note = read_one(write(tmp_path, "", "caf\u00e9 38\u00a0C\n".encode("latin-1")))
    assert note.sentences[0].tokens == ("caf\u00e9", "38\u00a0C")


def test_empty_concept_file(tmp_path: Path) -> None:
    """A note may have no entities."""
    assert all(sentence.entities == () for sentence in read_one(write(tmp_path, "")).sentences)


@pytest.mark.parametrize(
    ("concept", "problem"),
    [
        (f"{SECRET} aspirin", "not a concept line"),
        ('c="aspirin" 2:3||t="treatment"', "not a concept line"),
        (f'c="aspirin" 2:3 2:3||t="{SECRET}"', "label set (problem, treatment, test)"),
        (f'c="{SECRET}" 2:0 4:1||t="problem"', "runs over the end of a line"),
        (f'c="{SECRET}" 9:0 9:0||t="problem"', "offsets lie outside the text"),
        (f'c="{SECRET}" 0:0 0:0||t="problem"', "offsets lie outside the text"),
        (f'c="{SECRET}" 2:0 2:6||t="problem"', "offsets lie outside the text"),
        (f'c="{SECRET}" 2:3 2:2||t="problem"', "offsets lie outside the text"),
        (f'c="{SECRET}" 2:1 2:1||t="problem"', "the words given are not those at the offsets"),
        ('c="was given" 2:1 2:2||t="problem"', "overlaps another one"),
    ],
)
def test_bad_concept_line(tmp_path: Path, concept: str, problem: str) -> None:
    """A bad line is refused with the file, the line and the rule, and without a word of the note."""
    message = refusal(write(tmp_path, f'c="given aspirin" 2:2 2:3||t="treatment"\n{concept}\n'))
    assert problem in message
    assert "a.con, line " in message


def test_bad_line_is_the_one_named(tmp_path: Path) -> None:
    """The line in the message counts from 1 and is the line at fault."""
    assert f"{tmp_path / 'concept' / 'a.con'}, line 2:" in refusal(
        write(tmp_path, 'c="aspirin" 2:3 2:3||t="treatment"\nnonsense\n')
    )


@pytest.mark.parametrize(("kept", "missing"), [("txt/b.txt", "concept/b.con"), ("concept/b.con", "txt/b.txt")])
def test_missing_partner(tmp_path: Path, kept: str, missing: str) -> None:
    """A text without its concepts, or concepts without their text, are refused by the missing file's name."""
    folder = write(tmp_path, "")
    (folder / kept).write_text("")
    assert f"{folder / missing} is missing" in refusal(folder)
