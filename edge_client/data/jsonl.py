"""Reader of JSON lines: one note on each line.

    {"id": "a", "sentences": [{"tokens": ["No", "fever"],
                               "entities": [{"start": 1, "end": 2, "label": "problem"}]}]}

Offsets count tokens from 0, `end` is exclusive. Every key shown is required, so that a misspelt
`entities` cannot pass for a sentence without any; further keys are left alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, TypeAlias

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from edge_client.data.checks import Where, build_sentence, check_label, read_lines
from edge_client.data.notes import Entity, Note
from shared.errors import RefusedError

_Word: TypeAlias = Annotated[str, StringConstraints(min_length=1)]


class _EntityRow(BaseModel):
    model_config = ConfigDict(strict=True)
    start: int
    end: int
    label: str


class _SentenceRow(BaseModel):
    model_config = ConfigDict(strict=True)
    tokens: list[_Word]
    entities: list[_EntityRow]


class _NoteRow(BaseModel):
    model_config = ConfigDict(strict=True)
    id: _Word
    sentences: list[_SentenceRow]


def read_jsonl(path: Path, labels: Sequence[str]) -> Iterator[Note | RefusedError]:
    """Yield the note of each line that is not blank, or why it is refused."""
    for number, line in enumerate(read_lines(path), start=1):
        if line.strip():
            try:
                yield _read_note(line, labels, Where(path, number))
            except RefusedError as refused:
                yield refused


def _read_note(line: str, labels: Sequence[str], where: Where) -> Note:
    try:
        row = _NoteRow.model_validate_json(line)
    except ValidationError as error:
        # Not chained: the original quotes the line, and tracebacks end in logs.
        fault = error.errors(include_input=False, include_url=False)[0]
        field = ".".join(str(part) for part in fault["loc"]) or "the line"
        raise where.refuse(
            f"not a note: {field} is wrong ({fault['type']})",
            hint='expected {"id", "sentences": [{"tokens", "entities": [{"start", "end", "label"}]}]}',
        ) from None
    sentences = []
    for sentence in row.sentences:
        marked = [
            (Entity(entity.start, entity.end, check_label(entity.label, labels, where)), where)
            for entity in sentence.entities
        ]
        sentences.append(build_sentence(sentence.tokens, marked, where))
    return Note(row.id, tuple(sentences))
