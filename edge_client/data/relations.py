r"""Reader of what the i2b2/VA 2010 layout says of entities: relations in `rel/NAME.rel`, modifiers in `ast/NAME.ast`.

    c="aspirin" 3:2 3:2||r="TrAP"||c="chest pain" 3:4 3:5
    c="chest pain" 3:4 3:5||t="problem"||a="present"

The offsets are those of `concept/NAME.con`, where each of the entities is marked; of what type they are is not asked.
The first entity of a relation is its head. A pair stands in one relation at most, an entity has one modifier at most:
then what is said of a head is a sentence in which no entity lies over another.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from edge_client.data.checks import Where, check_label
from edge_client.data.i2b2 import SPAN, Form, Span, find_span, matches, read_names, read_sentences
from edge_client.data.notes import Entity, HeadedLine, HeadedNote, Sentence
from shared.errors import RefusedError

RELATION_FORMATS = "a folder with txt/NAME.txt, concept/NAME.con and rel/NAME.rel or ast/NAME.ast"

_TEXT = ("txt", "concept")
_RELATION = Form(
    "a relation",
    re.compile(rf'{SPAN}\|\|r="([^"]*)"\|\|{SPAN}\s*'),
    'c="WORDS" LINE:TOKEN LINE:TOKEN||r="LABEL"||c="WORDS" LINE:TOKEN LINE:TOKEN',
)
_ASSERTION = Form(
    "an assertion",
    re.compile(rf'{SPAN}\|\|t="[^"]*"\|\|a="([^"]*)"\s*'),
    'c="WORDS" LINE:TOKEN LINE:TOKEN||t="TYPE"||a="LABEL"',
)


def read_relations(folder: Path, labels: Sequence[str]) -> Iterator[HeadedNote | RefusedError]:
    """Yield, for each name in the layout, its note with what is said of its entities, or why it is refused.

    Nothing where neither `rel/` nor `ast/` is there; where one is, each note has a file in it.
    """
    said = [part for part in ("rel", "ast") if (folder / part).is_dir()]
    return read_names(folder, (*_TEXT, *said), partial(_read_note, labels)) if said else iter(())


def read_heads(folder: Path) -> Iterator[HeadedNote | RefusedError]:
    """Yield, for each name in the layout, its note with its entities, of which nothing is said yet.

    RefusedError(rule='note-missing') when there is none: a text alone does not tell what its entities are.
    """
    if not any((folder / "concept").glob("*.con")):
        state = "has no marked entities" if folder.exists() else "does not exist"
        hint = (
            "relations are found between entities that are marked: name a folder with txt/NAME.txt and concept/NAME.con"
        )
        raise RefusedError(f"{folder} {state}", rule="note-missing", hint=hint)
    yield from read_names(folder, _TEXT, partial(_read_note, ()))


def _read_note(labels: Sequence[str], name: str, text: Path, concept: Path, *saying: Path) -> HeadedNote:
    lines = read_sentences(text, concept, None)
    heads = {
        Span(number, entity.start, entity.end): entity
        for number, line in enumerate(lines, start=1)
        for entity in line.entities
    }
    said: dict[Span, dict[Span, str]] = {span: {} for span in heads}
    for path in saying:
        for where, head, label, other in _sayings(path, lines):
            _check(head, other, heads, where)
            if said[head].setdefault(other, check_label(label, labels, where)) != label:
                raise where.refuse(
                    "another label for what has one already",
                    hint="a pair stands in one relation and an entity has one modifier; keep one of the two",
                )
    return HeadedNote(
        name,
        tuple(
            HeadedLine(span.line, head, _told(lines[span.line - 1].tokens, said[span])) for span, head in heads.items()
        ),
    )


def _sayings(path: Path, lines: Sequence[Sentence]) -> Iterator[tuple[Where, Span, str, Span]]:
    """Head, label and entity of each line of a file; of a modifier the entity is the head."""
    rows = [line.tokens for line in lines]
    form = _RELATION if path.suffix == ".rel" else _ASSERTION
    for where, match in matches(path, form):
        told = match.groups()
        head = find_span(told[:5], rows, where)
        other = find_span(told[6:], rows, where) if form is _RELATION else head
        if form is _RELATION and head == other:
            raise where.refuse("an entity in a relation to itself", hint="name the two entities that it is between")
        yield where, head, told[5], other


def _check(head: Span, other: Span, marked: Mapping[Span, Entity], where: Where) -> None:
    if head not in marked or other not in marked:
        raise where.refuse("an entity that the .con file does not mark", hint="mark it there, at the same offsets")
    if head.line != other.line:
        raise where.refuse(
            "a relation runs over the end of a line", hint="the two entities of a relation stand in one line"
        )


def _told(words: tuple[str, ...], said: Mapping[Span, str]) -> Sentence:
    """A line with what is said of one head in it."""
    return Sentence(words, tuple(Entity(span.start, span.end, label) for span, label in sorted(said.items())))
