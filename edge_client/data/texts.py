"""Readers of notes that have labels as a whole: JSON lines, and MIMIC-III as distributed.

    {"id": "a", "text": "Chest pain since ...", "label": "chest-pain"}               one label each
    {"id": "a", "text": "Chest pain since ...", "labels": ["4019", "4280"]}          any number of them

Every key shown is required; `patient`, which names whose note it is, may be added, and further keys are left alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from edge_client.data.checks import Where, check_label, read_lines
from edge_client.data.load import read_files
from edge_client.data.mimic import is_mimic, read_mimic
from edge_client.data.notes import TextNote
from shared.errors import RefusedError

_Word = Annotated[str, StringConstraints(min_length=1)]
_MIMIC = "a folder with NOTEEVENTS.csv and DIAGNOSES_ICD.csv (or .csv.gz)"
ONE_LABEL_FORMATS = f"{_MIMIC}, or .jsonl files of notes with a label"
ANY_LABELS_FORMATS = f"{_MIMIC}, or .jsonl files of notes with labels"


class _Row(BaseModel):
    model_config = ConfigDict(strict=True)
    id: _Word
    text: Annotated[str, StringConstraints(pattern=r"\S")]
    patient: _Word | None = None


class _OneRow(_Row):
    label: str


class _AnyRow(_Row):
    labels: list[str]


_R = TypeVar("_R", _OneRow, _AnyRow)


def read_one_label(path: Path, labels: Sequence[str]) -> Iterator[TextNote | RefusedError]:
    """Yield the notes under `path` with the one label of each; in MIMIC-III that is the primary diagnosis."""
    if is_mimic(path):
        return read_mimic(path, labels, primary=True)
    return read_files(path, labels, MappingProxyType({".jsonl": _read_one}))


def read_any_labels(path: Path, labels: Sequence[str]) -> Iterator[TextNote | RefusedError]:
    """Yield the notes under `path` with all labels of each; in MIMIC-III these are the codes of the hospital stay."""
    if is_mimic(path):
        return read_mimic(path, labels, primary=False)
    return read_files(path, labels, MappingProxyType({".jsonl": _read_any}))


def _read_one(path: Path, labels: Sequence[str]) -> Iterator[TextNote | RefusedError]:
    for where, row in _rows(path, _OneRow, '{"id", "text", "label"}'):
        yield row if isinstance(row, RefusedError) else _note(row, [row.label], labels, where)


def _read_any(path: Path, labels: Sequence[str]) -> Iterator[TextNote | RefusedError]:
    for where, row in _rows(path, _AnyRow, '{"id", "text", "labels": [...]}'):
        yield row if isinstance(row, RefusedError) else _note(row, row.labels, labels, where)


def _rows(path: Path, model: type[_R], expected: str) -> Iterator[tuple[Where, _R | RefusedError]]:
    """Each line that is not blank, or why it is refused."""
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        where = Where(path, number)
        try:
            yield where, model.model_validate_json(line)
        except ValidationError as error:
            fault = error.errors(include_input=False, include_url=False)[0]
            key = ".".join(str(part) for part in fault["loc"]) or "the line"
            yield where, where.refuse(f"not a note: {key} is wrong ({fault['type']})", hint=f"expected {expected}")


def _note(row: _Row, said: Sequence[str], labels: Sequence[str], where: Where) -> TextNote | RefusedError:
    try:
        checked = tuple(dict.fromkeys(check_label(label, labels, where) for label in said))
    except RefusedError as refused:
        return refused
    return TextNote(row.id, row.patient or row.id, row.text, checked)
