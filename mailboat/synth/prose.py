"""Textbook, guideline and letter prose: the text on which the shipped base model learns its language.

It shares the lexicon's concepts with the synthetic notes and nothing else: other lines, no notes, and only part of
the ways to write a concept, so that much of what a site writes is new to the model.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

from mailboat.synth.lexicon import LABELS, Concept, load_concepts, load_lines, load_lists

# The share of a concept's other and short forms that the prose knows.
KNOWN_OTHERS = 0.5
KNOWN_SHORT = 0.25
# The share of mentions composed from parts.
COMPOSED = 0.15

_SLOT = re.compile(r"\{(\w+)\}")


def draw_prose(paragraphs: int, seed: int) -> Iterator[str]:
    """Yield paragraphs of three to eight sentences, always the same for one `seed`."""
    rng = random.Random(f"{seed}/prose")
    forms = {label: [_known_forms(concept, rng) for concept in load_concepts()[label]] for label in LABELS}
    kinds = load_lines("prose")
    for _ in range(paragraphs):
        lines = kinds[rng.choice(tuple(kinds))]
        sentences = [_fill(rng.choice(lines), forms, rng) for _ in range(rng.randint(3, 8))]
        yield _letter_case(" ".join(sentences), rng)


def _known_forms(concept: Concept, rng: random.Random) -> tuple[str, ...]:
    others = [form for form in concept.others if rng.random() < KNOWN_OTHERS]
    short = [form.upper() for form in concept.short if rng.random() < KNOWN_SHORT]
    return (concept.preferred, *others, *short)


def _fill(line: str, forms: dict[str, list[tuple[str, ...]]], rng: random.Random) -> str:
    def word(slot: re.Match[str]) -> str:
        if slot[1] == "n":
            return str(rng.randint(2, 99))
        if rng.random() < COMPOSED:
            parts = load_lists("parts")
            return " ".join((rng.choice(parts["side"]), rng.choice(parts["body"]), rng.choice(parts[slot[1]])))
        return rng.choice(rng.choice(forms[slot[1]]))

    return _SLOT.sub(word, line)


def _letter_case(text: str, rng: random.Random) -> str:
    """Return the text as it is, with capitals where sentences begin, in title case, or, seldom, all in capitals."""
    kind = rng.random()
    if kind < 0.4:
        return text
    if kind < 0.75:
        return ". ".join(part[:1].upper() + part[1:] for part in text.split(". "))
    return text.title() if kind < 0.92 else text.upper()
