"""What came of a cell, and where it is kept: one JSON file for each, named by the digest of its settings.

A result is written whole, after its cell is finished, so a run that is killed loses only what was under way. Cells of
different experiments with the same settings are one result.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from mailboat.experiment.inputs import code_digest
from shared import durable
from shared.config import Section
from shared.errors import CorruptError

CELLS = "cells"
Measures = dict[str, float]


class Point(Section):
    """One scored version."""

    version: int
    at_s: float
    """Virtual seconds since the run began."""
    up: int
    """Bytes that all sites had sent by then."""
    down: int
    """Bytes that all sites had received by then."""
    scores: Measures


class Result(Section):
    """One finished cell."""

    settings_sha256: str
    code_sha256: str
    title: str
    """Experiment, base, name and seed under which it was first made; for people."""
    scores: Annotated[Measures, Field(min_length=1)]
    """On the held-out notes, the measure that models are compared by first."""
    labels: dict[str, Measures] = Field(default_factory=dict)
    curve: tuple[Point, ...] = ()
    """Scored versions, 0 first where it was scored."""
    versions: int
    up: int
    """Bytes on the wire, PUBLISH packets at the sites' links, all sites and versions."""
    down: int
    train_s: float
    """CPU seconds of one local training, on average."""
    trainings: int
    cpu_s: float
    """CPU seconds of the whole cell, scoring included."""
    clock_s: float = 0.0
    """Virtual seconds to the last version."""
    trained_parameters: int
    total_parameters: int
    sites: dict[str, Measures] = Field(default_factory=dict)
    """For `alone`: each site's own."""
    metrics: dict[str, Measures] = Field(default_factory=dict)
    """Each site's last words on its last update (loss, epsilon, ...)."""
    machine: str
    software: str
    device: str = "cpu"
    """Where it trained and scored; a GPU with its name. It rounds otherwise than a processor."""


class Cabinet:
    """The folder of results."""

    def __init__(self, root: Path) -> None:
        self._folder = root / CELLS

    def get(self, settings_sha256: str) -> Result | None:
        """Return what is kept for these settings, of whatever code; CorruptError when it is not what was written."""
        path = self._path(settings_sha256)
        try:
            return Result.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise CorruptError(
                f"{path}: field {'.'.join(map(str, first['loc']))}: {first['msg']}",
                hint="remove the file; its cell is run again",
            ) from None

    def put(self, result: Result) -> None:
        """Keep a result, durably, in place of an earlier one for the same settings."""
        durable.make_folder(self._folder)
        text = result.model_dump_json(indent=1, exclude_defaults=True)
        durable.replace_atomic(self._path(result.settings_sha256), f"{text}\n".encode())

    def _path(self, settings_sha256: str) -> Path:
        return self._folder / f"{settings_sha256[:24]}.json"


def is_current(result: Result) -> bool:
    """Whether it was made by the sources that are here now."""
    return result.code_sha256 == code_digest()
