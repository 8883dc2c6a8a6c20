"""A whole synthetic note: sections under their headers, lines with their slots filled."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType

from edge_client.data.notes import Entity, Note, Sentence
from mailboat.synth.lexicon import LABELS, SECTIONS
from mailboat.synth.mentions import draw_mention
from mailboat.synth.profiles import SiteProfile

# Least and greatest number of lines of each section.
LINES: Mapping[str, tuple[int, int]] = MappingProxyType(
    {"complaint": (1, 1), "history": (2, 4), "course": (3, 6), "data": (2, 3), "plan": (1, 3)}
)

_SLOT = re.compile(r"\{(\w+)\}")
_SERVICES = ("cardiology", "neurology", "surgery", "renal", "infectious disease", "oncology", "psychiatry", "urology")
_ROUTES = ("po daily", "po bid", "iv q8h", "po qhs", "daily", "tid prn", "iv once", "sc daily")


def _value(rng: random.Random) -> str:
    return rng.choice(
        (f"{rng.randint(1, 400)}", f"{rng.uniform(0.1, 15):.1f}", f"{rng.randint(80, 200)}/{rng.randint(40, 99)}")
    )


_FILLERS: Mapping[str, Callable[[random.Random], str]] = MappingProxyType(
    {
        "val": _value,
        "dose": lambda rng: f"{rng.choice((5, 10, 20, 25, 40, 50, 100, 250, 500))} mg {rng.choice(_ROUTES)}",
        "n": lambda rng: str(rng.randint(2, 14)),
        "age": lambda rng: str(rng.randint(21, 94)),
        "year": lambda rng: str(rng.randint(1988, 2009)),
        "date": lambda rng: f"{rng.randint(1, 12)}/{rng.randint(1, 28)}",
        "sex": lambda rng: rng.choice(("man", "woman", "gentleman", "lady")),
        "sx": lambda rng: rng.choice(("M", "F")),
        "service": lambda rng: rng.choice(_SERVICES),
    }
)


def draw_note(name: str, profile: SiteProfile, rng: random.Random, sections: int | None = None) -> Note:
    """Return one note of the site under the id `name`: all of its sections, or so many, whichever they are."""
    who = rng.choice(profile.habits.people)
    sentences: list[Sentence] = []
    headed = list(zip(SECTIONS, profile.habits.headers, strict=True))
    if sections is not None:
        headed = [headed[place] for place in sorted(rng.sample(range(len(headed)), sections))]
    for section, header in headed:
        sentences.append(Sentence(tuple(header.split()), ()))
        count = rng.randint(*LINES[section])
        sentences += [_fill(profile.lines[section].draw(rng), who, profile, rng) for _ in range(count)]
    return Note(name, tuple(sentences))


def _fill(text: str, who: str, profile: SiteProfile, rng: random.Random) -> Sentence:
    """Return the line `text` with a mention or other words in each slot."""
    tokens: list[str] = []
    entities: list[Entity] = []
    for word in text.split():
        slot = word[1:-1]
        label = rng.choices(LABELS, [profile.mix[one] for one in LABELS])[0] if slot == "any" else slot
        if label in LABELS:
            mention = draw_mention(label, profile, rng)
            entities.append(Entity(len(tokens), len(tokens) + len(mention), label))
            tokens += mention
        else:
            tokens += _SLOT.sub(lambda found: who if found[1] == "who" else _FILLERS[found[1]](rng), word).split()
    if profile.habits.case == "sentence":
        tokens[0] = tokens[0][0].upper() + tokens[0][1:]
    return Sentence(tuple(tokens), tuple(entities))
