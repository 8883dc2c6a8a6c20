"""The words of one mention of a problem, treatment or test, as a site would write it."""

from __future__ import annotations

import random

from mailboat.synth.lexicon import Concept, load_lists
from mailboat.synth.profiles import SiteProfile

# The share of mentions composed from parts ("left knee swelling"): most are met once, so that no list can hold them.
COMPOSED = 0.08
# The share of written-out mentions that begin with a modifier. It belongs to the span, as determiners do in i2b2.
MODIFIED = 0.20


def draw_mention(label: str, profile: SiteProfile, rng: random.Random) -> tuple[str, ...]:
    """Return the tokens of a mention of `label`."""
    if rng.random() < COMPOSED:
        return _set_case(_compose(label, rng), profile, is_short=False)
    return write_concept(profile.concepts[label].draw(rng), label, profile, rng)


def write_concept(concept: Concept, label: str, profile: SiteProfile, rng: random.Random) -> tuple[str, ...]:
    """Return the tokens of a mention of this concept."""
    text, is_short = _choose_form(concept, profile, rng)
    if not is_short and rng.random() < MODIFIED:
        text = f"{rng.choice(load_lists('modifiers')[label])} {text}"
    return _set_case(text, profile, is_short=is_short)


def _compose(label: str, rng: random.Random) -> str:
    parts = load_lists("parts")
    words = [rng.choice(parts["body"]), rng.choice(parts[label])]
    if rng.random() < 0.5:
        words.insert(0, rng.choice(parts["side"]))
    return " ".join(words)


def _choose_form(concept: Concept, profile: SiteProfile, rng: random.Random) -> tuple[str, bool]:
    """Return a form of the concept and whether it is a short one; forms it lacks fall to the preferred one."""
    forms = ((concept.preferred,), concept.others, concept.short)
    kind = rng.choices(range(3), profile.habits.forms)[0]
    return (rng.choice(forms[kind]), kind == 2) if forms[kind] else (concept.preferred, False)


def _set_case(text: str, profile: SiteProfile, *, is_short: bool) -> tuple[str, ...]:
    case = profile.habits.case
    if is_short and case != "lower":
        return tuple(text.upper().split())
    if case == "title":
        return tuple(word.capitalize() for word in text.split())
    return tuple(text.split())
