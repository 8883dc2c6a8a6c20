"""Findings on notes that nobody need have annotated, as JSON lines; the notes' words stay out of them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mailboat.files import making
from mailboat.modelling import load_folder
from shared.config import ComputeSection, FederationConfig
from shared.errors import ConfigError, RefusedError

if TYPE_CHECKING:
    from edge_client.data import AnyNote
    from edge_client.model import LoadedModel

NOTES_AT_ONCE = 64
"""Notes that are in memory at a time."""

Told = Callable[[int], None]
"""Called with the number of notes done."""


@dataclass(frozen=True, slots=True)
class Predicted:
    """How many notes there were, and how many were left out as unreadable."""

    notes: int
    skipped: int


def predict(
    model: Path,
    federation: FederationConfig,
    notes: Path,
    out: Path,
    *,
    compute: ComputeSection,
    skip_bad: bool,
    told: Told,
) -> Predicted:
    """Write what the model in the folder `model` finds in the notes under `notes` to the new file `out`.

    One line a note: its id and the findings of the federation's task. The file appears when all notes are done,
    readable by this user alone. Raises ConfigError when `out` is there, or the model cannot be loaded; RefusedError as
    the task's `read_bare`, for the first bad note unless `skip_bad`, and when two notes have one id.
    """
    if out.exists():
        raise ConfigError(f"{out} is there already", hint="name a new file, or move it away")
    loaded = load_folder(model, federation, compute)
    found = _Notes(notes, loaded.task.read_bare(notes), skip_bad=skip_bad)
    part = out.with_name(f".{out.name}.part")
    with making(out):
        file = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            with os.fdopen(file, "w", encoding="utf-8") as writer:
                for row in _rows(loaded, found, told):
                    writer.write(json.dumps(row, ensure_ascii=False) + "\n")
            part.rename(out)
        finally:
            part.unlink(missing_ok=True)
    return Predicted(found.count, found.skipped)


class _Notes:
    """The notes under a path, one by one; counts them, and those left out."""

    def __init__(self, path: Path, found: Iterator[AnyNote | RefusedError], *, skip_bad: bool) -> None:
        self.count = self.skipped = 0
        self._path = path
        self._found = found
        self._skip_bad = skip_bad
        self._seen: set[str] = set()

    def __iter__(self) -> Iterator[AnyNote]:
        for note in self._found:
            if isinstance(note, RefusedError):
                if not self._skip_bad:
                    raise note
                self.skipped += 1
                continue
            if note.id in self._seen:
                raise RefusedError(
                    f"{self._path}: two notes have the same id", rule="note-id", hint="give each an id of its own"
                )
            self._seen.add(note.id)
            self.count += 1
            yield note


def _rows(loaded: LoadedModel, found: _Notes, told: Told) -> Iterator[dict[str, Any]]:
    notes = iter(found)
    while several := list(islice(notes, NOTES_AT_ONCE)):
        for note, finding in zip(several, _findings(loaded, several), strict=True):
            yield {"id": note.id, **finding}
        told(found.count)


def _findings(loaded: LoadedModel, notes: Sequence[AnyNote]) -> Iterator[Any]:
    from edge_client.prefix_store import NOWHERE
    from edge_client.trainer import EVALUATION_BATCH, make_dataset
    from edge_client.trainer import predict as predict_units

    # No states are kept: every note is looked at once.
    data = make_dataset(loaded, notes, batch_size=EVALUATION_BATCH, seed=0, keep=NOWHERE)
    return loaded.task.findings(notes, predict_units(loaded, data))
