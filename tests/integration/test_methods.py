"""Methods by name from federation.toml over a real Mosquitto: codecs, with the toy, and tasks, with tiny real models.

Rules of merging run in test_merging_rules.py, what is trained in test_layers.py, adapters in test_adapters.py and
test_adapter_keys.py, personal tensors in test_personal.py, privacy in test_private_run.py, test_private_site.py and
test_private_training.py, modes in test_run.py.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from coordinator.proof import prove
from coordinator.records import VersionCommitted
from edge_client.statefile import read_state
from mailboat.commands.export import evaluate, export
from mailboat.commands.predict import predict
from shared.config import CodecName, FederationConfig, StateCodecName
from shared.configfile import load_config
from shared.plan import load_plan
from tests.helpers import run_async
from tests.tiny_run import metrics_of, run_tiny, write_tiny
from tests.toys import INITIAL, ToyTrained, ToyTrainer, toy_coordinator, toy_records, toy_site, write_toy
from tests.unit.edge_client import tiny

pytestmark = pytest.mark.integration

PARAMETERS = 640
SENT = {"topk2": PARAMETERS // 64, "topk2x4": PARAMETERS // 16}
"""Values of an update, where they are not all."""
TEXTS = (("fever", "fever was noted"), ("cough", "then cough showed"), ("fever", "patient given fever"))
SCORES = {
    "ner": "strict_f1",
    "classification": "micro_f1",
    "multilabel": "micro_f1",
    "extraction": "strict_f1",
    "relations": "strict_f1",
}


class Adding(ToyTrainer):
    """Adds one to whatever state it was sent."""

    async def train(
        self, state: Path, base_version: int, delta: Path, *, on_progress: Callable[[float, float], None]
    ) -> ToyTrained:
        """See Trainer."""
        on_progress(1.0, 0.0)
        save_file({name: np.ones_like(values) for name, values in read_state(state).items()}, delta)
        return ToyTrained(10, {})


@pytest.mark.parametrize(("up", "down"), [*zip(get_args(CodecName), cycle(get_args(StateCodecName)), strict=False)])
def test_every_codec_runs_by_its_name(up: str, down: str, tmp_path: Path, mosquitto_url: str) -> None:
    """Up and down: two versions of a site, proven; what arrived is what the codec leaves of a one everywhere."""
    write_toy(tmp_path, mosquitto_url, sites=1, versions=2, parameters=PARAMETERS, slice_kib=4, codec=up, down=down)

    async def everybody() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(toy_coordinator(tmp_path / "coordinator.toml"))
            group.create_task(toy_site(tmp_path / "site-1.toml", trainer=Adding(step=1, seconds=0, examples=1)))

    run_async(everybody(), timeout_s=60)
    federation = load_config(tmp_path / "federation.toml", FederationConfig)
    storage = tmp_path / "coordinator"
    assert prove(storage, federation, load_plan(storage / "plan.json", federation)).findings == ()
    versions = [record.version for record in toy_records(tmp_path) if isinstance(record, VersionCommitted)]
    assert versions == [1, 2]
    master = load_file(storage / "masters" / "v00000001.safetensors")
    moved = sum(int((values > INITIAL + 0.9).sum()) for values in master.values())
    assert moved == SENT.get(up, PARAMETERS)


LABELS = {"extraction": ("problem", "treatment", "test"), "relations": ("PIP", "present")}
"""Of the tasks in which the model writes."""


def write_notes(root: Path, name: str, kind: str) -> str:
    """Write a site's few notes for a task, and return what they are called."""
    if kind == "relations":
        return tiny.write_relations(root / f"{name}-notes", tiny.notes(2, lines=1)).name
    if kind == "extraction":
        return tiny.write_conll(root / f"{name}.conll", tiny.notes(2, lines=1)).name
    rows = [
        {"id": f"n{number}", "text": text, **({"label": label} if kind == "classification" else {"labels": [label]})}
        for number, (label, text) in enumerate(TEXTS)
    ]
    (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"{name}.jsonl"


@pytest.mark.parametrize("kind", ["classification", "multilabel", "extraction", "relations"])
def test_every_task_runs_by_its_name(
    kind: str, tmp_path: Path, mosquitto_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two sites, one version: each update tells the task's own score of what it held back.

    Where notes have labels, the model that comes out is the version's, and predicts what the version is scored by.
    """
    writes = kind in LABELS
    labels = json.dumps(LABELS.get(kind, ("fever", "cough")))
    task = f'kind = "{kind}"\nlabels = {labels}\nmax_length = {400 if writes else 32}\n'
    training = "" if writes else "[training]\nepochs = 20\nlr = 0.02\n"
    write_tiny(tmp_path, mosquitto_url, versions=1, task=task, federation=f'[layers]\nplan = "top:1"\n{training}')
    if writes:
        config = json.loads((tmp_path / "model" / "config.json").read_text())
        longer = {"max_position_embeddings": 512, "tie_word_embeddings": True}
        (tmp_path / "model" / "config.json").write_text(json.dumps(config | longer))
    for name in ("site-1", "site-2"):
        path = tmp_path / f"{name}.toml"
        path.write_text(path.read_text().replace(f"{name}.conll", write_notes(tmp_path, name, kind)))
    run_tiny(tmp_path)
    said = metrics_of(tmp_path)
    assert set(said) == {("site-1", 0), ("site-2", 0)}
    assert all(SCORES[kind] in metrics for metrics in said.values())
    if not writes:
        master = load_file(tmp_path / "coordinator" / "masters" / "v00000001.safetensors")
        export(out=tmp_path / "exported", config=tmp_path / "coordinator.toml")
        exported = load_file(tmp_path / "exported" / "model.safetensors")
        assert np.array_equal(exported["score.weight"], master["score.weight"])
        right = {(str(row), label) for row, (label, _) in enumerate(TEXTS)}
        found = predicted(tmp_path, tmp_path / "exported")
        assert found & right
        capsys.readouterr()
        evaluate(notes=tmp_path / "site-1.jsonl", config=tmp_path / "coordinator.toml", as_json=True)
        micro_f1 = 2 * len(found & right) / (len(found) + len(right))
        assert json.loads(capsys.readouterr().out)["micro_f1"] == pytest.approx(micro_f1)


def predicted(root: Path, model: Path) -> set[tuple[str, str]]:
    """Number and label of each of the texts that the model in a folder gives one, told nothing but the words."""
    bare, out = root / "bare.jsonl", root / "found.jsonl"
    bare.write_text("".join(json.dumps({"id": str(row), "text": text}) + "\n" for row, (_, text) in enumerate(TEXTS)))
    predict(model=model, notes=bare, out=out)
    rows = map(json.loads, out.read_text().splitlines())
    return {(row["id"], label) for row in rows for label in row.get("labels", [row.get("label")])}
