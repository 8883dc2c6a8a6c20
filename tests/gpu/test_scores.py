"""What a model says on a GPU is what it says on the processor: losses, importance, predictions, written answers."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import get_args

import pytest

from edge_client.data import Entity, Note, Sentence
from edge_client.device import CPU, Device
from edge_client.importance import measure
from edge_client.model import State, apply_state, load_model, read_trainable
from edge_client.trainer import evaluate, make_dataset, mean_loss, predict, train
from mailboat.demo.plan import SHIPPED_MODEL
from shared.config import ImportanceName
from tests.gpu.seen import Seen
from tests.gpu.ways import NOTES, Site, farthest, open_site
from tests.unit.edge_client import tiny

LOSS, IMPORTANCE = 3e-5, 1e-3
LINE = Sentence(
    ("he", "has", "chest", "pain", "on", "aspirin", "."), (Entity(2, 4, "problem"), Entity(5, 6, "treatment"))
)
LINES = (LINE, Sentence(("cbc", "today"), (Entity(0, 1, "test"),)), Sentence(("well", "today"), ()))


@pytest.mark.parametrize("by", get_args(ImportanceName))
@pytest.mark.parametrize("model_type", ["bert", "gpt2", "llama"])
def test_blocks_matter_alike(
    folders: dict[str, Path], f32: Device, seen: Seen, model_type: str, by: ImportanceName
) -> None:
    """Each measure of importance gives each block the processor's score, within 0.1 %, and the same order."""
    sites = [open_site(folders[model_type], tiny.federation(layers={"plan": "top:3"}), device) for device in (f32, CPU)]
    there, here = (measure(site.loaded, site.data.prepared, by, seed=0) for site in sites)
    seen.within("score", farthest(there.values(), here.values()), IMPORTANCE)
    assert sorted(there, key=there.__getitem__) == sorted(here, key=here.__getitem__)


@pytest.mark.parametrize("model_type", tiny.MODEL_TYPES)
def test_scores_are_the_processor_s(folders: dict[str, Path], f32: Device, seen: Seen, model_type: str) -> None:
    """Of a model that has learnt something: the mean loss within 0.003 %, and F1 within one entity."""
    there, here = (learnt(folders[model_type], device) for device in (f32, CPU))
    seen.within("mean loss", abs(mean_loss(there.loaded, there.data) / mean_loss(here.loaded, here.data) - 1), LOSS)
    entities = sum(len(line.entities) for note in tiny.notes(NOTES) for line in note.sentences)
    found, expected = evaluate(there.loaded, there.data), evaluate(here.loaded, here.data)
    assert expected.main > 0.2
    for name, value in expected.overall.items():
        seen.within(f"{name} of {value:.3f}", abs(found.overall[name] - value), 2 / entities)
    words = int((predict(there.loaded, there.data) != predict(here.loaded, here.data)).sum())
    seen.note(f"words that are labelled otherwise: {words}")


def learnt(folder: Path, device: Device) -> Site:
    """A site on a device with the state that the processor has trained."""
    site = open_site(folder, FEDERATION, device)
    apply_state(site.loaded, state_of(folder))
    return site


FEDERATION = tiny.federation(layers={"plan": "all"})


@cache
def state_of(folder: Path) -> State:
    """What the processor makes of a model in a few epochs."""
    site = open_site(folder, FEDERATION, CPU)
    section = FEDERATION.training.model_copy(update={"epochs": 30})
    train(site.loaded, read_trainable(site.loaded), site.data, section, seed=1)
    return read_trainable(site.loaded)


def test_it_writes_the_same(f32: Device, seen: Seen) -> None:
    """The shipped model, taught on the device to mark a few lines, writes there what it then writes on a processor.

    Lines of one length and of several in a batch, shown and not shown.
    """
    federation = tiny.federation(
        task={"kind": "extraction", "labels": ("problem", "treatment", "test"), "max_length": 200},
        layers={"plan": "top:6"},
        training={"batch_size": 3, "lr": 3e-3, "epochs": 60},
    )
    notes = [Note("n", LINES)]
    there, here = (load_model(SHIPPED_MODEL, federation, device=device) for device in (f32, CPU))
    shown = make_dataset(there, notes, batch_size=3, seed=0)
    train(there, read_trainable(there), shown, federation.training, seed=1)
    apply_state(here, read_trainable(there))
    assert evaluate(there, shown).main > 0.5
    for data in (shown, make_dataset(there, tiny.notes(2, seed=5), batch_size=4, seed=0)):
        written, expected = predict(there, data).tolist(), predict(here, data).tolist()
        differ = [one != other for one, other in zip(written, expected, strict=True)]
        seen.note(f"answers that differ: {sum(differ)} of {len(differ)}")
        assert written == expected
        assert all(expected)
