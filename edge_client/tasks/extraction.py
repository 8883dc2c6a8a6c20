"""Generative information extraction: the model writes each line once more, with its entities marked.

As in Fed-MedLoRA (arXiv 2601.22124): instruction and line are the prompt, the marked line is the answer, the loss is on
the answer alone, and an answer is written greedily.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import cross_entropy

from edge_client.data import MARKED_FORMATS, Entity, Note, Sentence, TextNote, read_marked
from edge_client.tasks import IGNORED, TEXT, Scores, Window
from edge_client.tasks.encoding import TextEncoder
from edge_client.tasks.markup import read_markup, write_markup
from edge_client.tasks.ner import entity_findings, entity_scores, lines_of, lines_with_words
from shared.config import TaskSection
from shared.errors import ConfigError, RefusedError


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

    def bare(self, note: TextNote) -> Note:
        """Return its lines, split into words at white space."""
        return lines_of(note)

    def findings(self, notes: Sequence[Note], predictions: npt.NDArray[Any]) -> Iterator[Mapping[str, Any]]:
        """Yield each note's entities, as for token classification."""
        return entity_findings(notes, self._read(notes, predictions))

    def examples(self, notes: Sequence[Note]) -> int:
        """Return the number of lines that hold a word."""
        return len(lines_with_words(notes))

    def units(self, notes: Sequence[Note]) -> int:
        """Return the number of lines that hold a word."""
        return len(lines_with_words(notes))

    def windows(self, notes: Sequence[Note], encoder: TextEncoder) -> Iterator[Window]:
        """Yield prompt and answer of each line; `positions` is where the answer begins.

        The target of a token is the token that follows it, IGNORED before the answer. An answer that does not fit is
        learnt as far as it does; a line whose prompt alone fills the window is in none.
        """
        if encoder.stop is None:
            raise ConfigError(
                "the tokenizer has no end-of-text token, and a written answer must end",
                hint="give tokenizer_config.json an eos_token, or choose another task",
            )
        lines = lines_with_words(notes)
        prompts = encoder.encode_texts([self.prompt(line) for line in lines])
        answers = encoder.encode_texts([write_markup(line) for line in lines])
        for unit, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            begin = len(encoder.start) + len(prompt)
            room = encoder.room + len(encoder.end) + len(encoder.start)
            ids = np.array([*encoder.start, *prompt, *answer, encoder.stop][:room], dtype=np.int64)
            if len(ids) > begin:
                targets = np.full(len(ids), IGNORED, dtype=np.int64)
                targets[begin - 1 : -1] = ids[begin:]
                yield Window(ids, targets, np.array([begin], dtype=np.int64), np.array([unit], dtype=np.int64))

    def prompt(self, line: Sentence) -> str:
        """Return what the model is asked about a line."""
        return (
            f'Mark each {", ".join(self.labels)} as <span class="LABEL">words</span> and change nothing else.\n'
            f"Text: {' '.join(line.tokens)}\nMarked: "
        )

    def loss(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the mean cross-entropy over the tokens of the answers."""
        return cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)

    def decide(self, outputs: Sequence[str]) -> npt.NDArray[Any]:
        """Return the answers as they are: what they mark is read beside their lines."""
        return np.array(outputs, dtype=object)

    def score(self, notes: Sequence[Note], predictions: npt.NDArray[Any]) -> Scores:
        """Entity-level F1, strict and lenient, as for token classification; a line without an answer marks nothing."""
        found = self._read(notes, predictions)
        return entity_scores([line.entities for line in lines_with_words(notes)], found, self.labels)

    def _read(self, notes: Sequence[Note], predictions: npt.NDArray[Any]) -> list[tuple[Entity, ...]]:
        """The entities that the answers mark in each line with words."""
        lines = zip(lines_with_words(notes), predictions, strict=True)
        return [read_markup(answer or "", line.tokens, self.labels) for line, answer in lines]
