"""Entities as mark-up in running text, written for a model to imitate and read back from whatever it wrote.

    he has <span class="problem">chest pain</span> today

The form is that of Fed-MedLoRA (arXiv 2601.22124): the input once more, with the entities in spans.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher

from edge_client.data import Entity, Sentence

_PARTS = re.compile(
    r"""<\s*span\s+class\s*=\s*["']?(?P<label>[\w-]+)["']?\s*>|(?P<close><\s*/\s*span\s*>)"""
    # Words end where those of notes do, at blanks alone; notes have words such as <0.01, and words with hard spaces.
    r"""|(?:[^ \t\f\v<]|<(?!\s*/?\s*span))+|<"""
)


def write_markup(sentence: Sentence) -> str:
    """Return the words of a line, single blanks between them, with each entity in a span of its label's class."""
    words = list(sentence.tokens)
    for entity in sentence.entities:
        words[entity.start] = f'<span class="{entity.label}">{words[entity.start]}'
        words[entity.end - 1] += "</span>"
    return " ".join(words)


def read_markup(answer: str, words: Sequence[str], labels: Sequence[str]) -> tuple[Entity, ...]:
    """Return the entities that `answer` marks in a line of these `words`, in order, none over another.

    Nothing that a model may write is an error. The answer's first line counts. Its words are laid beside those of the
    line, letter case aside, as `difflib` finds the longest runs in common: what it adds is passed over, and an entity
    reaches from its first word that is there to its last. A span that is not closed ends where the next one begins or
    at the end; one of an unknown class, or without a word of the line, is none. Words keep their order and spans are
    apart, so that entities are.
    """
    said, spans = _spans(answer.strip(" \t\f\v\r\n").partition("\n")[0].removesuffix("\r"))
    place: dict[int, int] = {}
    matcher = SequenceMatcher(None, [word.lower() for word in said], [word.lower() for word in words], autojunk=False)
    for block in matcher.get_matching_blocks():
        place.update((block.a + offset, block.b + offset) for offset in range(block.size))
    found: list[Entity] = []
    for start, end, label in spans:
        at = [place[index] for index in range(start, end) if index in place]
        if at and label in labels:
            found.append(Entity(at[0], at[-1] + 1, label))
    return tuple(found)


def _spans(line: str) -> tuple[list[str], list[tuple[int, int, str]]]:
    """The words of a marked line, and each span as first word, word after the last, class."""
    words: list[str] = []
    spans: list[tuple[int, int, str]] = []
    opened: tuple[int, str] | None = None
    for part in _parts(line):
        if isinstance(part, str):
            words.append(part)
            continue
        if opened is not None:
            spans.append((opened[0], len(words), opened[1]))
        label = part["label"]
        opened = (len(words), label) if label is not None else None
    if opened is not None:
        spans.append((opened[0], len(words), opened[1]))
    return words, spans


def _parts(line: str) -> Iterator[str | re.Match[str]]:
    """Words as text, tags as matches."""
    for found in _PARTS.finditer(line):
        yield found if found["label"] is not None or found["close"] is not None else found.group()
