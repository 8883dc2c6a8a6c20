"""Writing notes in the i2b2/VA 2010 layout, and the whole of a synthetic federation."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

from edge_client.data.notes import Note
from mailboat.synth.lexicon import LABELS, SECTIONS
from mailboat.synth.notes import draw_note
from mailboat.synth.profiles import FOREIGN_WEIGHT, make_profiles
from shared.durable import storage_errors
from shared.errors import ConfigError

HELDOUT = "heldout"
VALIDATION = "validation"
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class FolderReport:
    """What was written into one folder; `labels` counts the marked entities, or the codes of stays, by label."""

    notes: int
    tokens: int
    labels: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class SynthReport:
    """What was written under `out`: folders `site-1` to `site-{sites}`, `heldout`, and `validation` if asked for."""

    out: Path
    folders: Mapping[str, FolderReport]


def make_notes(  # noqa: PLR0913 - what can be chosen of notes, all but the folder by name
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
    sections: int | None = None,
) -> SynthReport:
    """Write `notes` synthetic notes for each of `sites` sites and `heldout` more, drawn from all sites in turn.

    `notes` may give each site a number of its own, 0 for none; `tested` are the numbers of the sites, from 1, that the
    held-out notes are drawn from, all when empty; `foreign` as in `make_profiles`; `validation` further notes are drawn
    as those held out, into a folder of their own; with `sections` the sites' notes, not those held out, have so many
    sections each.

    The same arguments write the same bytes. Raises ConfigError for a count below 1, an `alpha` that is not above
    0, or an `out` that already holds something: notes of an earlier call would mix with the new ones.
    """
    counts = check_request(out, sites=sites, notes=notes, alpha=alpha, heldout=heldout, tested=tested)
    if sections is not None and not 1 <= sections <= len(SECTIONS):
        raise ConfigError(f"a note of {sections} sections", hint=f"give a whole number from 1 to {len(SECTIONS)}")
    profiles = make_profiles(sites=sites, alpha=alpha, seed=seed, foreign=foreign)
    folders = {}
    for profile, count in zip(profiles, counts, strict=True):
        names = [f"{profile.name}-{number:05d}" for number in range(1, count + 1)]
        drawn = (draw_note(name, profile, random.Random(f"{seed}/{name}"), sections) for name in names)
        folders[profile.name] = write_i2b2(out / profile.name, drawn)
    writers = in_turn(profiles, tested)
    names = [f"{HELDOUT}-{number:05d}" for number in range(1, heldout + validation + 1)]
    mixture = (
        draw_note(name, writers[index % len(writers)], random.Random(f"{seed}/{name}"))
        for index, name in enumerate(names)
    )
    folders[HELDOUT] = write_i2b2(out / HELDOUT, islice(mixture, heldout))
    if validation:
        folders[VALIDATION] = write_i2b2(out / VALIDATION, mixture)
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


def pool_notes(folders: Sequence[Path], out: Path) -> None:
    """Copy the notes of several folders of `make_notes` into one; their names differ, so none is lost.

    UnavailableError when the disk is full, which `shutil.copytree` tells of each file by itself, and by no number.
    """
    for folder in folders:
        for source in sorted(path for path in folder.rglob("*") if path.is_file()):
            target = out / source.relative_to(folder)
            with storage_errors(out):
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)


def _concept_lines(note: Note) -> Iterable[str]:
    for row, sentence in enumerate(note.sentences, start=1):
        for entity in sentence.entities:
            # The challenge gives the words in lower case, with single blanks.
            words = " ".join(sentence.tokens[entity.start : entity.end]).lower()
            yield f'c="{words}" {row}:{entity.start} {row}:{entity.end - 1}||t="{entity.label}"\n'


def in_turn(of_sites: Sequence[T], tested: Sequence[int]) -> Sequence[T]:
    """Return what belongs to the sites numbered `tested`, from 1; to all when it is empty."""
    return [of_sites[number - 1] for number in tested] or of_sites


def check_request(
    out: Path, *, sites: int, notes: int | Sequence[int], alpha: float, heldout: int, tested: Sequence[int]
) -> tuple[int, ...]:
    """Return the number of notes of each site.

    Raise ConfigError for counts below 1, an alpha that is not above 0, sites that there are not, and a folder that
    holds something.
    """
    counts = (notes,) * max(0, sites) if isinstance(notes, int) else tuple(notes)
    least = min(counts, default=0) if isinstance(notes, int) else max(counts, default=0)
    for name, value in (("sites", sites), ("notes", least), ("held-out notes", heldout)):
        if value < 1:
            raise ConfigError(f"the number of {name} is {value}", hint="give a whole number of at least 1")
    if len(counts) != sites:
        raise ConfigError(f"notes are counted for {len(counts)} of {sites} sites", hint="give each site its number")
    if min(counts) < 0:
        raise ConfigError(f"the number of notes is {min(counts)}", hint="give a site without notes a 0")
    if not set(tested) <= set(range(1, sites + 1)):
        raise ConfigError(f"held-out notes of a site that there is not: {max(tested)}", hint=f"sites are 1 to {sites}")
    if not alpha > 0:
        raise ConfigError(f"alpha is {alpha:g}", hint="give a number above 0; 0.1 is very skewed, 100 is even")
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty", hint="name a new folder, or remove the old one first")
    return counts
