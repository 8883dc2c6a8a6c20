"""Which synthetic notes there are for which task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from mailboat.synth.lexicon import LABELS
from mailboat.synth.stays import load_codes, make_stays, pool_stays
from mailboat.synth.write import SynthReport, make_notes, pool_notes
from shared.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Synthetic:
    """One kind of synthetic notes."""

    labels: tuple[str, ...]
    """All that they are marked or coded with: the task's labels."""
    make: Callable[..., SynthReport]
    """Writes the notes; the arguments of `make_notes`, of which stays have no `sections`."""
    pool: Callable[[Sequence[Path], Path], None]
    """Writes the notes of several folders into one."""


_MARKED = Synthetic(LABELS, make_notes, pool_notes)
_CODED = Synthetic(tuple(load_codes()), make_stays, pool_stays)

SYNTHETIC: Mapping[str, Synthetic] = MappingProxyType(
    {"ner": _MARKED, "extraction": _MARKED, "classification": _CODED, "multilabel": _CODED}
)
"""By the name of the task."""


def find_synthetic(task: str) -> Synthetic:
    """Return the notes for this task; ConfigError lists the tasks that there are some for."""
    if task not in SYNTHETIC:
        raise ConfigError(f"there are no synthetic notes for a task {task}", hint=f"take one of {', '.join(SYNTHETIC)}")
    return SYNTHETIC[task]
