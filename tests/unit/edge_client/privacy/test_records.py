from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from edge_client.data import Note, Sentence, TextNote
from edge_client.model import LoadedModel, load_model
from edge_client.privacy import records as module
from edge_client.privacy.records import Records, make_records
from tests.unit.edge_client import tiny

LABELS = ("fever", "warfarin")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaMA."""
    torch.set_num_threads(1)
    return tiny.save_model(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture
def llama(folder: Path) -> LoadedModel:
    """Ready for token classification."""
    return load_model(folder, tiny.federation())


def windows_of(records: Records, record: int) -> list[bytes]:
    """The token ids of a record's windows, as bytes, sorted."""
    batches = [records.data.prepared.batches[place] for place in records.spans[record]]
    return sorted(window.ids.tobytes() for batch in batches for window in batch.windows)


def test_a_note_is_a_record_however_many_windows_it_has(llama: LoadedModel) -> None:
    """Where nobody says whose the notes are: the windows of each note, all of them, and no other's."""
    notes = (*tiny.notes(2, lines=12), *tiny.notes(1, seed=1, lines=1))
    notes = tuple(Note(f"n{index}", note.sentences) for index, note in enumerate(notes))
    records = make_records(llama, notes)
    assert len(records.spans) == records.data.examples == 3
    for record, note in enumerate(notes):
        alone = sorted(window.ids.tobytes() for window in llama.task.windows([note], llama.encoder))
        assert windows_of(records, record) == alone
    assert len(windows_of(records, 0)) > 1
    assert len(windows_of(records, 2)) == 1


def test_all_notes_of_a_patient_are_one_record(folder: Path) -> None:
    """Also those that do not stand side by side."""
    loaded = load_model(folder, tiny.federation(task={"kind": "multilabel", "labels": LABELS}))
    whose = ("p1", "p2", "p1", "p3", "p1")
    notes = [TextNote(f"n{index}", patient, f"fever {index}", ()) for index, patient in enumerate(whose)]
    records = make_records(loaded, notes)
    assert [len(windows_of(records, record)) for record in range(3)] == [3, 1, 1]
    assert records.data.examples == 3


def test_no_batch_holds_two_records(llama: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The spans follow each other over all batches; a record with more windows than one pass takes has several."""
    monkeypatch.setattr(module, "WINDOWS_AT_ONCE", 2)
    records = make_records(llama, tiny.notes(3, lines=12))
    assert [place for span in records.spans for place in span] == list(range(len(records.data.prepared.batches)))
    assert all(len(batch.windows) <= 2 for batch in records.data.prepared.batches)
    assert all(len(span) > 1 for span in records.spans)


def test_a_patient_without_a_word_is_still_a_record(llama: LoadedModel) -> None:
    """Their number may not tell whose notes are empty."""
    empty = Note("empty", (Sentence((), ()),))
    records = make_records(llama, [empty, *tiny.notes(1)])
    assert [len(span) for span in records.spans] == [0, 1]
    assert records.data.examples == 2


def test_the_frozen_prefix_is_computed_once(llama: LoadedModel) -> None:
    """Each record's batch carries what enters its first trained block."""
    records = make_records(llama, tiny.notes(2))
    assert records.data.prepared.cached
    for batch in records.data.prepared.batches:
        assert batch.hidden is not None
        assert batch.hidden().shape == (*batch.ids.shape, tiny.WIDTH)
        assert np.isfinite(batch.hidden().numpy()).all()
