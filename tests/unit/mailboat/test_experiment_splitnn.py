from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from edge_client.data import load_notes
from edge_client.model import load_model, read_trainable
from edge_client.trainer import make_dataset, round_seed
from mailboat.experiment import splitnn
from mailboat.experiment.federation import Job
from mailboat.experiment.spec import SplitSection
from mailboat.synth import make_notes
from shared.config import FederationConfig
from shared.errors import ConfigError
from tests.unit.edge_client import tiny


def job(tmp_path: Path, model_type: str = "llama", sites: int = 1, **changes: Any) -> Job:
    """Sites with a few notes, one round, the whole model in float32."""
    make_notes(tmp_path / "notes", sites=sites, notes=3, alpha=1.0, seed=0, heldout=2)
    names = tuple(f"site-{number}" for number in range(1, sites + 1))
    sections = {
        "federation": {"name": "trial", "versions": 1, "sites": names},
        "model": {"base": str(tiny.save_model(tmp_path / "model", model_type))},
        "layers": {"plan": "all"},
        "codec": {"up": "f32", "down": "f32", "slice_kib": 4},
        "training": {"max_grad_norm": 1e6, "warmup": 0.0},
        **changes,
    }
    return Job(
        federation=tiny.federation(**sections),
        folder=tmp_path / "run",
        notes={name: tmp_path / "notes" / name for name in names},
        heldout=tmp_path / "notes" / "heldout",
    )


def untold(_share: float, _word: str) -> None:
    """Progress goes nowhere."""


def whole(federation: FederationConfig, notes: Path) -> dict[str, Any]:
    """The same training without a cut: one model, one AdamW, the same batches, rates and order."""
    loaded = load_model(federation.model.base, federation)
    section, seed = federation.training, federation.federation.seed
    data = make_dataset(loaded, load_notes(notes, loaded.task).notes, batch_size=section.batch_size, seed=seed)
    values = list(loaded.trainable.values())
    optimizer = torch.optim.AdamW(
        [
            {"params": [value for value in values if value.ndim > 1], "weight_decay": section.weight_decay},
            {"params": [value for value in values if value.ndim <= 1], "weight_decay": 0.0},
        ]
    )
    batches = data.prepared.batches
    draws = round_seed(seed, "site-1", 0)
    order = np.random.default_rng(draws).permutation(len(batches))
    loaded.model.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draws)  # the head has dropout
        for done, index in enumerate(order):
            for group in optimizer.param_groups:
                group["lr"] = section.lr * (1 - 0.9 * done / len(batches))
            batch = batches[index]
            logits = loaded.model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits
            loaded.task.loss(logits, batch.targets).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
    return read_trainable(loaded)


@pytest.mark.parametrize("cut", [0.25, 0.5, 0.75])
def test_a_cut_changes_nothing_that_is_learnt(tmp_path: Path, cut: float) -> None:
    """Cut anywhere and with exact messages, both halves end with the weights of the uncut model."""
    given = job(tmp_path)
    outcome = splitnn.train(given, SplitSection(cut=cut), untold)
    ours, theirs = load_file(outcome.state), whole(given.federation, given.notes["site-1"])
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        np.testing.assert_allclose(ours[name], values, rtol=1e-4, atol=1e-6, err_msg=name)


def test_what_travels_is_counted(tmp_path: Path) -> None:
    """Both ways the numbers at the cut and the client's weights once a turn, in float32; up the targets too."""
    given = job(tmp_path, sites=2)
    outcome = splitnn.train(given, SplitSection(cut=0.25), untold)
    loaded = load_model(given.federation.model.base, given.federation)
    tokens = 0
    for path in given.notes.values():
        data = make_dataset(loaded, load_notes(path, loaded.task).notes, batch_size=4, seed=7)
        tokens += sum(batch.ids.numel() for batch in data.prepared.batches)
    lower = [name for name in loaded.trainable if not name.startswith(("model.layers.1", "model.layers.2"))]
    lower = [name for name in lower if not name.startswith(("model.layers.3", "model.norm", "score"))]
    handed_on = 2 * sum(loaded.trainable[name].numel() for name in lower)
    raw = 4 * (tokens * tiny.WIDTH + handed_on)
    # zstd takes a tenth or two off; headers of a tiny model's small messages put as much on.
    assert 0.8 * raw < outcome.down < 1.2 * raw
    assert 0.8 * raw < outcome.up - tokens < 1.2 * raw


def test_lossy_messages_are_smaller_and_felt(tmp_path: Path) -> None:
    """int8 activations and gradients take less, and the training sees what they lost."""
    exact = splitnn.train(job(tmp_path / "a"), SplitSection(), untold)
    lossy = splitnn.train(
        job(tmp_path / "b", codec={"up": "int8", "down": "int8", "slice_kib": 4}), SplitSection(), untold
    )
    assert lossy.up < exact.up
    assert load_file(lossy.state)["score.weight"].tolist() != load_file(exact.state)["score.weight"].tolist()


def test_it_learns(tmp_path: Path) -> None:
    """A BERT too: with its pooler's absence, dropout and mask the loss falls and each round has its score."""
    given = job(tmp_path, "bert", sites=2, federation={"name": "trial", "versions": 3, "sites": ("site-1", "site-2")})
    outcome = splitnn.train(given, SplitSection(), untold)
    assert [point.version for point in outcome.curve] == [0, 1, 2, 3]
    assert len(outcome.train_cpu_s) == 6
    assert outcome.curve[0].up < outcome.curve[1].up < outcome.curve[3].up == outcome.up


def test_it_trains_everything_or_nothing(tmp_path: Path) -> None:
    """A plan with frozen layers is an error that says what is wanted."""
    with pytest.raises(ConfigError, match=r'layers\.plan = "all"'):
        splitnn.train(job(tmp_path, layers={"plan": "2"}), SplitSection(), untold)
