"""What makes a site itself: its style, its part of the lexicon, its habits and its mix of labels."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from types import MappingProxyType
from typing import Generic, TypeVar

from mailboat.synth.lexicon import LABELS, SECTIONS, STYLES, Concept, load_concepts, load_lines

T = TypeVar("T")

# The share of each label's concepts that every site uses; the rest is dealt out, each concept to one site.
SHARED_CONCEPTS = 0.4
# How often a site writes one of the concepts dealt to another, against one of its own.
FOREIGN_WEIGHT = 0.1
# Within its own words a site draws by rank r with weight 1 / (r + 3)^ZIPF: few are frequent, many are rare.
ZIPF = 0.6
# The share of lines from the pool that all sites have in common, some of which fit any label.
COMMON_LINES = 0.25


@dataclass(frozen=True, slots=True)
class Weighted(Generic[T]):
    """Items to draw from, with cumulative weights as `random.choices` takes them."""

    items: tuple[T, ...]
    cumulative: tuple[float, ...]

    def draw(self, rng: random.Random) -> T:
        """Return one item."""
        return rng.choices(self.items, cum_weights=self.cumulative)[0]


@dataclass(frozen=True, slots=True)
class Habits:
    """How a style writes.

    `forms` weighs preferred, other and short forms; `case` is one of `sentence`, `short-upper`, `lower` and
    `title`; `people` are its words for the patient; `headers` stand over the sections, in their order.
    """

    forms: tuple[float, float, float]
    case: str
    people: tuple[str, ...]
    headers: tuple[str, ...]


HABITS: Mapping[str, Habits] = MappingProxyType(
    {
        "narrative": Habits(
            forms=(0.75, 0.20, 0.05),
            case="sentence",
            people=("the patient", "he", "she"),
            headers=(
                "Chief Complaint :",
                "History of Present Illness :",
                "Hospital Course :",
                "Pertinent Results :",
                "Discharge Plan :",
            ),
        ),
        "terse": Habits(
            forms=(0.40, 0.15, 0.45),
            case="short-upper",
            people=("pt",),
            headers=("CC", "HPI", "COURSE", "LABS / STUDIES", "DISPO"),
        ),
        "dictated": Habits(
            forms=(0.45, 0.50, 0.05),
            case="lower",
            people=("he", "she", "this patient"),
            headers=(
                "reason for admission",
                "narrative summary",
                "summary of stay",
                "laboratory and imaging",
                "recommendations",
            ),
        ),
        "checklist": Habits(
            forms=(0.55, 0.25, 0.20),
            case="title",
            people=("Pt", "Patient"),
            headers=(
                "== PRESENTING PROBLEM ==",
                "== BACKGROUND ==",
                "== EVENTS ==",
                "== INVESTIGATIONS ==",
                "== DISCHARGE INSTRUCTIONS ==",
            ),
        ),
    }
)


@dataclass(frozen=True, slots=True)
class SiteProfile:
    """Everything by which the notes of one site are drawn; `mix` holds the share of each label."""

    name: str
    habits: Habits
    mix: Mapping[str, float]
    concepts: Mapping[str, Weighted[Concept]]
    lines: Mapping[str, Weighted[str]]


def make_profiles(*, sites: int, alpha: float, seed: int, foreign: float = FOREIGN_WEIGHT) -> tuple[SiteProfile, ...]:
    """Return the profiles of `site-1` to `site-{sites}`.

    Sites take the styles in turn. `alpha` is the concentration of the symmetric Dirichlet distribution that each
    site's label mix is drawn from: small is skewed, large is even. `foreign`, 0 to 1, is how often a site writes one of
    the concepts dealt to another, against one of its own: with 0 sites share no more than the common ones.
    """
    deal = {label: _deal(concepts, label, sites, seed) for label, concepts in load_concepts().items()}
    profiles = []
    for index in range(sites):
        name = f"site-{index + 1}"
        rng = random.Random(f"{seed}/{name}")
        style = STYLES[index % len(STYLES)]
        mix = _draw_mix(rng, alpha)
        concepts = {label: _weigh_concepts(deal[label], index, rng, foreign) for label in LABELS}
        profiles.append(SiteProfile(name, HABITS[style], mix, concepts, _weigh_lines(style, mix)))
    return tuple(profiles)


def _deal(concepts: Sequence[Concept], label: str, sites: int, seed: int) -> list[tuple[Concept, int | None]]:
    """Return each concept with the index of the site it belongs to, None for those of all sites."""
    shuffled = random.Random(f"{seed}/deal/{label}").sample(concepts, len(concepts))
    shared = round(len(shuffled) * SHARED_CONCEPTS)
    return [(concept, None if n < shared else n % sites) for n, concept in enumerate(shuffled)]


def _draw_mix(rng: random.Random, alpha: float) -> Mapping[str, float]:
    # Gamma variates over their sum are Dirichlet. The least value keeps the sum above 0 for a tiny alpha.
    draws = [max(rng.gammavariate(alpha, 1.0), 1e-9) for _ in LABELS]
    return MappingProxyType({label: draw / sum(draws) for label, draw in zip(LABELS, draws, strict=True)})


def _weigh_concepts(
    deal: Sequence[tuple[Concept, int | None]], site: int, rng: random.Random, foreign: float
) -> Weighted[Concept]:
    ranked = rng.sample(deal, len(deal))
    weights = [
        (1.0 if owner in {site, None} else foreign) / (rank + 3) ** ZIPF for rank, (_, owner) in enumerate(ranked)
    ]
    return Weighted(tuple(concept for concept, _ in ranked), tuple(accumulate(weights)))


def _weigh_lines(style: str, mix: Mapping[str, float]) -> Mapping[str, Weighted[str]]:
    """Return the lines of each section, weighted so that mentions come in the site's label mix."""
    lines = {}
    for section in SECTIONS:
        pairs: list[tuple[str, float]] = []
        for pack, share in ((style, 1.0 - COMMON_LINES), ("common", COMMON_LINES)):
            templates = load_lines(f"style-{pack}")[section]
            raw = [_weigh_line(template, mix) for template in templates]
            pairs += [(template, share * weight / sum(raw)) for template, weight in zip(templates, raw, strict=True)]
        lines[section] = Weighted(tuple(pair[0] for pair in pairs), tuple(accumulate(pair[1] for pair in pairs)))
    return MappingProxyType(lines)


def _weigh_line(template: str, mix: Mapping[str, float]) -> float:
    """Return the mean share of the labels that the line's slots ask for; an open or empty line gets the mean."""
    shares = [mix[label] for label in LABELS for _ in range(template.count(f"{{{label}}}"))]
    return sum(shares) / len(shares) if shares else 1 / len(LABELS)
