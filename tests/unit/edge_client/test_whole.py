"""Tasks that say something of a note as a whole, from windows to scores, and trained on tiny models."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from edge_client.data import TextNote
from edge_client.model import export, load_model, read_trainable
from edge_client.tasks.classification import ClassificationTask
from edge_client.tasks.encoding import TextEncoder
from edge_client.tasks.multilabel import MultiLabelTask
from edge_client.tasks.whole import cut
from edge_client.trainer import evaluate, make_dataset, train
from edge_client.worker import split_holdout
from shared.config import FederationConfig
from tests.unit.edge_client import tiny

pytestmark = pytest.mark.slow

LABELS = ("fever", "pneumonia", "warfarin")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with a tiny model of each type."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("models")
    return {model_type: tiny.save_model(root / model_type, model_type) for model_type in tiny.MODEL_TYPES}


def federation(kind: str, **changes: object) -> FederationConfig:
    """A tiny federation of this task."""
    return tiny.federation(task={"kind": kind, "labels": LABELS, "max_length": 32}, **changes)


def texts(count: int, *, seed: int, several: bool) -> tuple[TextNote, ...]:
    """Notes that are about what they name."""
    draw = random.Random(seed)
    found = []
    for index in range(count):
        labels = draw.sample(LABELS, draw.randint(0, 3) if several else 1)
        words = [*draw.sample(tiny.FILLER, 6), *labels]
        draw.shuffle(words)
        found.append(TextNote(f"n{index}", f"p{index}", " ".join(words), tuple(labels)))
    return tuple(found)


def test_a_long_note_gives_its_beginning_and_its_end() -> None:
    """By hand: of 20 tokens in a room of 8 the first 2 and the last 6; a note that fits is whole."""
    assert cut(range(20), 8) == (0, 1, 14, 15, 16, 17, 18, 19)
    assert cut(range(8), 8) == tuple(range(8))
    assert cut(range(3), 8) == (0, 1, 2)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_window_is_a_note(folders: dict[str, Path], kind: str) -> None:
    """One window each, with the model's own special tokens, at most max_length long, over the note's unit."""
    encoder = TextEncoder(AutoTokenizer.from_pretrained(folders[kind]), max_length=16, speaks_last=False)
    notes = [TextNote("a", "a", "fever", ("fever",)), TextNote("b", "b", "fever and cbc " * 20, ())]
    short, long = MultiLabelTask(LABELS).windows(notes, encoder)
    assert (len(short.ids) < 16, len(long.ids)) == (True, 16)
    for window, unit, targets in ((short, 0, [1, 0, 0]), (long, 1, [0, 0, 0])):
        assert window.units.tolist() == [unit]
        assert window.targets.tolist() == targets
        assert tuple(window.ids[: len(encoder.start)]) == encoder.start
        assert tuple(window.ids[len(window.ids) - len(encoder.end) :]) == encoder.end


def test_scores_by_hand() -> None:
    """Multi-label: 2 hits, 1 miss, 1 false alarm. One label: accuracy 2/3, and a label nobody gave counts 0."""
    notes = [TextNote("a", "a", "x", ("fever", "pneumonia")), TextNote("b", "b", "x", ("fever",))]
    scores = MultiLabelTask(LABELS).score(notes, np.array([[1, 0, 0], [1, 0, 1]]))
    assert scores.overall == pytest.approx({"micro_f1": 2 / 3, "macro_f1": 1 / 3})
    assert scores.labels == {"fever": {"f1": 1.0}, "pneumonia": {"f1": 0.0}, "warfarin": {"f1": 0.0}}
    notes = [TextNote(label[-1], "p", "x", (label,)) for label in ("fever", "fever", "pneumonia")]
    scores = ClassificationTask(LABELS).score(notes, np.array([0, 1, 1]))
    assert scores.overall == pytest.approx({"micro_f1": 2 / 3, "macro_f1": (2 / 3 + 2 / 3 + 0) / 3})
    assert scores.labels["warfarin"] == {"f1": 0.0}


@pytest.mark.parametrize(
    "task", [ClassificationTask(LABELS), MultiLabelTask(LABELS)], ids=lambda task: type(task).__name__
)
def test_no_notes_score_nothing(task: Any) -> None:
    """Where there is nothing to predict, every measure is 0 and not an error."""
    nothing = task.decide(torch.empty((0, 3)))
    assert set(task.score([], nothing).overall.values()) == {0.0}


@pytest.mark.parametrize("kind", ["classification", "multilabel"])
@pytest.mark.parametrize("model_type", tiny.MODEL_TYPES)
def test_training_changes_the_trainable_tensors_alone(folders: dict[str, Path], model_type: str, kind: str) -> None:
    """In each family the top blocks are trained, and the head of the class for sequences, over kept states."""
    loaded = load_model(folders[model_type], federation(kind))
    before = {name: parameter.detach().clone() for name, parameter in loaded.model.named_parameters()}
    notes = texts(9, seed=0, several=kind == "multilabel")
    data = make_dataset(loaded, notes, batch_size=4, seed=0)
    assert data.prepared.cached, data.prepared.reason
    result = train(loaded, read_trainable(loaded), data, federation(kind).training, seed=1)
    after = dict(loaded.model.named_parameters())
    assert {name for name in before if not torch.equal(before[name], after[name])} == set(loaded.trainable)
    assert any(name.startswith(loaded.family.head) for name in loaded.trainable)
    assert ("bert.pooler.dense.weight" in loaded.trainable) == (model_type == "bert")
    assert result.examples == 9


@pytest.mark.parametrize("kind", ["classification", "multilabel"])
def test_it_learns(folders: dict[str, Path], kind: str) -> None:
    """Notes that name what they are about are told apart on held-out notes after training, and not before."""
    settings = federation(kind, layers={"plan": "all"})
    loaded = load_model(folders["llama"], settings)
    data = make_dataset(loaded, texts(96, seed=0, several=kind == "multilabel"), batch_size=8, seed=0)
    held_out = make_dataset(loaded, texts(32, seed=1, several=kind == "multilabel"), batch_size=8, seed=0)
    before = evaluate(loaded, held_out).main
    section = settings.training.model_copy(update={"epochs": 25, "lr": 1e-2})
    train(loaded, read_trainable(loaded), data, section, seed=1)
    assert before < 0.6
    assert evaluate(loaded, held_out).main > 0.8


def test_padding_does_not_change_what_a_note_is_given(folders: dict[str, Path]) -> None:
    """A note scored beside a longer one gets the logits that it gets alone: a decoder reads its last real token."""
    for model_type in ("bert", "llama", "gpt2"):
        loaded = load_model(folders[model_type], federation("multilabel"))
        notes = (TextNote("a", "a", "fever", ()), TextNote("b", "b", "patient was given aspirin for fever today", ()))
        together = make_dataset(loaded, notes, batch_size=2, seed=0).prepared.batches
        alone = make_dataset(loaded, notes, batch_size=1, seed=0).prepared.batches
        assert (len(together), len(alone)) == (1, 2)
        with torch.no_grad():
            rows = {
                int(w.units[0]): row for w, row in zip(together[0].windows, _logits(loaded, together[0]), strict=True)
            }
            for batch in alone:
                torch.testing.assert_close(rows[int(batch.windows[0].units[0])], _logits(loaded, batch)[0])


def _logits(loaded: Any, batch: Any) -> torch.Tensor:
    logits: torch.Tensor = loaded.model(input_ids=batch.ids, attention_mask=batch.mask).logits
    return logits


def test_everybody_draws_the_same_head_and_pooler(folders: dict[str, Path], tmp_path: Path) -> None:
    """A BERT without a pooler gets one from the federation's seed; one that has it keeps its own."""
    settings = federation("multilabel")
    kept = read_trainable(load_model(folders["bert"], settings))
    assert np.abs(kept["bert.pooler.dense.weight"]).sum() > 0
    without = tmp_path / "without"
    shutil.copytree(folders["bert"], without)
    weights = load_file(without / "model.safetensors")
    save_file({name: array for name, array in weights.items() if "pooler" not in name}, without / "model.safetensors")
    first, second = (read_trainable(load_model(without, settings)) for _ in range(2))
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name])
        assert np.array_equal(array, kept[name]) == (not name.endswith("pooler.dense.weight")), name


def test_the_export_says_what_its_targets_are(folders: dict[str, Path], tmp_path: Path) -> None:
    """The exported folder loads as the class for sequences with names, kind of problem and padding, same logits."""
    loaded = load_model(folders["llama"], federation("multilabel"))
    export(loaded, tmp_path / "out")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert again.config.problem_type == "multi_label_classification"
    assert tuple(again.config.id2label.values()) == LABELS
    ids = torch.tensor([[5, 6, 7], [5, 6, loaded.pad_id]])
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, loaded.model(input_ids=ids).logits)


def test_no_patient_is_on_both_sides() -> None:
    """Notes of one patient are held out together or trained on together; a fifth of the patients is held out."""
    notes = [TextNote(f"n{index}", f"p{index % 10}", "x", ()) for index in range(40)]
    kept, held_out = split_holdout(notes, 0.2, seed=3)
    assert not {note.patient for note in kept} & {note.patient for note in held_out}
    assert len({note.patient for note in held_out}) == 2
    assert sorted(kept + held_out, key=lambda note: note.id) == sorted(notes, key=lambda note: note.id)
    assert split_holdout(notes[::-1], 0.2, seed=3)[1] == held_out[::-1]
