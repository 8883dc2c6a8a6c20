"""Tasks: notes into windows of token ids, and predictions back into what people score.

With `edge_client/data` these are the only files that see text. A task is one class in one file; what the trainer and
the worker need of it is the protocol below.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from edge_client.data import Note
from edge_client.tasks.encoding import TextEncoder

Ids = npt.NDArray[np.int64]

IGNORED = -100
"""Target of a token that bears no label; the cross-entropy of torch leaves it out."""


@dataclass(frozen=True, slots=True)
class Window:
    """One training sequence: token ids, a target class for each, and where its predictions belong.

    `ids` and `targets` have the window's length; `targets` is IGNORED where a token bears no label. `positions` are
    the tokens whose predictions count, `units` what they predict: the task's own numbering over all notes.
    """

    ids: Ids = field(repr=False)
    targets: Ids = field(repr=False)
    positions: Ids
    units: Ids


@dataclass(frozen=True, slots=True)
class F1:
    """Entity-level or example-level F1 in a strict and a lenient reading, each 0 to 1."""

    strict_f1: float
    lenient_f1: float


@dataclass(frozen=True, slots=True)
class Scores(F1):
    """Micro-averaged F1 over all labels, and each label's own."""

    labels: Mapping[str, F1]


class Task(Protocol):
    """What is learnt, as the trainer sees it."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the head's outputs, in order of their ids."""
        ...

    def windows(self, notes: Sequence[Note], encoder: TextEncoder) -> Iterator[Window]:
        """Yield the windows of `notes`; each unit is predicted by exactly one window."""
        ...

    def examples(self, notes: Sequence[Note]) -> int:
        """Return how many examples `notes` hold: the n in the weight of a site's update."""
        ...

    def units(self, notes: Sequence[Note]) -> int:
        """Return how many units `notes` hold."""
        ...

    def score(self, notes: Sequence[Note], predictions: Ids) -> Scores:
        """Compare `predictions`, a class id for each unit of `notes`, with their annotations."""
        ...
