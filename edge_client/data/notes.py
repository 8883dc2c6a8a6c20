"""What a note is once it has been read: tokens by line, the entities marked in them, and what is said of these."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol


class AnyNote(Protocol):
    """What every kind of note has, whatever the task."""

    @property
    def id(self) -> str:
        """Unique in its folder."""
        ...

    @property
    def patient(self) -> str:
        """Whom it is about; the notes of one patient are never divided between training and testing."""
        ...


@dataclass(frozen=True, slots=True)
class TextNote:
    """A note as running text, with what is said of it as a whole.

    Text and patient are left out of `repr`, so that a note that lands in a log by mistake shows its shape.
    """

    id: str
    patient: str = field(repr=False)
    text: str = field(repr=False)
    labels: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Entity:
    """A labelled run of tokens in one sentence.

    `start` and `end` are token offsets in that sentence, counted from 0, `end` exclusive.
    """

    start: int
    end: int
    label: str


@dataclass(frozen=True, slots=True)
class Sentence:
    """One line of a note, split at white space, with its entities in order of `start`.

    Entities of one sentence do not overlap. The tokens are left out of `repr`, so that a note that
    lands in a log or a traceback by mistake shows its shape and not its text.
    """

    tokens: tuple[str, ...] = field(repr=False)
    entities: tuple[Entity, ...]


@dataclass(frozen=True, slots=True)
class Note:
    """One clinical note: its sentences in reading order under an id unique in its folder."""

    id: str
    sentences: tuple[Sentence, ...]

    @property
    def patient(self) -> str:
        """The note's own id: these formats do not say whose notes belong together."""
        return self.id


@dataclass(frozen=True, slots=True)
class HeadedLine:
    """A line of a note as seen from one of its entities, the head.

    The entities of `sentence` are those that the head stands in a relation to, under the relation's name, and the head
    itself, where it has a modifier, under that.
    """

    line: int
    """Its number in the note, from 1."""
    head: Entity
    sentence: Sentence


@dataclass(frozen=True, slots=True)
class HeadedNote:
    """A clinical note as what is said of each of its entities, in reading order."""

    id: str
    heads: tuple[HeadedLine, ...]

    @property
    def patient(self) -> str:
        """The note's own id, as of `Note`."""
        return self.id
