"""Reading all notes of a path, in whatever formats the task reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Generic, Protocol, TypeAlias, TypeVar

from edge_client.data.conll import read_conll
from edge_client.data.i2b2 import read_i2b2
from edge_client.data.jsonl import read_jsonl
from edge_client.data.notes import AnyNote, Note
from shared.errors import RefusedError

N = TypeVar("N", bound=AnyNote)
N_co = TypeVar("N_co", bound=AnyNote, covariant=True)

FileReader: TypeAlias = Callable[[Path, Sequence[str]], Iterator[N | RefusedError]]
"""Reads one file; the second argument is the label set."""

_MARKED: Mapping[str, FileReader[Note]] = MappingProxyType(
    {".conll": read_conll, ".bio": read_conll, ".jsonl": read_jsonl}
)
MARKED_FORMATS = "a folder with txt/NAME.txt and concept/NAME.con, or .conll, .bio or .jsonl files"


class Reader(Protocol[N_co]):
    """Whoever knows the formats: a task."""

    @property
    def formats(self) -> str:
        """What `read` looks for, in words."""
        ...

    def read(self, path: Path) -> Iterator[N_co | RefusedError]:
        """Yield each note under `path`, or why it is refused."""
        ...


@dataclass(frozen=True, slots=True)
class NoteSet(Generic[N]):
    """The notes of one path in the order of their names, and how many were left out as bad."""

    notes: tuple[N, ...] = field(repr=False)
    skipped: int


def load_notes(path: Path, reader: Reader[N], *, skip_bad: bool = False) -> NoteSet[N]:
    """Return the notes under `path`, in whichever of the task's formats its layout shows.

    With `skip_bad` a note that cannot be read, or that has a label outside the label set, is left out whole and
    counted: half of its labels would teach that the rest are none.

    Raises RefusedError, naming file and line and never quoting text, for the first bad note when
    `skip_bad` is false; when there is no note; when all notes are bad; when two have one id.
    """
    notes: list[N] = []
    refusals: list[RefusedError] = []
    for outcome in reader.read(path):
        if not isinstance(outcome, RefusedError):
            notes.append(outcome)
        elif skip_bad:
            refusals.append(outcome)
        else:
            raise outcome
    if not notes:
        raise refusals[0] if refusals else _nothing_found(path, reader.formats)
    _check_ids(notes, path)
    return NoteSet(tuple(notes), len(refusals))


def read_marked(path: Path, labels: Sequence[str]) -> Iterator[Note | RefusedError]:
    """Yield the notes with marked entities under `path`.

    `path` is a folder with `txt/` and `concept/` (i2b2 2010), a file ending in `.conll`, `.bio` or `.jsonl`, or a
    folder of such files.
    """
    return read_i2b2(path, labels) if (path / "txt").is_dir() else read_files(path, labels, _MARKED)


def read_files(path: Path, labels: Sequence[str], readers: Mapping[str, FileReader[N]]) -> Iterator[N | RefusedError]:
    """Yield the notes of the file `path`, or of the files in that folder in order of their names.

    Each is read by its ending (with the dot); a file whose ending is not among `readers` is left alone.
    """
    files = [path] if path.is_file() else sorted(path.glob("*")) if path.is_dir() else []
    known = [file for file in files if file.is_file() and file.suffix in readers]
    return chain.from_iterable(readers[file.suffix](file, labels) for file in known)


def _nothing_found(path: Path, formats: str) -> RefusedError:
    state = "holds no notes" if path.exists() else "does not exist"
    return RefusedError(f"{path} {state}", rule="note-missing", hint=f"looked for {formats}")


def _check_ids(notes: Sequence[AnyNote], path: Path) -> None:
    """Refuse two notes with one id: they may be one note twice, counted double in training."""
    if len({note.id for note in notes}) < len(notes):
        raise RefusedError(
            f"{path}: two notes have the same id",
            rule="note-id",
            hint="give each note an id of its own, or remove the copy",
        )
