"""Reader of CoNLL columns: a token on each line, its tag in the last column.

Tags are `O`, `B-LABEL` and `I-LABEL`. A blank line ends a sentence, a `-DOCSTART-` line ends a
note. An `I-` tag that continues nothing starts an entity, as in the first of the two BIO schemes
(Tjong Kim Sang and Veenstra 1999, "Representing Text Chunks").
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

from edge_client.data.checks import Where, build_sentence, check_label, read_lines, split_words
from edge_client.data.notes import Entity, Note, Sentence
from shared.errors import RefusedError

_TAG = re.compile(r"O|(?P<place>[BI])-(?P<label>\S+)")

_Numbered: TypeAlias = list[tuple[int, str]]


def read_conll(path: Path, labels: Sequence[str]) -> Iterator[Note | RefusedError]:
    """Yield each note of the file, or why it is refused; ids are the file's stem and a count."""
    for count, block in enumerate(_split_notes(read_lines(path)), start=1):
        try:
            sentences = tuple(_read_sentence(rows, path, labels) for rows in _split_blank(block))
            yield Note(f"{path.stem}-{count}", sentences)
        except RefusedError as refused:
            yield refused


def _split_notes(lines: Sequence[str]) -> Iterator[_Numbered]:
    """Yield the numbered lines of each note that has any."""
    block: _Numbered = []
    for number, line in enumerate(lines, start=1):
        if line.startswith("-DOCSTART-"):
            if any(text.strip() for _, text in block):
                yield block
            block = []
        else:
            block.append((number, line))
    if any(text.strip() for _, text in block):
        yield block


def _split_blank(block: _Numbered) -> Iterator[_Numbered]:
    """Yield the runs of lines between blank ones."""
    rows: _Numbered = []
    for number, line in block:
        if line.strip():
            rows.append((number, line))
        elif rows:
            yield rows
            rows = []
    if rows:
        yield rows


def _read_sentence(rows: _Numbered, path: Path, labels: Sequence[str]) -> Sentence:
    tokens: list[str] = []
    marked: list[tuple[Entity, Where]] = []
    open_label: str | None = None
    for index, (number, line) in enumerate(rows):
        where = Where(path, number)
        columns = split_words(line)
        tag = _TAG.fullmatch(columns[-1])
        if len(columns) < 2 or tag is None:
            raise where.refuse(
                "not a token followed by a tag",
                hint="expected columns with the token first and O, B-LABEL or I-LABEL last",
            )
        tokens.append(columns[0])
        label = tag["label"]
        if label is not None:
            check_label(label, labels, where)
            if tag["place"] == "I" and label == open_label:
                before, source = marked[-1]
                marked[-1] = (Entity(before.start, index + 1, label), source)
            else:
                marked.append((Entity(index, index + 1, label), where))
        open_label = label
    return build_sentence(tokens, marked, Where(path, rows[0][0]))
