"""Tasks: notes into windows of token ids, and a model's logits back into what people score.

With `edge_client/data` these are the only files that see text. A task is one class in one file; all that the trainer
and the worker need of it is the protocol `Task` below. Tasks are found by name through the entry points of installed
packages (`registry.py`), so that a hospital can bring its own; docs/tasks.md shows one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import numpy.typing as npt

from edge_client.data import AnyNote
from edge_client.tasks.encoding import TextEncoder
from shared.errors import RefusedError

if TYPE_CHECKING:
    from pathlib import Path

    import torch

Ids = npt.NDArray[np.int64]
Targets = npt.NDArray[np.int64] | npt.NDArray[np.float32]

IGNORED = -100
"""Target of a token that bears no label; the cross-entropy of torch leaves it out."""


@dataclass(frozen=True, slots=True)
class Head:
    """What stands on top of the base model: a class of transformers, and what a row of its logits speaks for."""

    auto_class: str
    """Name of the class in transformers."""
    per_token: bool
    """True: logits (windows, tokens, classes), a target for each token. False: (windows, classes), one a window."""
    writes: bool = False
    """True: the model answers in text, which its pre-trained output layer writes; the loss is per token."""
    problem_type: str | None = None
    """What the model's configuration says of its targets, for those who load the exported model."""


TOKENS = Head("AutoModelForTokenClassification", per_token=True)
"""A class for each token."""
ONE_LABEL = Head("AutoModelForSequenceClassification", per_token=False, problem_type="single_label_classification")
"""One class for each window."""
ANY_LABELS = Head("AutoModelForSequenceClassification", per_token=False, problem_type="multi_label_classification")
"""Each class for itself, true or false of a window."""


@dataclass(frozen=True, slots=True)
class Window:
    """One training sequence: token ids, what is to be said of it, and where its predictions belong.

    `units` are what it predicts: the task's own numbering over all notes, each unit in at most one window.
    Under a head per token `targets` has the window's length and is IGNORED where a token bears no label, and
    `positions` are the tokens whose logits count, one for each unit. Otherwise `targets` is the window's own, of any
    shape that the task's loss takes stacked, `positions` is empty, and there is one unit. Under a head that writes
    there is one unit too, and `positions` is where its answer begins in `ids`.
    """

    ids: Ids = field(repr=False)
    targets: Targets = field(repr=False)
    positions: Ids
    units: Ids


TEXT = Head("AutoModelForCausalLM", per_token=True, writes=True)
"""Text after a prompt."""

_MEASURE = re.compile(r"[a-z0-9_]{1,32}")


@dataclass(frozen=True, slots=True)
class Scores:
    """Measures of a model's predictions by name (lower case, as `strict_f1`), each 0 to 1, more is better."""

    overall: Mapping[str, float]
    """Over all labels; the first is the one that models are compared by."""
    labels: Mapping[str, Mapping[str, float]]
    """Each label's own."""

    def __post_init__(self) -> None:
        """Raise ValueError for a name or a number that could not travel with an update."""
        for name, value in self.overall.items():
            if not (_MEASURE.fullmatch(name) and math.isfinite(value)):
                msg = f"a measure needs a name such as strict_f1 and a finite value, not {name!r} = {value}"
                raise ValueError(msg)

    @property
    def main(self) -> float:
        """The measure that models are compared by."""
        return next(iter(self.overall.values()))


N = TypeVar("N", bound=AnyNote)


@runtime_checkable
class Task(Protocol[N]):
    """What is learnt, as the trainer sees it; N is the task's own kind of note."""

    @property
    def head(self) -> Head:
        """What stands on top of the base model."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the head's outputs, in order of their ids; none under a head that writes."""
        ...

    @property
    def formats(self) -> str:
        """What `read` looks for, in words, for the hint of an error."""
        ...

    def read(self, path: Path) -> Iterator[N | RefusedError]:
        """Yield each note under `path`, or why it is refused, naming file and line and never quoting text.

        Nothing where `path` holds nothing in a known format. Raises what cannot be skipped over, such as a disk that
        fails.
        """
        ...

    def read_bare(self, path: Path) -> Iterator[N | RefusedError]:
        """Yield the notes under `path` without what the task is to find in them, to predict on; refusals as `read`.

        Raises RefusedError(rule='note-missing') where there are none.
        """
        ...

    def windows(self, notes: Sequence[N], encoder: TextEncoder) -> Iterator[Window]:
        """Yield the windows of `notes`; a unit that is in none is predicted as zero."""
        ...

    def examples(self, notes: Sequence[N]) -> int:
        """Return how many examples `notes` hold: the n in the weight of a site's update."""
        ...

    def units(self, notes: Sequence[N]) -> int:
        """Return how many units `notes` hold."""
        ...

    def loss(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the mean loss of a batch, a scalar; shapes as `Head.per_token` says, `targets` stacked."""
        ...

    def decide(self, outputs: Any) -> npt.NDArray[Any]:
        """Return what a model's outputs predict, one row a unit: logits (units, classes), or the texts it wrote."""
        ...

    def findings(self, notes: Sequence[N], predictions: npt.NDArray[Any]) -> Iterator[Mapping[str, Any]]:
        """Yield, for each note, what `predictions` (as for `score`) say of it, in values for JSON.

        Never a word of the note: what is found is told by place or by label.
        """
        ...

    def score(self, notes: Sequence[N], predictions: npt.NDArray[Any]) -> Scores:
        """Compare `predictions`, a row as from `decide` for each unit of `notes`, with their annotations."""
        ...
