"""Synthetic hospital stays in the layout of MIMIC-III: discharge summaries, and the codes of what they name."""

from __future__ import annotations

import csv
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate, islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

from edge_client.data.mimic import CODES, NOTES
from mailboat.synth.lexicon import Concept, load_concepts, load_lists
from mailboat.synth.mentions import write_concept
from mailboat.synth.notes import draw_note
from mailboat.synth.profiles import FOREIGN_WEIGHT, SiteProfile, Weighted, make_profiles
from mailboat.synth.write import HELDOUT, VALIDATION, FolderReport, SynthReport, check_request, in_turn

CODED = 0.5
"""Share of the problems named in a summary that bear one of the stay's codes; the others have none."""
MOST_CODES = 4
DIAGNOSES = "Discharge Diagnosis :"
NOTE_COLUMNS = (
    *("ROW_ID", "SUBJECT_ID", "HADM_ID", "CHARTDATE", "CHARTTIME", "STORETIME"),
    *("CATEGORY", "DESCRIPTION", "CGID", "ISERROR", "TEXT"),
)
CODE_COLUMNS = ("ROW_ID", "SUBJECT_ID", "HADM_ID", "SEQ_NUM", "ICD9_CODE")
STAYS_OF_A_FOLDER = 1_000_000
"""Ids of one folder's stays and patients begin at a multiple of this, so that pooled folders have no id twice."""


@cache
def load_codes() -> Mapping[str, tuple[str, ...]]:
    """Return the ICD-9 codes, each with the preferred forms of its concepts."""
    return load_lists("icd9")


@dataclass(frozen=True, slots=True)
class Stay:
    """One discharge summary, the codes of the stay (the primary diagnosis first), and a nurse's line beside it."""

    text: str
    aside: str
    codes: tuple[str, ...]


def make_stays(  # noqa: PLR0913 - as `make_notes`
    out: Path,
    *,
    sites: int,
    notes: int | Sequence[int],
    alpha: float,
    seed: int,
    heldout: int = 100,
    foreign: float = FOREIGN_WEIGHT,
    tested: Sequence[int] = (),
    validation: int = 0,
) -> SynthReport:
    """Write `notes` synthetic stays for each of `sites` sites and `heldout` more, drawn from all sites in turn.

    Each site's shares of the codes are drawn from a Dirichlet distribution with concentration `alpha`. The arguments
    are those of `make_notes`, the same ones write the same bytes, and it raises ConfigError as that does.
    """
    counts = check_request(out, sites=sites, notes=notes, alpha=alpha, heldout=heldout, tested=tested)
    profiles = make_profiles(sites=sites, alpha=alpha, seed=seed, foreign=foreign)
    writers = [(profile, _draw_shares(random.Random(f"{seed}/codes/{profile.name}"), alpha)) for profile in profiles]
    folders = {}
    for place, ((profile, shares), count) in enumerate(zip(writers, counts, strict=True), start=1):
        drawn = (
            draw_stay(profile, shares, random.Random(f"{seed}/{profile.name}/{number}")) for number in range(count)
        )
        folders[profile.name] = write_stays(out / profile.name, drawn, place)
    chosen = in_turn(writers, tested)
    mixture = (
        draw_stay(*chosen[number % len(chosen)], random.Random(f"{seed}/{HELDOUT}/{number}"))
        for number in range(heldout + validation)
    )
    folders[HELDOUT] = write_stays(out / HELDOUT, islice(mixture, heldout), sites + 1)
    if validation:
        folders[VALIDATION] = write_stays(out / VALIDATION, mixture, sites + 2)
    return SynthReport(out, MappingProxyType(folders))


def draw_stay(profile: SiteProfile, shares: Sequence[float], rng: random.Random) -> Stay:
    """Return one stay of the site; `shares` weigh the codes in the order of `load_codes`.

    What has a code is named, in the site's own words, if the stay has that code, and never otherwise. The primary
    diagnosis is the only coded one in the first section, and all are listed at the end.
    """
    codes = _draw_codes(shares, rng)
    primary, rest = (_restricted(profile, given) for given in (codes[:1], codes))
    first = draw_note("", primary, rng).sentences
    others = draw_note("", rest, rng).sentences
    header = profile.habits.headers[1].split()
    begin, end = (next(n for n, line in enumerate(lines) if list(line.tokens) == header) for lines in (first, others))
    lines = [" ".join(line.tokens) for line in (*first[:begin], *others[end:])]
    lines.append(DIAGNOSES)
    lines += [" ".join(write_concept(rng.choice(_concepts(code)), "problem", profile, rng)) for code in codes]
    return Stay(
        "\n".join(lines), rng.choice(("slept well", "up in chair", "family visited", "ate half of lunch")), codes
    )


def write_stays(folder: Path, stays: Iterable[Stay], number: int) -> FolderReport:
    """Write NOTEEVENTS.csv and DIAGNOSES_ICD.csv into `folder`; its ids begin at `number` times a million."""
    folder.mkdir(parents=True, exist_ok=True)
    counts = Counter(dict.fromkeys(load_codes(), 0))
    written = words = 0
    with (
        (folder / NOTES).open("w", encoding="utf-8", newline="") as notes,
        (folder / CODES).open("w", encoding="utf-8", newline="") as codes,
    ):
        note_rows, code_rows = (_Rows(notes, NOTE_COLUMNS, number), _Rows(codes, CODE_COLUMNS, number))
        for written, stay in enumerate(stays, start=1):
            whose = {"SUBJECT_ID": number * STAYS_OF_A_FOLDER + (written + 1) // 2}
            whose["HADM_ID"] = number * STAYS_OF_A_FOLDER + written
            note_rows.add(**whose, CATEGORY="Nursing", DESCRIPTION="Report", TEXT=stay.aside)
            note_rows.add(**whose, CATEGORY="Discharge summary", DESCRIPTION="Report", TEXT=stay.text)
            for priority, code in enumerate(stay.codes, start=1):
                code_rows.add(**whose, SEQ_NUM=priority, ICD9_CODE=code)
            counts.update(stay.codes)
            words += len(stay.text.split())
    return FolderReport(written, words, MappingProxyType(dict(counts)))


def pool_stays(folders: Sequence[Path], out: Path) -> None:
    """Write the stays of several folders of `make_stays` into one."""
    out.mkdir(parents=True, exist_ok=True)
    for name in (NOTES, CODES):
        parts = [(folder / name).read_bytes().split(b"\n", 1) for folder in folders]
        (out / name).write_bytes(b"\n".join([parts[0][0], b"".join(rows for _, rows in parts)]))


class _Rows:
    """A CSV file with every text quoted, as MIMIC-III is distributed."""

    def __init__(self, file: Any, columns: Sequence[str], number: int) -> None:
        self._writer = csv.DictWriter(file, columns, restval="", quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
        self._writer.writeheader()
        self._row = number * STAYS_OF_A_FOLDER

    def add(self, **values: object) -> None:
        self._row += 1
        self._writer.writerow({"ROW_ID": self._row, **values})


def _concepts(code: str) -> list[Concept]:
    return [concept for concept in load_concepts()["problem"] if concept.preferred in load_codes()[code]]


def _draw_shares(rng: random.Random, alpha: float) -> tuple[float, ...]:
    draws = [max(rng.gammavariate(alpha, 1.0), 1e-9) for _ in load_codes()]
    return tuple(draw / sum(draws) for draw in draws)


def _draw_codes(shares: Sequence[float], rng: random.Random) -> tuple[str, ...]:
    """One to four codes, distinct, in the order in which they were drawn."""
    names, left, found = list(load_codes()), list(shares), []
    for _ in range(rng.randint(1, MOST_CODES)):
        place = rng.choices(range(len(names)), left)[0]
        found.append(names.pop(place))
        left.pop(place)
    return tuple(found)


def _restricted(profile: SiteProfile, codes: Sequence[str]) -> SiteProfile:
    """The site as it writes of a patient with these codes: no other problem that has a code is named."""
    problems = profile.concepts["problem"]
    coded = {form for forms in load_codes().values() for form in forms}
    before = (0.0, *problems.cumulative[:-1])
    weights = [after - until for after, until in zip(problems.cumulative, before, strict=True)]
    pairs = zip(problems.items, weights, strict=True)
    free = [(concept, weight) for concept, weight in pairs if concept.preferred not in coded]
    own = [concept for code in codes for concept in _concepts(code)]
    whole = sum(weight for _, weight in free)
    mixed = [(concept, (1 - CODED) * weight / whole) for concept, weight in free]
    mixed += [(concept, CODED / len(own)) for concept in own]
    drawn = Weighted(tuple(concept for concept, _ in mixed), tuple(accumulate(weight for _, weight in mixed)))
    return replace(profile, concepts={**profile.concepts, "problem": drawn})
