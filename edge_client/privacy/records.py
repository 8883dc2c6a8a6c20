"""Whose windows belong together: the unit that is protected.

A record is everything that a site's notes say of one patient; where the notes do not say whose they are, each note is
its own patient (`AnyNote.patient`). A note is cut into windows to be trained on, and a bound on what one window can do
would bound nothing for a patient with forty of them. So the gradients of all windows of a record are summed before they
are clipped: what is bounded is the patient.

Windows are made record by record, and batches hold windows of one record only, so that no token of one patient can
stand in another's window, whatever the task does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from edge_client.batches import Batch
from edge_client.data import AnyNote
from edge_client.model import LoadedModel
from edge_client.prefix import MEMORY, prepare
from edge_client.prefix_store import Keep
from edge_client.trainer import Dataset, make_window_batches

WINDOWS_AT_ONCE = 8
"""Windows of one record in one pass. A record of more takes several; memory does not grow with the longest patient."""


SHORT = 64
"""Tokens, padding included. Records of at most so many share a pass under clipping = "auto": that was quicker at widths
of 128 and 384, and from some hundred tokens on it was not (docs/privacy.md)."""


@dataclass(frozen=True, slots=True)
class Records:
    """Notes by record, and what they became for one model."""

    data: Dataset
    """Its batches hold windows of one record each, the records in turn; its examples are the records."""
    spans: tuple[range, ...]
    """The places of each record's batches; an empty range for a record without a window, which can be drawn as well."""


def make_records(loaded: LoadedModel, notes: Sequence[AnyNote], keep: Keep = MEMORY) -> Records:
    """Return `notes` by patient, with the frozen prefix put into `keep` where it can be; errors as `make_dataset`."""
    by_patient: dict[str, list[AnyNote]] = {}
    for note in notes:
        by_patient.setdefault(note.patient, []).append(note)
    made = [make_window_batches(loaded, own, size=WINDOWS_AT_ONCE, seed=0) for own in by_patient.values()]
    batches: list[Batch] = [batch for own in made for batch in own]
    spans = tuple(range(start, end) for start, end in pairwise(accumulate(map(len, made), initial=0)))
    prepared = prepare(loaded, batches, keep)
    return Records(Dataset(tuple(notes), prepared, len(spans)), spans)


def grouped(batches: Sequence[Batch], room: int) -> Iterator[list[Batch]]:
    """Yield the batches, shortest first, in groups of at most `room` tokens when padded alike, or single ones."""
    group: list[Batch] = []
    windows = 0
    for batch in sorted(batches, key=lambda each: each.ids.shape[1]):
        windows += len(batch.windows)
        if group and windows * batch.ids.shape[1] > room:
            yield group
            group, windows = [], len(batch.windows)
        group.append(batch)
    if group:
        yield group
