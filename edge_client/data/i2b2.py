r"""Reader of the i2b2/VA 2010 layout: `txt/NAME.txt` beside `concept/NAME.con`.

A line of a `.con` file marks one entity:

    c="some chest pain" 12:3 12:5||t="problem"

that is the words, then the first and the last token as `line:token`, lines counted from 1 and
tokens from 0, the last token inside the span. Uzuner et al. 2011, "2010 i2b2/VA challenge on
concepts, assertions, and relations in clinical text", JAMIA 18(5).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

from edge_client.data.checks import Where, build_sentence, check_label, read_lines, split_words
from edge_client.data.notes import Entity, Note, Sentence
from shared.errors import RefusedError

# Greedy up to the last quote before the offsets: the words may hold quotes and bars themselves.
_CONCEPT = re.compile(r'c="(?P<words>.*)" (\d+):(\d+) (\d+):(\d+)\|\|t="(?P<label>[^"]*)"\s*')

_Marks: TypeAlias = dict[int, list[tuple[Entity, Where]]]


def read_i2b2(folder: Path, labels: Sequence[str]) -> Iterator[Note | RefusedError]:
    """Yield, for each name under `txt/` or `concept/`, its note or why it is refused."""
    texts = {path.stem: path for path in folder.glob("txt/*.txt")}
    concepts = {path.stem: path for path in folder.glob("concept/*.con")}
    for name in sorted(texts.keys() | concepts.keys()):
        try:
            text = _partner(texts, name, folder / "txt" / f"{name}.txt")
            concept = _partner(concepts, name, folder / "concept" / f"{name}.con")
            yield _read_note(name, text, concept, labels)
        except RefusedError as refused:
            yield refused


def _partner(paths: dict[str, Path], name: str, expected: Path) -> Path:
    if name not in paths:
        raise RefusedError(
            f"{expected} is missing",
            rule="note-missing",
            hint="each txt/NAME.txt needs its concept/NAME.con, which may be empty",
        )
    return paths[name]


def _read_note(name: str, text: Path, concept: Path, labels: Sequence[str]) -> Note:
    rows = [split_words(line) for line in read_lines(text)]
    marks: _Marks = {}
    for number, line in enumerate(read_lines(concept), start=1):
        if line.strip():
            where = Where(concept, number)
            row, entity = _parse_concept(line, rows, labels, where)
            marks.setdefault(row, []).append((entity, where))
    sentences: list[Sentence] = []
    for number, tokens in enumerate(rows, start=1):
        if tokens:
            sentences.append(build_sentence(tokens, marks.get(number, ()), Where(text, number)))
    return Note(name, tuple(sentences))


def _parse_concept(
    line: str, rows: Sequence[tuple[str, ...]], labels: Sequence[str], where: Where
) -> tuple[int, Entity]:
    """Return the line of the text that the concept is in, and the entity."""
    match = _CONCEPT.fullmatch(line)
    if match is None:
        raise where.refuse(
            "not a concept line",
            hint='expected c="WORDS" LINE:TOKEN LINE:TOKEN||t="LABEL"',
        )
    row, first, last_row, last = (int(number) for number in match.group(2, 3, 4, 5))
    label = check_label(match["label"], labels, where)
    if row != last_row:
        raise where.refuse(
            "an entity runs over the end of a line",
            hint="an entity lies within one line of the text; split it in two",
        )
    if not (1 <= row <= len(rows) and first <= last < len(rows[row - 1])):
        raise where.refuse(
            "the offsets lie outside the text",
            hint="lines count from 1, tokens from 0; is this the .con file of another text?",
        )
    # The words are given twice, here and by their offsets. If they differ, the offsets were
    # counted in another text or at other blanks, and every label would sit on a wrong word.
    if _plain(split_words(match["words"])) != _plain(rows[row - 1][first : last + 1]):
        raise where.refuse(
            "the words given are not those at the offsets",
            hint="offsets count words separated by white space; repeated blanks count as one",
        )
    return row, Entity(first, last + 1, label)


def _plain(words: Sequence[str]) -> str:
    """Return the words in the form in which the challenge compares them: one run of lower case."""
    return "".join(words).lower()
