"""What the demonstration can learn: for each task its notes, and the settings that were found by trying."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from mailboat.demo import defaults
from mailboat.synth import SYNTHETIC, Synthetic
from shared.config import TaskSection
from shared.errors import ConfigError


@dataclass(frozen=True, slots=True)
class DemoTask:
    """One task on synthetic notes."""

    section: TaskSection
    notes: Synthetic
    lr: float
    """The sites' peak learning rate for the shipped model."""
    batch_size: int
    baseline_epochs: int
    """Epochs of a baseline, one training with one rise and fall of the rate."""
    baseline_lr: float
    """Share of `lr` that suits such a training."""


def _on_stays(kind: str) -> DemoTask:
    notes = SYNTHETIC[kind]
    return DemoTask(
        section=TaskSection(kind=kind, labels=notes.labels, max_length=defaults.STAY_LENGTH),
        notes=notes,
        lr=defaults.STAY_LR,
        batch_size=defaults.STAY_BATCH_SIZE,
        baseline_epochs=defaults.STAY_BASELINE_EPOCHS,
        baseline_lr=defaults.STAY_BASELINE_LR,
    )


TASKS: Mapping[str, DemoTask] = MappingProxyType(
    {
        "ner": DemoTask(
            section=TaskSection(max_length=defaults.MAX_LENGTH),
            notes=SYNTHETIC["ner"],
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
        raise ConfigError(f"the demonstration has no task {name}", hint=f"take one of {', '.join(TASKS)}")
    return TASKS[name]
