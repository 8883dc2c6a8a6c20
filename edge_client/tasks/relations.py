"""Generative extraction of relations and modifiers: the model writes a line once more, with what it says of one entity.

A line is asked about once for each of its entities, the head, which is marked in the prompt. In the answer the entities
that the head stands in a relation to are marked with the relation's name, and the head itself with its modifier.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch

from edge_client.data import RELATION_FORMATS, Entity, HeadedLine, HeadedNote, Sentence, read_heads, read_relations
from edge_client.tasks import TEXT, Scores, Window
from edge_client.tasks.encoding import TextEncoder
from edge_client.tasks.markup import write_markup
from edge_client.tasks.ner import entity_scores
from edge_client.tasks.written import answer_loss, as_written, read_answers, written_windows
from shared.config import TaskSection
from shared.errors import RefusedError

HEAD_CLASS = "entity"
"""Class of the span around the head in a prompt."""


def make(section: TaskSection) -> RelationsTask:
    """Return the task for the federation's labels."""
    return RelationsTask(section.labels)


class RelationsTask:
    """Relations and modifiers of a closed set, written as mark-up. A unit, and an example, is a line and its head."""

    head = TEXT
    formats = RELATION_FORMATS
    classes: tuple[str, ...] = ()

    def __init__(self, labels: Sequence[str]) -> None:
        self.labels = tuple(labels)

    def read(self, path: Path) -> Iterator[HeadedNote | RefusedError]:
        """Yield the notes under `path` with what is said of their entities."""
        return read_relations(path, self.labels)

    def read_bare(self, path: Path) -> Iterator[HeadedNote | RefusedError]:
        """Yield the notes under `path` with their entities, which must be marked: each is a head."""
        return read_heads(path)

    def findings(self, notes: Sequence[HeadedNote], predictions: npt.NDArray[Any]) -> Iterator[Mapping[str, Any]]:
        """Yield each note's `relations`: line, the head's words, the words that are marked, and label.

        Lines count from 1, words from 0 to the one behind the last; a modifier's words are the head's.
        """
        found = iter(self._read(notes, predictions))
        for note in notes:
            told = [(headed, next(found)) for headed in note.heads]
            yield {
                "relations": [
                    {"line": headed.line, "head": _words(headed.head), **_words(entity), "label": entity.label}
                    for headed, entities in told
                    for entity in entities
                ]
            }

    def examples(self, notes: Sequence[HeadedNote]) -> int:
        """Return the number of entities."""
        return len(_heads(notes))

    def units(self, notes: Sequence[HeadedNote]) -> int:
        """Return the number of entities."""
        return len(_heads(notes))

    def windows(self, notes: Sequence[HeadedNote], encoder: TextEncoder) -> Iterator[Window]:
        """Yield prompt and answer for each entity, as far as they fit; see `written_windows`."""
        heads = _heads(notes)
        return written_windows([self.prompt(each) for each in heads], [each.sentence for each in heads], encoder)

    def prompt(self, headed: HeadedLine) -> str:
        """Return what the model is asked about a head."""
        head = Entity(headed.head.start, headed.head.end, HEAD_CLASS)
        return (
            f'Mark the {HEAD_CLASS} and what it relates to, each as <span class="LABEL">words</span> '
            f"if one of {', '.join(self.labels)} holds, and change nothing else.\n"
            f"Text: {write_markup(Sentence(headed.sentence.tokens, (head,)))}\nMarked: "
        )

    def loss(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the mean cross-entropy over the tokens of the answers."""
        return answer_loss(logits, targets)

    def decide(self, outputs: Sequence[str]) -> npt.NDArray[Any]:
        """Return the answers as they are."""
        return as_written(outputs)

    def score(self, notes: Sequence[HeadedNote], predictions: npt.NDArray[Any]) -> Scores:
        """F1 of head, words and label, strict and lenient in the words, as of entities; see `NerTask.score`.

        Each head is compared for itself: words that are marked for another head count for nothing.
        """
        true = [headed.sentence.entities for headed in _heads(notes)]
        return entity_scores(true, self._read(notes, predictions), self.labels)

    def _read(self, notes: Sequence[HeadedNote], predictions: npt.NDArray[Any]) -> list[tuple[Entity, ...]]:
        """What the answers mark, for each head."""
        return read_answers([headed.sentence for headed in _heads(notes)], predictions, self.labels)


def _heads(notes: Sequence[HeadedNote]) -> list[HeadedLine]:
    """All entities of all notes, in reading order."""
    return [headed for note in notes for headed in note.heads]


def _words(entity: Entity) -> dict[str, int]:
    return {"start": entity.start, "end": entity.end}
