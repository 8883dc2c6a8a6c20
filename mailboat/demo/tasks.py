"""What the demonstration can learn: for each task its notes, and the settings that were found by trying."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from mailboat.demo import defaults
from mailboat.synth import SynthReport, load_codes, make_notes, make_stays, pool_stays
from shared.config import TaskSection
from shared.durable import storage_errors
from shared.errors import ConfigError


@dataclass(frozen=True, slots=True)
class DemoTask:
    """One task on synthetic notes."""

    section: TaskSection
    make: Callable[..., SynthReport]
    """Writes the notes; the arguments of `make_notes`."""
    pool: Callable[[Sequence[Path], Path], None]
    """Writes the notes of several folders into one."""
    lr: float
    """The sites' peak learning rate for the shipped model."""
    batch_size: int
    baseline_epochs: int
    """Epochs of a baseline, one training with one rise and fall of the rate."""
    baseline_lr: float
    """Share of `lr` that suits such a training."""


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


def _on_stays(kind: str) -> DemoTask:
    section = TaskSection(kind=kind, labels=tuple(load_codes()), max_length=defaults.STAY_LENGTH)
    return DemoTask(
        section=section,
        make=make_stays,
        pool=pool_stays,
        lr=defaults.STAY_LR,
        batch_size=defaults.STAY_BATCH_SIZE,
        baseline_epochs=defaults.STAY_BASELINE_EPOCHS,
        baseline_lr=defaults.STAY_BASELINE_LR,
    )


TASKS: Mapping[str, DemoTask] = MappingProxyType(
    {
        "ner": DemoTask(
            section=TaskSection(max_length=defaults.MAX_LENGTH),
            make=make_notes,
            pool=pool_notes,
            lr=defaults.LR,
            batch_size=defaults.BATCH_SIZE,
            baseline_epochs=defaults.BASELINE_EPOCHS,
            baseline_lr=defaults.BASELINE_LR,
        ),
        "classification": _on_stays("classification"),
        "multilabel": _on_stays("multilabel"),
    }
)


def find_task(name: str) -> DemoTask:
    """Return the task of this name; ConfigError lists the known ones."""
    if name not in TASKS:
        raise ConfigError(f"there are no synthetic notes for a task {name}", hint=f"take one of {', '.join(TASKS)}")
    return TASKS[name]
