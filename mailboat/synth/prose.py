"""Textbook, guideline and letter prose: the text on which the shipped base model learns its language.

It shares the lexicon with the synthetic notes and nothing else: other lines, no notes, and of the short forms only a
part, so that much of what a site abbreviates is new to the model.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator

from mailboat.synth.lexicon import LABELS, Concept, load_concepts, load_lines, load_lists

# The share of short forms that the prose knows.
KNOWN_SHORT = 0.75
# The share of mentions composed from parts.
COMPOSED = 0.15
# The share of other mentions with a modifier in front, and of short forms that are in small letters.
MODIFIED = 0.15
SMALL_SHORT = 0.3

_SLOT = re.compile(r"\{(\w+)\}")
# As it is, with a capital at the start, in title case and, seldom, all in capitals.
_CASES: tuple[Callable[[str], str], ...] = (str, lambda text: text[:1].upper() + text[1:], str.title, str.upper)
_CASE_WEIGHTS = (0.4, 0.35, 0.17, 0.08)


def draw_prose(paragraphs: int, seed: int) -> Iterator[str]:
    """Yield paragraphs of three to eight sentences, always the same for one `seed`.

    Half of the paragraphs have each sentence on a line of its own, so that a model has met line breaks. A blank stands
    on both sides of a break: the word after it then has the tokens it has anywhere else.
    """
    rng = random.Random(f"{seed}/prose")
    forms = {label: [_known_forms(concept, rng) for concept in load_concepts()[label]] for label in LABELS}
    kinds = load_lines("prose")
    for _ in range(paragraphs):
        lines = kinds[rng.choice(tuple(kinds))]
        change_case = rng.choices(_CASES, _CASE_WEIGHTS)[0]
        sentences = [change_case(_fill(rng.choice(lines), forms, rng)) for _ in range(rng.randint(3, 8))]
        yield rng.choice((" ", " \n ")).join(sentences)


def _known_forms(concept: Concept, rng: random.Random) -> tuple[str, ...]:
    short = [
        form if rng.random() < SMALL_SHORT else form.upper() for form in concept.short if rng.random() < KNOWN_SHORT
    ]
    return (concept.preferred, *concept.others, *short)


def _fill(line: str, forms: dict[str, list[tuple[str, ...]]], rng: random.Random) -> str:
    def word(slot: re.Match[str]) -> str:
        if slot[1] == "n":
            return str(rng.randint(2, 99))
        if rng.random() < COMPOSED:
            parts = load_lists("parts")
            return " ".join((rng.choice(parts["side"]), rng.choice(parts["body"]), rng.choice(parts[slot[1]])))
        form = rng.choice(rng.choice(forms[slot[1]]))
        return f"{rng.choice(load_lists('modifiers')[slot[1]])} {form}" if rng.random() < MODIFIED else form

    return _SLOT.sub(word, line)
