"""Reader of notes that nobody has annotated: text files, and JSON lines with `id` and `text`.

A text file is one note, under the name of the file without its ending. In JSON lines further keys are left alone, so
that files of notes with labels can be read as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from edge_client.data.checks import Where, read_lines
from edge_client.data.notes import TextNote
from shared.errors import RefusedError

PLAIN_FORMATS = '.txt files, a folder with txt/, or .jsonl files of {"id", "text"}'


class _Row(BaseModel):
    model_config = ConfigDict(strict=True)
    id: Annotated[str, StringConstraints(min_length=1)]
    text: str


def read_plain(path: Path) -> Iterator[TextNote | RefusedError]:
    """Yield the notes under `path`, a file or a folder, in order of the files' names, or why one is refused.

    RefusedError(rule='note-missing') when there are none. Ids are the caller's to check.
    """
    folder = path / "txt" if (path / "txt").is_dir() else path
    files = [path] if path.is_file() else sorted(folder.glob("*"))
    known = [file for file in files if file.is_file() and file.suffix in {".txt", ".jsonl"}]
    if not known:
        state = "holds no notes" if path.exists() else "does not exist"
        raise RefusedError(f"{path} {state}", rule="note-missing", hint=f"looked for {PLAIN_FORMATS}")
    for file in known:
        if file.suffix == ".txt":
            yield TextNote(file.stem, file.stem, "\n".join(read_lines(file)), ())
        else:
            yield from _rows(file)


def _rows(file: Path) -> Iterator[TextNote | RefusedError]:
    for number, line in enumerate(read_lines(file), start=1):
        if not line.strip():
            continue
        try:
            row = _Row.model_validate_json(line)
        except ValidationError as error:
            # Not chained: the original quotes the line, and tracebacks end in logs.
            fault = error.errors(include_input=False, include_url=False)[0]
            key = ".".join(str(part) for part in fault["loc"]) or "the line"
            said = f"not a note: {key} is wrong ({fault['type']})"
            yield Where(file, number).refuse(said, hint='expected {"id", "text"}')
        else:
            yield TextNote(row.id, row.id, row.text, ())
