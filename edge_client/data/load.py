"""Finding which format a path holds, and reading all of its notes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from types import MappingProxyType

from edge_client.data.conll import read_conll
from edge_client.data.i2b2 import read_i2b2
from edge_client.data.jsonl import read_jsonl
from edge_client.data.notes import Note
from shared.errors import RefusedError

_READERS = MappingProxyType({".conll": read_conll, ".bio": read_conll, ".jsonl": read_jsonl})
_LOOKED_FOR = "a folder with txt/NAME.txt and concept/NAME.con, or .conll, .bio or .jsonl files"


@dataclass(frozen=True, slots=True)
class NoteSet:
    """The notes of one path in the order of their names, and how many were left out as bad."""

    notes: tuple[Note, ...] = field(repr=False)
    skipped: int


def load_notes(path: Path, *, labels: Sequence[str], skip_bad: bool = False) -> NoteSet:
    """Return the notes under `path`, in whichever of the accepted formats its layout shows.

    `path` is a folder with `txt/` and `concept/` (i2b2 2010), a file ending in `.conll`, `.bio` or
    `.jsonl`, or a folder of such files. With `skip_bad` a note that cannot be read, or that has a
    label outside `labels`, is left out whole and counted: half of its labels would teach that the
    rest are none.

    Raises RefusedError, naming file and line and never quoting text, for the first bad note when
    `skip_bad` is false; when there is no note; when all notes are bad; when two have one id.
    """
    notes: list[Note] = []
    refusals: list[RefusedError] = []
    for outcome in _read_all(path, labels):
        if isinstance(outcome, Note):
            notes.append(outcome)
        elif skip_bad:
            refusals.append(outcome)
        else:
            raise outcome
    if not notes:
        raise refusals[0] if refusals else _nothing_found(path)
    _check_ids(notes, path)
    return NoteSet(tuple(notes), len(refusals))


def _read_all(path: Path, labels: Sequence[str]) -> Iterator[Note | RefusedError]:
    if (path / "txt").is_dir():
        return read_i2b2(path, labels)
    files = [path] if path.is_file() else sorted(path.glob("*")) if path.is_dir() else []
    known = [file for file in files if file.is_file() and file.suffix in _READERS]
    return chain.from_iterable(_READERS[file.suffix](file, labels) for file in known)


def _nothing_found(path: Path) -> RefusedError:
    state = "holds no notes" if path.exists() else "does not exist"
    return RefusedError(f"{path} {state}", rule="note-missing", hint=f"looked for {_LOOKED_FOR}")


def _check_ids(notes: Sequence[Note], path: Path) -> None:
    """Refuse two notes with one id: they may be one note twice, counted double in training."""
    if len({note.id for note in notes}) < len(notes):
        raise RefusedError(
            f"{path}: two notes have the same id",
            rule="note-id",
            hint="give each note an id of its own, or remove the copy",
        )
