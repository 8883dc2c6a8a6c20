"""The notes of a cell as folders: one for each site, one of all sites together, and those that it is scored on.

    site-1, site-2, ...   pooled   heldout   validation (where the coordinator has notes of its own)

Synthetic notes are written; real ones stay where they are, and links lead to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mailboat.demo.tasks import find_task
from mailboat.experiment.cells import POOLED, Stage, participants
from mailboat.experiment.spec import NotesSection
from mailboat.synth.write import HELDOUT
from mailboat.validating import NAME as VALIDATION
from shared.errors import ConfigError

__all__ = ["HELDOUT", "VALIDATION", "lay_out", "link_notes"]


def lay_out(stage: Stage, out: Path) -> None:
    """Make the folders of a stage's notes below `out`; ConfigError when they cannot be made so."""
    section, sites = stage.notes, participants(stage.notes)
    if section.folder is not None:
        link_notes(section.folder, sites, out)
        return
    task = find_task(stage.federation.task.kind)
    task.make(
        out,
        sites=section.sites,
        notes=section.notes,
        alpha=section.alpha,
        foreign=section.foreign,
        seed=stage.federation.federation.seed,
        heldout=section.heldout + section.validation,
        tested=section.tested,
        **_cut(section, stage.federation.task.kind),
    )
    task.pool([out / name for name in sites], out / POOLED)
    if section.validation:
        _set_apart(out / HELDOUT, section.heldout, out / VALIDATION)


def _cut(section: NotesSection, kind: str) -> dict[str, int]:
    if section.sections is None:
        return {}
    if kind != "ner":
        raise ConfigError(
            f"notes.sections, and synthetic notes for a task {kind} are whole", hint="leave notes.sections out"
        )
    return {"sections": section.sections}


def _set_apart(folder: Path, keep: int, out: Path) -> None:
    """Move all but the first `keep` notes of a folder to another; a note is the files of one stem."""
    stems = sorted({path.stem for path in folder.rglob("*") if path.is_file()})
    if len(stems) <= keep:
        raise ConfigError(
            "notes of the coordinator's own are made for tasks with a file a note alone",
            hint="leave notes.validation out, or name a folder of notes that has them",
        )
    for path in [path for path in folder.rglob("*") if path.is_file() and path.stem in set(stems[keep:])]:
        place = out / path.relative_to(folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        path.rename(place)


def link_notes(folder: Path, sites: Sequence[str], out: Path) -> None:
    """Lay links to the notes below `folder` into `out`; those for validation may be missing.

    ConfigError names a folder that is missing, and a name that two sites gave to a file.
    """
    for name in (*sites, HELDOUT, VALIDATION):
        source = (folder / name).absolute()
        if not source.is_dir() and name != VALIDATION:
            raise ConfigError(f"{source}: no such folder", hint="notes.folder holds site-1, site-2, ... and heldout")
        for path in sorted(source.rglob("*")):
            if path.is_file():
                for place in (name, POOLED) if name in sites else (name,):
                    _link(path, out / place / path.relative_to(source))


def _link(path: Path, link: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    try:
        link.symlink_to(path)
    except FileExistsError:
        raise ConfigError(
            f"{path}: another site has a file of this name", hint="give the notes of each site names of their own"
        ) from None
