"""Multi-label classification: any number of the labels for each note, such as the codes of a hospital stay."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from edge_client.data import ANY_LABELS_FORMATS, TextNote, read_any_labels, read_plain
from edge_client.tasks import ANY_LABELS, Ids, Scores, Window
from edge_client.tasks.encoding import TextEncoder
from edge_client.tasks.whole import f1_scores, whole_windows
from shared.config import TaskSection
from shared.errors import RefusedError


def make(section: TaskSection) -> MultiLabelTask:
    """Return the task for the federation's labels."""
    return MultiLabelTask(section.labels)


class MultiLabelTask:
    """Each label for itself, true or false of a note. A unit, and an example, is a note."""

    head = ANY_LABELS
    formats = ANY_LABELS_FORMATS

    def __init__(self, labels: Sequence[str]) -> None:
        self.classes = tuple(labels)

    def read(self, path: Path) -> Iterator[TextNote | RefusedError]:
        """Yield the notes with their labels under `path`."""
        return read_any_labels(path, self.classes)

    def windows(self, notes: Sequence[TextNote], encoder: TextEncoder) -> Iterator[Window]:
        """Yield one window for each note; a longer one gives its beginning and its end."""
        return whole_windows([note.text for note in notes], list(self._targets(notes)), encoder)

    def read_bare(self, path: Path) -> Iterator[TextNote | RefusedError]:
        """Yield the texts under `path`."""
        return read_plain(path)

    def findings(self, notes: Sequence[TextNote], predictions: Ids) -> Iterator[Mapping[str, Any]]:
        """Yield each note's `labels`, in the order of the federation's."""
        for row in predictions:
            yield {"labels": [name for name, said in zip(self.classes, row, strict=True) if said]}

    def examples(self, notes: Sequence[TextNote]) -> int:
        """Return the number of notes."""
        return len(notes)

    def units(self, notes: Sequence[TextNote]) -> int:
        """Return the number of notes."""
        return len(notes)

    def loss(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the binary cross-entropy, its mean over notes and labels."""
        return binary_cross_entropy_with_logits(logits, targets)

    def decide(self, logits: torch.Tensor) -> Ids:
        """Return 1 for each label that is likelier true than false, 0 for the others."""
        likely: Ids = (logits > 0).long().numpy()
        return likely

    def score(self, notes: Sequence[TextNote], predictions: Ids) -> Scores:
        """Micro- and macro-F1, and that of each label."""
        return f1_scores(self._targets(notes).astype(np.int64), predictions, self.classes)

    def _targets(self, notes: Sequence[TextNote]) -> npt.NDArray[np.float32]:
        rows = [[label in note.labels for label in self.classes] for note in notes]
        return np.array(rows, dtype=np.float32).reshape(len(notes), len(self.classes))
