"""Sequence classification: one label for each note, such as the primary diagnosis."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from edge_client.data import ONE_LABEL_FORMATS, TextNote, read_one_label, read_plain
from edge_client.tasks import IGNORED, ONE_LABEL, Ids, Scores, Window
from edge_client.tasks.encoding import TextEncoder
from edge_client.tasks.whole import f1_scores, whole_windows
from shared.config import TaskSection
from shared.errors import RefusedError


def make(section: TaskSection) -> ClassificationTask:
    """Return the task for the federation's labels."""
    return ClassificationTask(section.labels)


class ClassificationTask:
    """One of the labels for each note. A unit, and an example, is a note."""

    head = ONE_LABEL
    formats = ONE_LABEL_FORMATS

    def __init__(self, labels: Sequence[str]) -> None:
        self.classes = tuple(labels)

    def read(self, path: Path) -> Iterator[TextNote | RefusedError]:
        """Yield the notes with one label each under `path`."""
        return read_one_label(path, self.classes)

    def windows(self, notes: Sequence[TextNote], encoder: TextEncoder) -> Iterator[Window]:
        """Yield one window for each note; a longer one gives its beginning and its end."""
        return whole_windows([note.text for note in notes], list(self._targets(notes)), encoder)

    def read_bare(self, path: Path) -> Iterator[TextNote | RefusedError]:
        """Yield the texts under `path`."""
        return read_plain(path)

    def findings(self, notes: Sequence[TextNote], predictions: Ids) -> Iterator[Mapping[str, Any]]:
        """Yield each note's `label`."""
        return ({"label": self.classes[place]} for place in predictions)

    def examples(self, notes: Sequence[TextNote]) -> int:
        """Return the number of notes."""
        return len(notes)

    def units(self, notes: Sequence[TextNote]) -> int:
        """Return the number of notes."""
        return len(notes)

    def loss(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the mean cross-entropy over the notes that have a label."""
        return cross_entropy(logits, targets, ignore_index=IGNORED)

    def decide(self, logits: torch.Tensor) -> Ids:
        """Return the likeliest class of each note."""
        best: Ids = logits.argmax(dim=-1).numpy()
        return best

    def score(self, notes: Sequence[TextNote], predictions: Ids) -> Scores:
        """Micro- and macro-F1, and that of each label."""
        return f1_scores(self._targets(notes), predictions, self.classes)

    def _targets(self, notes: Sequence[TextNote]) -> Ids:
        place = {label: index for index, label in enumerate(self.classes)}
        return np.array([place[note.labels[0]] if note.labels else IGNORED for note in notes], dtype=np.int64)
