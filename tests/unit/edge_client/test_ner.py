from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from edge_client.data import Entity, Note, Sentence
from edge_client.tasks import IGNORED, Window
from edge_client.tasks.encoding import TextEncoder
from edge_client.tasks.ner import NerTask
from tests.unit.edge_client import tiny

TASK = NerTask(("problem", "treatment", "test"))
OUT, BP, IP, BR, IR = 0, 1, 2, 3, 4


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """A WordPiece tokenizer with [CLS] and [SEP], and a byte-level one without specials but with line breaks."""
    root = tmp_path_factory.mktemp("tokenizers")
    return {kind: AutoTokenizer.from_pretrained(tiny.save_model(root / kind, kind)) for kind in ("bert", "llama")}


def encoder(tokenizers: dict[str, object], kind: str, max_length: int = 32) -> TextEncoder:
    """Windows of `max_length` tokens, the speaking token as the model type has it."""
    return TextEncoder(tokenizers[kind], max_length=max_length, speaks_last=kind == "llama")


def note(*lines: str, entities: tuple[Entity, ...] = ()) -> Note:
    """A note of lines of words; the entities are those of the first line."""
    return Note("n", tuple(Sentence(tuple(line.split()), () if at else entities) for at, line in enumerate(lines)))


def text_of(tokenizer: object, window: Window) -> list[str]:
    """Each token of a window as text."""
    return [tokenizer.decode([token]).strip() for token in window.ids]  # type: ignore[attr-defined]


def test_classes_are_bio() -> None:
    """O is class 0; each label then has its B and its I."""
    assert NerTask(("a", "b")).classes == ("O", "B-a", "I-a", "B-b", "I-b")


@pytest.mark.parametrize(
    ("classes", "entities"),
    [
        ([OUT, BP, IP, OUT], [(1, 3, "problem")]),
        ([BP, BP, IP], [(0, 1, "problem"), (1, 3, "problem")]),
        ([BP, IR, IR], [(0, 1, "problem"), (1, 3, "treatment")]),
        ([OUT, IR, OUT, IR], [(1, 2, "treatment"), (3, 4, "treatment")]),
        ([IP], [(0, 1, "problem")]),
        ([OUT, OUT], []),
        ([], []),
    ],
)
def test_classes_spell_entities(classes: list[int], entities: list[tuple[int, int, str]]) -> None:
    """B begins an entity, I continues its label, and an I that continues nothing begins one."""
    assert TASK.entities(np.array(classes, dtype=np.int64)) == tuple(Entity(*entity) for entity in entities)


@pytest.mark.parametrize(("kind", "speaker"), [("bert", "first"), ("llama", "last")])
def test_one_token_speaks_for_a_word(tokenizers: dict[str, object], kind: str, speaker: str) -> None:
    """The word's label stands on its first token, in a causal model on its last, and nowhere else."""
    [window] = TASK.windows(
        [note("xyzzy troponin xyzzy", entities=(Entity(0, 2, "problem"),))], encoder(tokenizers, kind)
    )
    owners = TextEncoder(tokenizers[kind], max_length=32, speaks_last=False).encode([["xyzzy", "troponin", "xyzzy"]])
    shift = 1 if kind == "bert" else 0
    runs = [[at for at, owner in enumerate(owners[0].owners) if owner == word] for word in range(3)]
    assert kind == "bert" or len(runs[0]) > 1
    assert window.positions.tolist() == [run[0 if speaker == "first" else -1] + shift for run in runs]
    assert window.units.tolist() == [0, 1, 2]
    assert window.targets[window.positions].tolist() == [BP, IP, OUT]
    assert (np.delete(window.targets, window.positions) == IGNORED).all()


def test_bert_windows_have_their_specials(tokenizers: dict[str, object]) -> None:
    """Each window starts and ends with what the tokenizer puts around a text, and has no line break in it."""
    [window] = TASK.windows([note("patient was given", "aspirin")], encoder(tokenizers, "bert"))
    texts = text_of(tokenizers["bert"], window)
    assert (texts[0], texts[-1]) == ("[CLS]", "[SEP]")
    assert "[SEP]" not in texts[1:-1]


def test_lines_are_kept_apart_as_in_running_text(tokenizers: dict[str, object]) -> None:
    """Two lines of one window are tokenized as the text that they are, line break included."""
    [window] = TASK.windows([note("patient was given", "aspirin")], encoder(tokenizers, "llama"))
    assert tokenizers["llama"].decode(window.ids) == "patient was given\naspirin"  # type: ignore[attr-defined]


def test_lines_of_a_note_share_a_window_while_they_fit(tokenizers: dict[str, object]) -> None:
    """Windows hold consecutive whole lines of one note; another note begins another window."""
    line = "patient was given"
    cost = len(encoder(tokenizers, "bert").encode([line.split()])[0].ids)
    two = encoder(tokenizers, "bert", 2 * cost + 2)
    windows = list(TASK.windows([note(line, line, line), note(line)], two))
    assert [window.units.tolist() for window in windows] == [[0, 1, 2, 3, 4, 5], [6, 7, 8], [9, 10, 11]]


def test_a_long_line_is_split_between_words(tokenizers: dict[str, object]) -> None:
    """A line longer than a window goes on in the next one; an entity across the cut keeps its classes."""
    long = note(" ".join(["troponin"] * 40), entities=(Entity(0, 40, "problem"),))
    windows = list(TASK.windows([long], encoder(tokenizers, "llama", 16)))
    assert len(windows) > 2
    classes = np.concatenate([window.targets[window.positions] for window in windows])
    assert classes.tolist() == [BP] + [IP] * 39
    assert all(len(window.ids) <= 16 for window in windows)


def test_a_word_longer_than_a_window_is_cut(tokenizers: dict[str, object]) -> None:
    """A word that alone overflows a window keeps the tokens that fit and is still predicted once."""
    windows = list(TASK.windows([note("fever " + "xq" * 100 + " cbc")], encoder(tokenizers, "llama", 16)))
    assert sorted(np.concatenate([window.units for window in windows]).tolist()) == [0, 1, 2]
    assert max(len(window.ids) for window in windows) == 16


WORDS = st.text(st.characters(codec="utf-8", exclude_characters=" \t\n\r\v\f"), min_size=1)


@settings(max_examples=60, deadline=None)
@given(lines=st.lists(st.lists(WORDS, max_size=12), max_size=6), max_length=st.integers(8, 24))
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_each_word_is_predicted_once(
    tokenizers: dict[str, object], kind: str, lines: list[list[str]], max_length: int
) -> None:
    """Whatever the words, no window is too long and each word has one position; only a word without tokens has none."""
    written = Note("n", tuple(Sentence(tuple(words), ()) for words in lines))
    cutter = encoder(tokenizers, kind, max_length)
    windows = list(TASK.windows([written], cutter))
    units = np.concatenate([window.units for window in windows]).tolist() if windows else []
    assert units == sorted(set(units))
    assert all(len(window.ids) <= max_length for window in windows)
    mute = 0
    for encoded, words in zip(cutter.encode([words for words in lines if words]), filter(None, lines), strict=True):
        mute += len(set(range(len(words))) - set(encoded.owners))
    assert len(units) + mute == TASK.units([written])


def test_units_run_through_all_notes(tokenizers: dict[str, object]) -> None:
    """Units number the words of all notes in reading order, lines without words left out."""
    empty = Note("e", (Sentence((), ()),))
    written = [*tiny.notes(3), empty, *tiny.notes(2, seed=5)]
    windows = TASK.windows(written, encoder(tokenizers, "llama"))
    units = np.concatenate([window.units for window in windows])
    assert units.tolist() == list(range(TASK.units(written)))
    assert TASK.examples(written) == 25


def predictions(written: Note, entities: list[tuple[int, int, str]]) -> np.ndarray:
    """The classes of a note of one line that spell `entities`."""
    classes = np.zeros(TASK.units([written]), dtype=np.int64)
    for start, end, label in entities:
        begin = TASK.classes.index(f"B-{label}")
        classes[start:end] = begin + 1
        classes[start] = begin
    return classes


@pytest.mark.parametrize(
    ("found", "strict", "lenient"),
    [
        ([(0, 2, "problem"), (4, 5, "test")], 1.0, 1.0),
        ([(0, 1, "problem"), (4, 5, "test")], 0.5, 1.0),
        ([(0, 2, "test"), (4, 5, "test")], 0.5, 0.5),
        ([(4, 5, "test")], 2 / 3, 2 / 3),
        ([(0, 2, "problem"), (4, 5, "test"), (6, 7, "test")], 0.8, 0.8),
        ([], 0.0, 0.0),
    ],
)
def test_scores_by_hand(found: list[tuple[int, int, str]], strict: float, lenient: float) -> None:
    """Strict F1 wants span and type right, lenient F1 an overlap and the type; worked by hand over two entities."""
    written = note("a b c d e f g h", entities=(Entity(0, 2, "problem"), Entity(4, 5, "test")))
    scores = TASK.score([written], predictions(written, found))
    assert scores.overall == pytest.approx({"strict_f1": strict, "lenient_f1": lenient})


def test_scores_by_label() -> None:
    """Each label of the federation has a score of its own, also one that does not occur."""
    written = note("a b c d e f", entities=(Entity(0, 2, "problem"), Entity(4, 5, "test")))
    scores = TASK.score([written], predictions(written, [(0, 1, "problem"), (4, 5, "test")]))
    assert scores.labels["problem"] == {"strict_f1": 0.0, "lenient_f1": 1.0}
    assert scores.labels["test"] == {"strict_f1": 1.0, "lenient_f1": 1.0}
    assert scores.labels["treatment"]["strict_f1"] == 0.0


def test_notes_without_entities_score_nothing() -> None:
    """Where there is nothing to find and nothing found, F1 is 0 and not an error."""
    written = note("a b")
    assert TASK.score([written], predictions(written, [])).main == 0.0


def test_lines_do_not_run_into_each_other() -> None:
    """An entity at the end of a line and one at the start of the next are two."""
    written = Note("n", tuple(Sentence(("a",), (Entity(0, 1, "problem"),)) for _ in range(2)))
    assert TASK.score([written], np.array([BP, IP])).main == 1.0


def test_nothing_of_a_note_shows(tokenizers: dict[str, object], tmp_path: Path) -> None:
    """A window's representation shows no ids from which the text could be read."""
    [window] = TASK.windows([note("secretword")], encoder(tokenizers, "llama"))
    assert str(int(window.ids[0])) not in repr(window)
    assert all(before < after for before, after in pairwise(window.positions.tolist()))
