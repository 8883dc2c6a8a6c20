"""The notes of a cell as folders: one for each site, one of all sites together, and those that it is scored on.

    site-1, site-2, ...   pooled   heldout   validation (where the coordinator has notes of its own)

Synthetic notes are written; real ones stay where they are, and links lead to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edge_client.tasks.registry import load_task
from mailboat.experiment.cells import POOLED, Stage, participants
from mailboat.experiment.spec import NotesSection
from mailboat.synth import SYNTHETIC, Synthetic, make_notes
from mailboat.synth.write import HELDOUT, VALIDATION
from shared.config import TaskSection
from shared.errors import ConfigError

__all__ = ["HELDOUT", "VALIDATION", "lay_out", "link_notes"]


def lay_out(stage: Stage, out: Path) -> None:
    """Make the folders of a stage's notes below `out`; ConfigError when they cannot be made so."""
    section, sites = stage.notes, participants(stage.notes)
    if section.folder is not None:
        link_notes(section.folder, sites, out)
        return
    made = _made_for(stage.federation.task)
    made.make(
        out,
        sites=section.sites,
        notes=section.notes,
        alpha=section.alpha,
        foreign=section.foreign,
        seed=stage.federation.federation.seed,
        heldout=section.heldout,
        tested=section.tested,
        validation=section.validation,
        **_cut(section, made, stage.federation.task.kind),
    )
    made.pool([out / name for name in sites], out / POOLED)


def _made_for(task: TaskSection) -> Synthetic:
    if task.kind not in SYNTHETIC:
        load_task(task)  # who misspelt the name is told those that are installed
        raise ConfigError(
            f"there are no synthetic notes for a task {task.kind}",
            hint=f"name notes that are there in notes.folder; they are made for {', '.join(SYNTHETIC)}",
        )
    return SYNTHETIC[task.kind]


def _cut(section: NotesSection, made: Synthetic, kind: str) -> dict[str, int]:
    if section.sections is None:
        return {}
    if made.make is not make_notes:
        raise ConfigError(
            f"notes.sections, and synthetic notes for a task {kind} are whole", hint="leave notes.sections out"
        )
    return {"sections": section.sections}


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
