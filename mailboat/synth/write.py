"""Writing notes in the i2b2/VA 2010 layout, and the whole of a synthetic federation."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from edge_client.data.notes import Note
from mailboat.synth.lexicon import LABELS
from mailboat.synth.notes import draw_note
from mailboat.synth.profiles import make_profiles
from shared.errors import ConfigError

HELDOUT = "heldout"


@dataclass(frozen=True, slots=True)
class FolderReport:
    """What was written into one folder; `labels` counts the marked entities, or the codes of stays, by label."""

    notes: int
    tokens: int
    labels: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class SynthReport:
    """What `make_notes` wrote: the folders `site-1` to `site-{sites}` and `heldout` under `out`."""

    out: Path
    folders: Mapping[str, FolderReport]


def make_notes(out: Path, *, sites: int, notes: int, alpha: float, seed: int, heldout: int = 100) -> SynthReport:
    """Write `notes` synthetic notes for each of `sites` sites and `heldout` more, drawn from all sites in turn.

    The same arguments write the same bytes. Raises ConfigError for a count below 1, an `alpha` that is not above
    0, or an `out` that already holds something: notes of an earlier call would mix with the new ones.
    """
    check_request(out, sites=sites, notes=notes, alpha=alpha, heldout=heldout)
    profiles = make_profiles(sites=sites, alpha=alpha, seed=seed)
    folders = {}
    for profile in profiles:
        names = [f"{profile.name}-{number:05d}" for number in range(1, notes + 1)]
        drawn = (draw_note(name, profile, random.Random(f"{seed}/{name}")) for name in names)
        folders[profile.name] = write_i2b2(out / profile.name, drawn)
    names = [f"{HELDOUT}-{number:05d}" for number in range(1, heldout + 1)]
    mixture = (
        draw_note(name, profiles[index % sites], random.Random(f"{seed}/{name}")) for index, name in enumerate(names)
    )
    folders[HELDOUT] = write_i2b2(out / HELDOUT, mixture)
    return SynthReport(out, MappingProxyType(folders))


def write_i2b2(folder: Path, notes: Iterable[Note]) -> FolderReport:
    """Write each note as `txt/ID.txt` and `concept/ID.con` under `folder`, which is made if it is not there."""
    for name in ("txt", "concept"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    counts = Counter(dict.fromkeys(LABELS, 0))
    count = tokens = 0
    for note in notes:
        text = "".join(" ".join(sentence.tokens) + "\n" for sentence in note.sentences)
        (folder / "txt" / f"{note.id}.txt").write_text(text, encoding="utf-8")
        (folder / "concept" / f"{note.id}.con").write_text("".join(_concept_lines(note)), encoding="utf-8")
        counts.update(entity.label for sentence in note.sentences for entity in sentence.entities)
        tokens += sum(len(sentence.tokens) for sentence in note.sentences)
        count += 1
    return FolderReport(count, tokens, MappingProxyType(dict(counts)))


def _concept_lines(note: Note) -> Iterable[str]:
    for row, sentence in enumerate(note.sentences, start=1):
        for entity in sentence.entities:
            # The challenge gives the words in lower case, with single blanks.
            words = " ".join(sentence.tokens[entity.start : entity.end]).lower()
            yield f'c="{words}" {row}:{entity.start} {row}:{entity.end - 1}||t="{entity.label}"\n'


def check_request(out: Path, *, sites: int, notes: int, alpha: float, heldout: int) -> None:
    """Raise ConfigError for counts below 1, an alpha that is not above 0, and a folder that holds something."""
    for name, value in (("sites", sites), ("notes", notes), ("held-out notes", heldout)):
        if value < 1:
            raise ConfigError(f"the number of {name} is {value}", hint="give a whole number of at least 1")
    if not alpha > 0:
        raise ConfigError(f"alpha is {alpha:g}", hint="give a number above 0; 0.1 is very skewed, 100 is even")
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty", hint="name a new folder, or remove the old one first")
