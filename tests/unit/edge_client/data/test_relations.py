"""What the i2b2/VA 2010 layout says of entities, on files written as the challenge distributed them."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_client.data import Entity, HeadedNote, load_notes, read_heads
from edge_client.tasks.relations import RelationsTask
from shared.errors import RefusedError

TASK = RelationsTask(("TrAP", "PIP", "present", "absent"))
# A word that stands in no message unless the reader quotes the note.
SECRET = "Zyxwv"
TEXT = f"Plan :\n\n{SECRET} had  aspirin for his\tchest pain and nausea .\nno fever\n"
ASPIRIN, PAIN, NAUSEA, FEVER = (
    'c="aspirin" 3:2 3:2',
    'c="his chest pain" 3:4 3:6',
    'c="nausea" 3:8 3:8',
    'c="fever" 4:1 4:1',
)
CONCEPTS = f'{NAUSEA}||t="problem"\n{PAIN}||t="problem"\n{ASPIRIN}||t="anything at all"\n{FEVER}||t="problem"\n'


def write(folder: Path, *, rel: str | None = None, ast: str | None = None) -> Path:
    """A folder in the layout with one note named `a`; without the folders whose file is None."""
    files = {"txt": TEXT, "concept": CONCEPTS, "rel": rel, "ast": ast}
    for part, ending in (("txt", "txt"), ("concept", "con"), ("rel", "rel"), ("ast", "ast")):
        if (held := files[part]) is not None:
            (folder / part).mkdir()
            (folder / part / f"a.{ending}").write_text(held)
    return folder


def told(note: HeadedNote) -> list[tuple[int, Entity, tuple[Entity, ...]]]:
    """Line, head, and what is said of it."""
    return [(headed.line, headed.head, headed.sentence.entities) for headed in note.heads]


def refusal(folder: Path) -> str:
    """The message of the error that the folder's note raises, checked to hold nothing of the note."""
    with pytest.raises(RefusedError) as caught:
        load_notes(folder, TASK)
    said = f"{caught.value} {caught.value.hint}".replace(str(folder), "")
    assert not any(word in said for word in (SECRET, "aspirin", "nausea", "fever"))
    return str(caught.value)


def test_each_entity_is_a_head(tmp_path: Path) -> None:
    """In reading order; a relation is told of its first entity, a modifier of its own, and whole lines are kept."""
    rel = f'{PAIN}||r="PIP"||{NAUSEA}\n{ASPIRIN}||r="TrAP"||{NAUSEA}\r\n\n{ASPIRIN}||r="TrAP"||{PAIN}\n'
    ast = f'{PAIN}||t="problem"||a="present"\n{FEVER}||t="problem"||a="absent"\n'
    (note,) = load_notes(write(tmp_path, rel=rel, ast=ast), TASK).notes
    aspirin, pain, nausea, fever = (
        Entity(2, 3, "anything at all"),
        Entity(4, 7, "problem"),
        Entity(8, 9, "problem"),
        Entity(1, 2, "problem"),
    )
    assert told(note) == [
        (3, aspirin, (Entity(4, 7, "TrAP"), Entity(8, 9, "TrAP"))),
        (3, pain, (Entity(4, 7, "present"), Entity(8, 9, "PIP"))),
        (3, nausea, ()),
        (4, fever, (Entity(1, 2, "absent"),)),
    ]
    assert {headed.sentence.tokens for headed in note.heads} == {
        (SECRET, "had", "aspirin", "for", "his", "chest", "pain", "and", "nausea", "."),
        ("no", "fever"),
    }
    assert (note.id, note.patient, SECRET in repr(note)) == ("a", "a", False)


def test_one_of_the_two_folders_is_enough(tmp_path: Path) -> None:
    """Relations alone, or modifiers alone; what says the same again counts once."""
    for name, files in (
        ("r", {"rel": f'{ASPIRIN}||r="TrAP"||{PAIN}\n' * 2}),
        ("a", {"ast": f'{PAIN}||t="x"||a="absent"\n' * 2}),
    ):
        (tmp_path / name).mkdir()
        (note,) = load_notes(write(tmp_path / name, **files), TASK).notes
        assert [len(said) for _, _, said in told(note)] == ([1, 0, 0, 0] if name == "r" else [0, 1, 0, 0])


def test_words_with_quotes_and_bars(tmp_path: Path) -> None:
    """The words of both entities may hold the marks that separate the fields."""
    write(tmp_path, rel='c="a"||r="b" 1:0 1:0||r="PIP"||c="c" 1:1" 1:1 1:2\n')
    (tmp_path / "txt" / "a.txt").write_text('a"||r="b c" 1:1\n')
    (tmp_path / "concept" / "a.con").write_text('c="a"||r="b" 1:0 1:0||t="x"\nc="c" 1:1" 1:1 1:2||t="x"\n')
    (note,) = load_notes(tmp_path, TASK).notes
    assert told(note)[0] == (1, Entity(0, 1, "x"), (Entity(1, 3, "PIP"),))


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (f"{SECRET} aspirin", "not a relation line"),
        (f'{ASPIRIN}||r="TrAP"', "not a relation line"),
        (f'{PAIN}||t="problem"||a="present"', "not a relation line"),
        (f'{ASPIRIN}||r="{SECRET}"||{PAIN}', "label set (TrAP, PIP, present, absent)"),
        (f'{ASPIRIN}||r="TrAP"||{FEVER}', "a relation runs over the end of a line"),
        (f'{ASPIRIN}||r="TrAP"||c="{SECRET}" 3:4 4:0', "an entity runs over the end of a line"),
        (f'{ASPIRIN}||r="TrAP"||c="{SECRET}" 9:0 9:0', "the offsets lie outside the text"),
        (f'{ASPIRIN}||r="TrAP"||c="{SECRET}" 3:8 3:8', "the words given are not those at the offsets"),
        (f'c="{SECRET}" 3:2 3:2||r="TrAP"||{PAIN}', "the words given are not those at the offsets"),
        (f'{ASPIRIN}||r="TrAP"||c="chest pain" 3:5 3:6', "an entity that the .con file does not mark"),
        (f'c="{SECRET}" 3:0 3:0||r="TrAP"||{PAIN}', "an entity that the .con file does not mark"),
        (f'{PAIN}||r="PIP"||{PAIN}', "an entity in a relation to itself"),
        (f'{PAIN}||r="TrAP"||{NAUSEA}', "another label for what has one already"),
    ],
)
def test_bad_relation_line(tmp_path: Path, line: str, problem: str) -> None:
    """A bad line is refused with the file, the line and the rule, and without a word of the note."""
    message = refusal(write(tmp_path, rel=f'{PAIN}||r="PIP"||{NAUSEA}\n{line}\n'))
    assert problem in message
    assert f"{tmp_path / 'rel' / 'a.rel'}, line 2:" in message


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (f'{PAIN}||a="absent"', "not an assertion line"),
        (f'{PAIN}||t="problem"||a="{SECRET}"', "label set (TrAP, PIP, present, absent)"),
        (f'c="{SECRET}" 3:4 3:6||t="problem"||a="absent"', "the words given are not those at the offsets"),
        ('c="pain" 3:6 3:6||t="problem"||a="absent"', "an entity that the .con file does not mark"),
        (f'{PAIN}||t="problem"||a="absent"', "another label for what has one already"),
    ],
)
def test_bad_assertion_line(tmp_path: Path, line: str, problem: str) -> None:
    """The same of modifiers."""
    message = refusal(write(tmp_path, ast=f'{PAIN}||t="problem"||a="present"\n{line}\n'))
    assert problem in message
    assert f"{tmp_path / 'ast' / 'a.ast'}, line 2:" in message


def test_entities_are_checked_as_in_the_other_tasks(tmp_path: Path) -> None:
    """What is wrong with a `.con` file is said of it, but any type is taken."""
    folder = write(tmp_path, rel="")
    (folder / "concept" / "a.con").write_text(f'{PAIN}||t="problem"\nc="pain and" 3:6 3:7||t="problem"\n')
    message = refusal(folder)
    assert "a.con, line 2:" in message
    assert "overlaps another one" in message


@pytest.mark.parametrize(("part", "missing"), [("rel", "ast"), ("ast", "rel"), ("txt", "concept"), ("concept", "txt")])
def test_a_missing_file_is_named_and_can_be_skipped(tmp_path: Path, part: str, missing: str) -> None:
    """A note that lacks a file in a folder that is there would teach that nothing is said of its entities."""
    folder, endings = write(tmp_path, rel="", ast=""), {"concept": "con"}
    for each in {"txt", "concept", "rel", "ast"} - {missing}:
        (folder / each / f"b.{endings.get(each, each)}").write_text("")
    with pytest.raises(RefusedError, match="is missing") as caught:
        load_notes(folder, TASK)
    assert str(folder / missing / f"b.{endings.get(missing, missing)}") in caught.value.message
    assert "rel/NAME.rel" in caught.value.hint
    found = load_notes(folder, TASK, skip_bad=True)
    assert ([note.id for note in found.notes], found.skipped) == (["a"], 1)


def test_entities_alone_say_nothing(tmp_path: Path) -> None:
    """A folder of marked entities is none of this task's, and the error tells what it lacks."""
    with pytest.raises(RefusedError, match="holds no notes") as caught:
        load_notes(write(tmp_path), TASK)
    assert "rel/NAME.rel or ast/NAME.ast" in caught.value.hint


def test_heads_are_read_without_what_is_said_of_them(tmp_path: Path) -> None:
    """To predict on: the entities of a folder, whether or not it says more, and even if that cannot be read."""
    folder = write(tmp_path, rel="nonsense\n")
    (note,) = read_heads(folder)
    assert isinstance(note, HeadedNote)
    assert [(line, head.start, said) for line, head, said in told(note)] == [
        (3, 2, ()),
        (3, 4, ()),
        (3, 8, ()),
        (4, 1, ()),
    ]


def test_a_text_alone_has_no_heads(tmp_path: Path) -> None:
    """The error says what to give; one of a folder that is not there says so."""
    (tmp_path / "a.txt").write_text(SECRET)
    for path, says in ((tmp_path, "has no marked entities"), (tmp_path / "no", "does not exist")):
        with pytest.raises(RefusedError, match=says) as caught:
            list(read_heads(path))
        assert "concept/NAME.con" in caught.value.hint
