"""Generative information extraction: the model writes each line once more, with its entities marked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch

from edge_client.data import MARKED_FORMATS, Note, Sentence, read_marked
from edge_client.tasks import TEXT, Scores, Window
from edge_client.tasks.encoding import TextEncoder
from edge_client.tasks.ner import entity_findings, entity_scores, lines_with_words, read_unmarked
from edge_client.tasks.written import answer_loss, as_written, read_answers, written_windows
from shared.config import TaskSection
from shared.errors import RefusedError


def make(section: TaskSection) -> ExtractionTask:
    """Return the task for the federation's labels."""
    return ExtractionTask(section.labels)


class ExtractionTask:
    """Entities of a closed set of labels, written as mark-up. A unit, and an example, is a line with words."""

    head = TEXT
    formats = MARKED_FORMATS
    classes: tuple[str, ...] = ()

    def __init__(self, labels: Sequence[str]) -> None:
        self.labels = tuple(labels)

    def read(self, path: Path) -> Iterator[Note | RefusedError]:
        """Yield the notes with marked entities under `path`."""
        return read_marked(path, self.labels)

    def read_bare(self, path: Path) -> Iterator[Note | RefusedError]:
        """Yield the texts under `path` as lines of words."""
        return read_unmarked(path)

    def findings(self, notes: Sequence[Note], predictions: npt.NDArray[Any]) -> Iterator[Mapping[str, Any]]:
        """Yield each note's entities, as for token classification."""
        return entity_findings(notes, read_answers(lines_with_words(notes), predictions, self.labels))

    def examples(self, notes: Sequence[Note]) -> int:
        """Return the number of lines that hold a word."""
        return len(lines_with_words(notes))

    def units(self, notes: Sequence[Note]) -> int:
        """Return the number of lines that hold a word."""
        return len(lines_with_words(notes))

    def windows(self, notes: Sequence[Note], encoder: TextEncoder) -> Iterator[Window]:
        """Yield prompt and answer of each line, as far as they fit; see `written_windows`."""
        lines = lines_with_words(notes)
        return written_windows([self.prompt(line) for line in lines], lines, encoder)

    def prompt(self, line: Sentence) -> str:
        """Return what the model is asked about a line."""
        return (
            f'Mark each {", ".join(self.labels)} as <span class="LABEL">words</span> and change nothing else.\n'
            f"Text: {' '.join(line.tokens)}\nMarked: "
        )

    def loss(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the mean cross-entropy over the tokens of the answers."""
        return answer_loss(logits, targets)

    def decide(self, outputs: Sequence[str]) -> npt.NDArray[Any]:
        """Return the answers as they are."""
        return as_written(outputs)

    def score(self, notes: Sequence[Note], predictions: npt.NDArray[Any]) -> Scores:
        """Entity-level F1, strict and lenient, as for token classification; a line without an answer marks nothing."""
        lines = lines_with_words(notes)
        found = read_answers(lines, predictions, self.labels)
        return entity_scores([line.entities for line in lines], found, self.labels)
