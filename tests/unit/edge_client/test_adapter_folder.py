from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import AutoPeftModelForTokenClassification, PeftModel
from safetensors.numpy import load_file, save_file

from edge_client.adapter_folder import CONFIG, WEIGHTS, read_adapters, write_adapters
from edge_client.model import LoadedModel, apply_state, load_model, version_zero
from edge_client.trainer import evaluate, make_dataset, train
from shared.config import FederationConfig
from shared.errors import ConfigError, UnavailableError
from tests.unit.edge_client import tiny

# peft 0.21 asks transformers 5 for a property by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

TASKS = {
    "ner": ("AutoModelForTokenClassification", ["problem", "treatment", "test"], 7),
    "multilabel": ("AutoModelForSequenceClassification", ["fever", "cbc"], 2),
    "extraction": ("AutoModelForCausalLM", ["problem"], None),
}
IDS = torch.arange(4, 14)[None]


def federation(folder: Path, *, task: str = "ner", **adapter: Any) -> FederationConfig:
    """A federation of adapters of rank 4 in the top two of four blocks."""
    return tiny.federation(
        model={"base": str(folder)},
        task={"kind": task, "labels": TASKS[task][1]},
        adapter={"kind": "lora", "rank": 4, "alpha": 8, **adapter},
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with a tiny model of each type."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("models")
    found = {model_type: tiny.save_model(root / model_type, model_type) for model_type in tiny.MODEL_TYPES}
    # The class that writes text takes the embeddings for its output layer.
    config = json.loads((found["llama"] / "config.json").read_text())
    (found["llama"] / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    return found


def somewhere(settings: FederationConfig) -> LoadedModel:
    """The federation's model in a state of random tensors, about as large as they become."""
    loaded, draw = load_model(settings.model.base, settings), np.random.default_rng(5)
    apply_state(loaded, {name: draw.normal(0, 0.3, shape).astype(np.float32) for name, shape in loaded.shapes.items()})
    return loaded


def logits_of(model: Any) -> torch.Tensor:
    """What a model says of some token ids."""
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=IDS).logits
    return found


CASES = [
    *(("ner", model_type, "lora") for model_type in tiny.MODEL_TYPES),
    ("multilabel", "bert", "lora"),
    ("multilabel", "gpt2", "lora"),
    ("multilabel", "llama", "lora"),
    ("extraction", "llama", "lora"),
    ("ner", "llama", "ffa-lora"),
]


@pytest.mark.parametrize(("task", "model_type", "kind"), CASES)
def test_peft_puts_it_onto_the_base_model(
    folders: dict[str, Path], tmp_path: Path, task: str, model_type: str, kind: str
) -> None:
    """Plain peft over plain transformers gives our logits, bit for bit; nothing is missing, nothing left over."""
    settings = federation(folders[model_type], task=task, kind=kind, rank_stabilized=kind == "lora")
    loaded = somewhere(settings)
    write_adapters(loaded, settings.model, tmp_path / "out")
    auto_class, _, classes = TASKS[task]
    options = {} if classes is None else {"num_labels": classes}
    base = getattr(transformers, auto_class).from_pretrained(folders[model_type], dtype=torch.float32, **options)
    theirs = PeftModel.from_pretrained(base, tmp_path / "out")
    assert torch.equal(logits_of(theirs), logits_of(loaded.model))
    written = load_file(tmp_path / "out" / WEIGHTS)
    assert {name for name in loaded.trainable if name not in written} == set()
    assert any("lora_A" in name for name in written)
    if kind == "lora":
        assert set(written) == set(loaded.trainable)


def test_peft_finds_the_base_model_by_itself(folders: dict[str, Path], tmp_path: Path) -> None:
    """The class for the task loads base and adapters from the folder alone, told how many classes there are."""
    settings = federation(folders["llama"])
    loaded = somewhere(settings)
    write_adapters(loaded, settings.model, tmp_path / "out")
    theirs = AutoPeftModelForTokenClassification.from_pretrained(tmp_path / "out", num_labels=7)
    assert torch.equal(logits_of(theirs), logits_of(loaded.model))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("chest pain")["input_ids"] == loaded.tokenizer("chest pain")["input_ids"]


@pytest.mark.parametrize("kind", ["lora", "ffa-lora"])
def test_what_was_written_is_read_back(folders: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """A fresh model with the folder's adapters scores as the one that was trained; equal ones write equal files."""
    settings = federation(folders["llama"], kind=kind)
    loaded, fresh = (load_model(folders["llama"], settings) for _ in range(2))
    data = make_dataset(loaded, tiny.notes(4), batch_size=4, seed=0)
    train(loaded, version_zero(loaded), data, settings.training, seed=1)
    write_adapters(loaded, settings.model, tmp_path / "out")
    read_adapters(fresh, tmp_path / "out")
    assert torch.equal(logits_of(fresh.model), logits_of(loaded.model))
    assert evaluate(fresh, data) == evaluate(loaded, data)
    write_adapters(fresh, settings.model, tmp_path / "again")
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rank": 2}, "has r = 4, the federation means 2"),
        ({"alpha": 16}, "has lora_alpha = 8, the federation means 16"),
        ({"rank_stabilized": True}, "has use_rslora = False"),
        ({"targets": ["v_proj"]}, "has target_modules = "),
    ],
)
def test_adapters_of_another_make_are_refused(
    folders: dict[str, Path], tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    """What would be computed with another scale, or elsewhere, is not loaded; the message says what differs."""
    settings = federation(folders["llama"])
    write_adapters(load_model(folders["llama"], settings), settings.model, tmp_path)
    other = load_model(folders["llama"], federation(folders["llama"], **change))
    with pytest.raises(ConfigError, match=says):
        read_adapters(other, tmp_path)


def test_adapters_for_other_labels_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    """The head is part of the folder, and must have the model's classes."""
    settings = federation(folders["llama"])
    write_adapters(load_model(folders["llama"], settings), settings.model, tmp_path)
    fewer = settings.model_copy(update={"task": tiny.federation(task={"labels": ["problem"]}).task})
    with pytest.raises(ConfigError, match=r"score.bias has shape \(7,\), this model wants \(3,\)"):
        read_adapters(load_model(folders["llama"], fewer), tmp_path)


@pytest.mark.parametrize("case", ["no tensors", "not json", "a tensor short"])
def test_a_damaged_folder_is_named(folders: dict[str, Path], tmp_path: Path, case: str) -> None:
    """Files that are missing, cut or incomplete are a configuration error that names the folder."""
    settings = federation(folders["llama"])
    loaded = load_model(folders["llama"], settings)
    write_adapters(loaded, settings.model, tmp_path)
    match case:
        case "no tensors":
            (tmp_path / WEIGHTS).write_bytes(b"12345678")
        case "not json":
            (tmp_path / CONFIG).write_text("{")
        case "a tensor short":
            tensors = load_file(tmp_path / WEIGHTS)
            del tensors[min(tensors)]
            save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(ConfigError, match="has shape None" if case == "a tensor short" else "cannot be read") as caught:
        read_adapters(loaded, tmp_path)
    assert str(tmp_path) in caught.value.message


def test_residuals_are_in_no_adapter(folders: dict[str, Path], tmp_path: Path) -> None:
    """Under fedex-lora the adapters alone are not the version, and are not written as if they were."""
    settings = federation(folders["llama"], kind="fedex-lora")
    with pytest.raises(ConfigError, match="more than its adapters") as caught:
        write_adapters(load_model(folders["llama"], settings), settings.model, tmp_path / "out")
    assert "--merged" in caught.value.hint
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_said(folders: dict[str, Path], tmp_path: Path) -> None:
    """A file in the folder's place is named with the reason."""
    settings = federation(folders["llama"])
    (tmp_path / "out").write_text("")
    with pytest.raises(UnavailableError, match="out cannot be written"):
        write_adapters(load_model(folders["llama"], settings), settings.model, tmp_path / "out")


def test_the_configuration_is_plain(folders: dict[str, Path], tmp_path: Path) -> None:
    """adapter_config.json says rank, blocks, targets and head, as a person would have written it."""
    settings = federation(folders["bert"], task="multilabel", targets=["query", "value"])
    write_adapters(load_model(folders["bert"], settings), settings.model, tmp_path)
    said = json.loads((tmp_path / CONFIG).read_text())
    wanted = {
        "base_model_name_or_path": str(folders["bert"]),
        "peft_type": "LORA",
        "task_type": "SEQ_CLS",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["attention.self.query", "attention.self.value"],
        "layers_to_transform": [2, 3],
        "modules_to_save": ["classifier", "bert.pooler"],
        "inference_mode": True,
    }
    assert {key: said[key] for key in wanted} == wanted
