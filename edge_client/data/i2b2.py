r"""Reader of the i2b2/VA 2010 layout: `txt/NAME.txt` beside `concept/NAME.con`.

A line of a `.con` file marks one entity:

    c="some chest pain" 12:3 12:5||t="problem"

that is the words, then the first and the last token as `line:token`, lines counted from 1 and
tokens from 0, the last token inside the span. Uzuner et al. 2011, "2010 i2b2/VA challenge on
concepts, assertions, and relations in clinical text", JAMIA 18(5). What is said of the entities is read in
`relations.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, TypeAlias, TypeVar

from edge_client.data.checks import Where, build_sentence, check_label, read_lines, split_words
from edge_client.data.notes import AnyNote, Entity, Note, Sentence
from shared.errors import RefusedError

# Greedy up to the last quote before the offsets: the words may hold quotes and bars themselves.
SPAN = r'c="(.*)" (\d+):(\d+) (\d+):(\d+)'
"""A run of words and its offsets, five groups that `find_span` takes."""
ENDINGS: Mapping[str, str] = MappingProxyType({"txt": ".txt", "concept": ".con", "rel": ".rel", "ast": ".ast"})
"""How the names in each folder of the layout end."""

N = TypeVar("N", bound=AnyNote)
Rows: TypeAlias = Sequence[Sequence[str]]
"""The words of each line of a text, of empty lines too."""


class Span(NamedTuple):
    """A run of words: its line, counted from 1, the first word and the one behind the last, counted from 0."""

    line: int
    start: int
    end: int


class Form(NamedTuple):
    """What the lines of a kind of file look like."""

    name: str
    pattern: re.Pattern[str]
    expected: str


_CONCEPT = Form("a concept", re.compile(SPAN + r'\|\|t="([^"]*)"\s*'), 'c="WORDS" LINE:TOKEN LINE:TOKEN||t="LABEL"')


def read_i2b2(folder: Path, labels: Sequence[str]) -> Iterator[Note | RefusedError]:
    """Yield, for each name under `txt/` or `concept/`, its note or why it is refused."""

    def read(name: str, text: Path, concept: Path) -> Note:
        lines = read_sentences(text, concept, labels)
        return Note(name, tuple(line for line in lines if line.tokens))

    return read_names(folder, ("txt", "concept"), read)


def read_names(folder: Path, parts: Sequence[str], read: Callable[..., N]) -> Iterator[N | RefusedError]:
    """Yield what `read` makes of each name under one of `parts`, folders of the layout, or why it is refused.

    `read` gets the name and its file in each part. A name that has no file in one of them is refused.
    """
    found = {part: {path.stem for path in folder.glob(f"{part}/*{ENDINGS[part]}")} for part in parts}
    for name in sorted(set[str]().union(*found.values())):
        try:
            for part in parts:
                if name not in found[part]:
                    raise _missing(folder, part, name, parts)
            yield read(name, *(_file(folder, part, name) for part in parts))
        except RefusedError as refused:
            yield refused


def read_sentences(text: Path, concept: Path, labels: Sequence[str] | None) -> list[Sentence]:
    """Return the lines of a text, empty ones too, with the entities that `concept` marks; None takes any label."""
    rows = [split_words(line) for line in read_lines(text)]
    marks: dict[int, list[tuple[Entity, Where]]] = {}
    for where, match in matches(concept, _CONCEPT):
        label = match[6] if labels is None else check_label(match[6], labels, where)
        line, start, end = find_span(match.groups()[:5], rows, where)
        marks.setdefault(line, []).append((Entity(start, end, label), where))
    return [build_sentence(words, marks.get(line, ()), Where(text, line)) for line, words in enumerate(rows, start=1)]


def matches(path: Path, form: Form) -> Iterator[tuple[Where, re.Match[str]]]:
    """Yield each line that is not blank, taken apart; raise RefusedError for one that is not of this form."""
    for number, line in enumerate(read_lines(path), start=1):
        if line.strip():
            where, match = Where(path, number), form.pattern.fullmatch(line)
            if match is None:
                raise where.refuse(f"not {form.name} line", hint=f"expected {form.expected}")
            yield where, match


def find_span(told: Sequence[str], rows: Rows, where: Where) -> Span:
    """Return the span that is told as the five groups of SPAN, if it lies in `rows` and its words are these."""
    line, first, last_line, last = (int(number) for number in told[1:])
    if line != last_line:
        raise where.refuse(
            "an entity runs over the end of a line",
            hint="an entity lies within one line of the text; split it in two",
        )
    if not (1 <= line <= len(rows) and first <= last < len(rows[line - 1])):
        raise where.refuse(
            "the offsets lie outside the text",
            hint=f"lines count from 1, tokens from 0; is this the {where.path.suffix} file of another text?",
        )
    # The words are given twice, here and by their offsets. If they differ, the offsets were
    # counted in another text or at other blanks, and every label would sit on a wrong word.
    if _plain(split_words(told[0])) != _plain(rows[line - 1][first : last + 1]):
        raise where.refuse(
            "the words given are not those at the offsets",
            hint="offsets count words separated by white space; repeated blanks count as one",
        )
    return Span(line, first, last + 1)


def _file(folder: Path, part: str, name: str) -> Path:
    return folder / part / f"{name}{ENDINGS[part]}"


def _missing(folder: Path, part: str, name: str, parts: Sequence[str]) -> RefusedError:
    beside = " and ".join(f"{each}/NAME{ENDINGS[each]}" for each in parts[1:])
    return RefusedError(
        f"{_file(folder, part, name)} is missing",
        rule="note-missing",
        hint=f"each txt/NAME.txt needs its {beside}, which may be empty",
    )


def _plain(words: Sequence[str]) -> str:
    """Return the words in the form in which the challenge compares them: one run of lower case."""
    return "".join(words).lower()
