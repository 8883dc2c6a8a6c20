"""`mailboat predict` with exported models of each task, beside transformers alone."""

from __future__ import annotations

import contextlib
import json
import re
import runpy
import shutil
import stat
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from edge_client.adapter_folder import write_adapters
from edge_client.data import AnyNote, Entity, Note, Sentence, load_notes
from edge_client.model import export, load_model, read_trainable, seal
from edge_client.tasks.extraction import ExtractionTask
from edge_client.tasks.markup import read_markup
from edge_client.tasks.relations import RelationsTask
from edge_client.trainer import make_dataset, train
from mailboat import about, cli, console
from mailboat.about import Provenance, write_about
from mailboat.modelling import score_model
from mailboat.synth.write import write_i2b2
from shared.config import ComputeSection, FederationConfig
from tests.unit.edge_client import tiny

pytestmark = pytest.mark.slow

TEXTS = {
    "a": "patient was given aspirin\n\nchest pain noted and fever",
    "b": "troponin showed pneumonia , then warfarin for chest pain",
}
LABELS = ("fever", "pain", "other")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaMA."""
    torch.set_num_threads(1)
    return tiny.save_model(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """The texts as files."""
    (tmp_path / "notes").mkdir()
    for name, text in TEXTS.items():
        (tmp_path / "notes" / f"{name}.txt").write_text(text)
    return tmp_path / "notes"


def exported(
    base: Path, out: Path, kind: str, *, learns: Sequence[AnyNote] = (), adapters: bool = False, **changes: Any
) -> FederationConfig:
    """Write a model, or its adapters, for a task as `mailboat export` does, one that has learnt `learns` by heart."""
    task = {"kind": kind, "max_length": 64, **({} if kind in {"ner", "extraction"} else {"labels": LABELS})}
    federation = tiny.federation(model={"base": str(base)}, **{"task": task, **changes})
    loaded = load_model(base, federation)
    if learns:
        data = make_dataset(loaded, learns, batch_size=8, seed=0)
        train(loaded, read_trainable(loaded), data, federation.training, seed=1)
    if adapters:
        write_adapters(loaded, federation.model, out)
    else:
        export(loaded, out)
    plan = seal(loaded, federation)
    found = Provenance(
        federation="trial",
        fingerprint=plan.fingerprint,
        base="llama",
        frozen_sha256=plan.frozen_sha256,
        architecture=plan.architecture,
        version=1,
        file="published state",
        file_digest="0" * 64,
        trained_parameters=plan.trained_parameters,
        total_parameters=plan.total_parameters,
        layers=plan.layers,
        personal=(),
        site=None,
        parts=(),
        steps=(),
        software="mailboat",
    )
    write_about(out, federation, found, adapters=adapters)
    return federation


def predicted(model: Path, notes: Path, out: Path, *more: str) -> dict[str, Any]:
    """What the command writes, by id."""
    words = ["predict", "--model", str(model), "--notes", str(notes), "--out", str(out), *more]
    assert console.run(lambda: cli.app(words)) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    return {row.pop("id"): row for row in rows}


def test_entities_are_those_of_transformers_alone(base: Path, notes: Path, tmp_path: Path) -> None:
    """For each word the likeliest class at its last token; line and words are counted, and no word is written."""
    exported(base, tmp_path / "model", "ner", learns=tiny.notes(16), training={"epochs": 12, "lr": 1e-2})
    found = predicted(tmp_path / "model", notes, tmp_path / "found.jsonl")
    model = AutoModelForTokenClassification.from_pretrained(tmp_path / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    for name, text in TEXTS.items():
        lines = [line.split() for line in text.split("\n")]
        ids: list[int] = []
        spoken = []
        for number, words in enumerate(lines, start=1):
            if ids and words:
                ids += tokenizer("\n", add_special_tokens=False)["input_ids"]
            for index, word in enumerate(words):
                ids += tokenizer(word if index == 0 else f" {word}", add_special_tokens=False)["input_ids"]
                spoken.append((number, index, len(ids) - 1))
        with torch.no_grad():
            classes = model(input_ids=torch.tensor([ids])).logits[0].argmax(-1).tolist()
        tags = {(number, index): model.config.id2label[classes[token]] for number, index, token in spoken}
        marked = {
            (each["line"], index): each["label"]
            for each in found[name]["entities"]
            for index in range(each["start"], each["end"])
        }
        assert marked == {place: tag[2:] for place, tag in tags.items() if tag != "O"}
    assert sum(len(each["entities"]) for each in found.values()) >= 3
    text = (tmp_path / "found.jsonl").read_text()
    assert "aspirin" not in text
    assert stat.S_IMODE((tmp_path / "found.jsonl").stat().st_mode) == 0o600


def test_the_script_in_the_page_counts_as_we_do(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Transformers alone, fed as docs/models.md says, gives the strict F1 that `mailboat evaluate` reports."""
    learns = tiny.notes(16, lines=12)  # of more tokens than a window takes
    exported(base, tmp_path / "model", "ner", learns=learns, training={"epochs": 12, "lr": 1e-2})
    write_i2b2(tmp_path / "notes", learns)
    page = Path(__file__).resolve().parents[3] / "docs" / "models.md"
    script = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)[-1]
    (tmp_path / "strict.py").write_text(script)
    monkeypatch.setattr(sys, "argv", ["strict.py", str(tmp_path / "model"), str(tmp_path / "notes"), "64"])
    capsys.readouterr()
    runpy.run_path(str(tmp_path / "strict.py"))
    told = float(capsys.readouterr().out.removeprefix("strict F1 "))
    federation = about.federation_of(tmp_path / "model")
    compute = ComputeSection(device="cpu")
    measured = score_model(tmp_path / "model", federation, tmp_path / "notes", compute=compute, skip_bad=False)
    assert told == round(100 * measured.scores.overall["strict_f1"], 2)
    assert told > 10


@pytest.mark.parametrize("kind", ["classification", "multilabel"])
def test_labels_are_those_of_transformers_alone(base: Path, notes: Path, tmp_path: Path, kind: str) -> None:
    """The likeliest label, or each that is likelier true than false, by the exported model's own names."""
    exported(base, tmp_path / "model", kind)
    found = predicted(tmp_path / "model", notes, tmp_path / "found.jsonl")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    for name, text in TEXTS.items():
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids[:64] if len(ids) <= 64 else ids[:16] + ids[-48:]])).logits[0]
        names = model.config.id2label
        if kind == "classification":
            assert found[name] == {"label": names[int(logits.argmax())]}
        else:
            assert found[name] == {"labels": [names[index] for index in np.flatnonzero(logits.numpy() > 0)]}


def writing(base: Path, folder: Path) -> Path:
    """A copy of a tiny LLaMA that reads long prompts, and writes with its own embeddings."""
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text())
    longer = {"max_position_embeddings": 512, "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps({**config, **longer}))
    return folder


def test_what_a_model_writes_is_read(base: Path, notes: Path, tmp_path: Path) -> None:
    """The entities of a line that it knows by heart are those in the text that transformers alone has it write."""
    writer = writing(base, tmp_path / "writer")
    line = Sentence(("chest", "pain", "noted"), (Entity(0, 2, "problem"),))
    task = {"kind": "extraction", "max_length": 400}
    training = {"epochs": 150, "lr": 1e-2}
    learns = [Note("n", (line, Sentence(("cbc", "today"), (Entity(0, 1, "test"),))))]
    federation = exported(
        writer, tmp_path / "model", "extraction", learns=learns, task=task, training=training, layers={"plan": "all"}
    )
    (notes / "b.txt").write_text("\n" + " ".join(line.tokens))
    found = predicted(tmp_path / "model", notes, tmp_path / "found.jsonl")
    assert found["b"] == {"entities": [{"line": 2, "start": 0, "end": 2, "label": "problem"}]}
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "model")
    prompt = ExtractionTask(federation.task.labels).prompt(line)
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    written = model.generate(input_ids=ids, do_sample=False, max_new_tokens=60, pad_token_id=tokenizer.eos_token_id)
    answer = tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
    assert read_markup(answer, line.tokens, federation.task.labels) == line.entities


def test_relations_are_told_of_marked_entities(
    base: Path, notes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder with txt/ and concept/ gets what the model learnt of its entities; texts alone are refused."""
    labels = ("PIP", "present")
    folder = tiny.write_relations(tmp_path / "marked", tiny.notes(1, lines=1))
    learns = load_notes(folder, RelationsTask(labels)).notes
    exported(
        writing(base, tmp_path / "writer"),
        tmp_path / "model",
        "relations",
        learns=learns,
        task={"kind": "relations", "labels": labels, "max_length": 400},
        training={"epochs": 150, "lr": 1e-2},
        layers={"plan": "all"},
    )
    for part in ("rel", "ast"):
        shutil.rmtree(folder / part)
    found = predicted(tmp_path / "model", folder, tmp_path / "found.jsonl")
    first, second = (learns[0].heads[place].head for place in (0, 1))
    head = {"start": first.start, "end": first.end}
    assert found == {
        "note-000": {
            "relations": [
                {"line": 1, "head": head, **head, "label": "present"},
                {"line": 1, "head": head, "start": second.start, "end": second.end, "label": "PIP"},
            ]
        }
    }
    assert "import AutoModelForCausalLM, AutoTokenizer" in (tmp_path / "model" / "README.md").read_text()
    words = ["predict", "--model", str(tmp_path / "model"), "--notes", str(notes), "--out", str(tmp_path / "more")]
    assert console.run(lambda: cli.app(words)) == 3
    told = " ".join(capsys.readouterr().err.split())
    assert "notes has no marked entities hint: relations are found between entities that are marked" in told
    assert not (tmp_path / "more").exists()


# peft 0.21 asks transformers 5 for a property by its old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("kind", ["ner", "classification", "multilabel"])
def test_adapters_find_what_the_whole_model_finds(base: Path, notes: Path, tmp_path: Path, kind: str) -> None:
    """On a base model that lies elsewhere; and the lines of python in their card load them to the same logits."""
    moved = Path(shutil.copytree(base, tmp_path / "moved"))
    settings: dict[str, Any] = {"adapter": {"kind": "lora", "rank": 4, "alpha": 8}}
    if kind == "ner":
        settings |= {"learns": tiny.notes(16), "training": {"epochs": 12, "lr": 1e-2}}
    for adapters in (False, True):
        exported(moved, tmp_path / f"adapters-{adapters}", kind, adapters=adapters, **settings)
    moved = moved.rename(tmp_path / "here")
    found = predicted(tmp_path / "adapters-True", notes, tmp_path / "found.jsonl", "--base", str(moved))
    assert found == predicted(tmp_path / "adapters-False", notes, tmp_path / "whole.jsonl")

    card = (tmp_path / "adapters-True" / "README.md").read_text()
    (lines,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    names: dict[str, Any] = {"BASE": moved}
    with contextlib.chdir(tmp_path / "adapters-True"):
        exec(lines, names)  # noqa: S102 - our own card, as its reader would run it
    ids = names["tokenizer"](TEXTS["a"], return_tensors="pt")["input_ids"]
    auto = AutoModelForTokenClassification if kind == "ner" else AutoModelForSequenceClassification
    with torch.no_grad():
        whole = auto.from_pretrained(tmp_path / "adapters-False").eval()(input_ids=ids).logits
        torch.testing.assert_close(names["model"].eval()(input_ids=ids).logits, whole, rtol=1e-4, atol=1e-5)
    assert "mailboat predict --model . --base BASE" in card


def test_adapters_on_another_base_model_are_refused(
    base: Path, notes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One number of one frozen tensor is enough; a base model that is nowhere is asked for by the option's name."""
    moved = Path(shutil.copytree(base, tmp_path / "moved"))
    exported(moved, tmp_path / "adapters", "ner", adapters=True, adapter={"kind": "ffa-lora", "rank": 4, "alpha": 8})
    moved = moved.rename(tmp_path / "here")
    words = ["predict", "--model", str(tmp_path / "adapters"), "--notes", str(notes), "--out", str(tmp_path / "found")]
    assert console.run(lambda: cli.app(words)) == 2
    assert "hint: name its folder here: predict --base" in capsys.readouterr().err.replace("\n", " ")
    tensors = load_file(moved / "model.safetensors")
    tensors[min(tensors)].reshape(-1)[0] += 1
    save_file(tensors, moved / "model.safetensors", {"format": "pt"})
    assert console.run(lambda: cli.app([*words, "--base", str(moved)])) != 0
    assert "frozen weights" in capsys.readouterr().err
    assert not (tmp_path / "found").exists()


def test_a_gpu_that_is_not_there_is_missed(
    base: Path, notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Asked for by name it is an error, and nothing is written."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    exported(base, tmp_path / "model", "ner")
    words = ["predict", "--model", str(tmp_path / "model"), "--notes", str(notes), "--out", str(tmp_path / "found")]
    for device, said in (("cuda", "no GPU of CUDA"), ("gpu", "must be auto, cpu, cuda or cuda:N")):
        assert console.run(partial(cli.app, [*words, "--device", device])) == 2
        assert said in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "found").exists()


def test_what_is_wrong_is_said(base: Path, notes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that is there, a folder without its task, two notes of one id, a bad line: nothing is left behind."""
    federation = exported(base, tmp_path / "model", "ner")
    out = tmp_path / "found.jsonl"
    words = ["predict", "--model", str(tmp_path / "model"), "--notes", str(notes), "--out", str(out)]

    def refused(status: int) -> str:
        capsys.readouterr()
        assert console.run(lambda: cli.app(words)) == status
        return capsys.readouterr().err

    out.write_text("mine")
    assert "is there already" in refused(2)
    assert out.read_text() == "mine"
    out.unlink()
    (notes / "c.jsonl").write_text('{"id": "a", "text": "again"}\n')
    assert "two notes have the same id" in refused(3)
    (notes / "c.jsonl").write_text('{"id": "c"}\n{"id": "d", "text": "fever"}\n')
    assert "c.jsonl, line 1" in refused(3)
    assert not out.exists()
    assert not list(tmp_path.glob(".found*"))
    assert console.run(lambda: cli.app([*words, "--skip-bad"])) == 0
    assert "3 notes, 1 left out as unreadable" in capsys.readouterr().err
    out.unlink()
    (notes / "c.jsonl").unlink()
    (tmp_path / "model" / "mailboat.json").unlink()
    assert "has no mailboat.json" in refused(2)
    words[2] = str(tmp_path / "nowhere")
    assert "nowhere: no such folder" in refused(2)
    words[2] = str(tmp_path / "model")
    (tmp_path / "federation.toml").write_text(
        f'[federation]\nname = "x"\n[model]\nbase = "{base}"\n[task]\nmax_length = {federation.task.max_length}\n'
        '[layers]\nplan = "top:2"\n'
    )
    assert console.run(lambda: cli.app([*words, "--federation", str(tmp_path / "federation.toml")])) == 0
