"""What tasks have in common that say something of a note as a whole: the window, and how notes are counted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.metrics import f1_score

from edge_client.tasks import Scores, Targets, Window
from edge_client.tasks.encoding import TextEncoder

HEAD_SHARE = 0.25
"""Share of a window that goes to the beginning of a note that is longer; the rest goes to its end."""


def cut(ids: Sequence[int], room: int) -> tuple[int, ...]:
    """Return at most `room` token ids: all, or the first quarter of the room from the start and the rest from the end.

    Sun et al. (2019), "How to Fine-Tune BERT for Text Classification?", arXiv 1905.05583, section 5.3.1, where the
    first 128 and the last 382 of 510 tokens did better than either end alone. A discharge summary begins with why the
    patient came and ends with diagnoses and plan.
    """
    if len(ids) <= room:
        return tuple(ids)
    first = round(HEAD_SHARE * room)
    return (*ids[:first], *ids[len(ids) - (room - first) :])


def whole_windows(texts: Sequence[str], targets: Sequence[Targets], encoder: TextEncoder) -> Iterator[Window]:
    """Yield one window for each text and its target, cut to what a window holds; none for a text without a token.

    Unit i is text i.
    """
    nowhere = np.empty(0, dtype=np.int64)
    for unit, (ids, target) in enumerate(zip(encoder.encode_texts(texts), targets, strict=True)):
        if ids:
            whole = np.array([*encoder.start, *cut(ids, encoder.room), *encoder.end], dtype=np.int64)
            yield Window(whole, target, nowhere, np.array([unit], dtype=np.int64))


def f1_scores(true: npt.NDArray[Any], found: npt.NDArray[Any], labels: Sequence[str]) -> Scores:
    """Micro- and macro-averaged F1 and that of each label, as scikit-learn counts them.

    `true` and `found` are class ids (notes,), or 0 and 1 (notes, classes). Micro pools the decisions of all labels (it
    is the accuracy where each note has one), macro is the mean over all labels; a label that neither occurs nor was
    predicted counts 0.
    """
    ids = list(range(len(labels)))
    if not len(true):
        return Scores({"micro_f1": 0.0, "macro_f1": 0.0}, {label: {"f1": 0.0} for label in labels})
    micro, macro, each = (
        f1_score(true, found, labels=ids, average=average, zero_division=0.0) for average in ("micro", "macro", None)
    )
    per_label: Mapping[str, Mapping[str, float]] = MappingProxyType(
        {label: {"f1": float(value)} for label, value in zip(labels, each, strict=True)}
    )
    return Scores({"micro_f1": float(micro), "macro_f1": float(macro)}, per_label)
