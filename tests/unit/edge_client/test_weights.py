"""Pre-trained tensors that are in memory when they are needed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from edge_client.model import LoadedModel, load_model
from edge_client.weights import BLOCK_VALUES, absent, read_checkpoint
from shared.errors import ConfigError
from tests.unit.edge_client import tiny

FEDERATION = tiny.federation()
EMBEDDINGS = {"bert": "bert.embeddings.word_embeddings.weight", "gpt2": "transformer.wte.weight"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with a tiny model of each type."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("models")
    return {model_type: tiny.save_model(root / model_type, model_type) for model_type in tiny.MODEL_TYPES}


def bits(model: torch.nn.Module) -> dict[str, bytes]:
    """All parameters' bytes by name."""
    return {name: parameter.detach().numpy().tobytes() for name, parameter in model.named_parameters()}


def logits(loaded: LoadedModel) -> torch.Tensor:
    """The whole model's logits of a few tokens."""
    with torch.no_grad():
        found: torch.Tensor = loaded.model(input_ids=torch.arange(6).view(2, 3)).logits
    return found


@pytest.mark.parametrize("model_type", tiny.MODEL_TYPES)
def test_each_tensor_lands_where_the_library_puts_it(folders: dict[str, Path], model_type: str) -> None:
    """The backbone is the library's own, bit for bit, under the names that it has there."""
    loaded = load_model(folders[model_type], FEDERATION)
    theirs = transformers.AutoModelForTokenClassification.from_pretrained(folders[model_type], dtype=torch.float32)
    ours, wanted = bits(loaded.model), bits(theirs)
    assert ours.keys() == wanted.keys()
    head = f"{loaded.family.head}."
    assert all(ours[name] == wanted[name] for name in ours if not name.startswith(head))


@pytest.mark.parametrize("model_type", tiny.MODEL_TYPES)
def test_what_lies_below_the_trained_blocks_can_stay_on_the_disk(folders: dict[str, Path], model_type: str) -> None:
    """With `suffix` two blocks and the embeddings are absent and hashed all the same; they come and go as one wants."""
    whole, loaded = (
        load_model(folders[model_type], FEDERATION),
        load_model(folders[model_type], FEDERATION, suffix=True),
    )
    below = {f"{loaded.family.blocks}.{index}" for index in (0, 1)}
    away = set(absent(loaded.model))
    embeddings = EMBEDDINGS.get(model_type, "model.embed_tokens.weight")
    assert away == {embeddings} | {name for name in bits(whole.model) if name.startswith(tuple(f"{b}." for b in below))}
    assert loaded.frozen_sha256 == whole.frozen_sha256
    assert loaded.total_parameters == whole.total_parameters
    with pytest.raises((NotImplementedError, RuntimeError)):
        logits(loaded)
    with loaded.weights.whole(loaded.model):
        assert bits(loaded.model) == bits(whole.model)
        assert torch.equal(logits(loaded), logits(whole))
    assert set(absent(loaded.model)) == away

    def fail() -> None:
        with loaded.weights.whole(loaded.model):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert set(absent(loaded.model)) == away


@pytest.mark.parametrize(("plan", "count"), [("1,3", 1), ("0,3", 0), ("top:1", 3)])
def test_only_blocks_below_the_first_trained_one_stay_away(folders: dict[str, Path], plan: str, count: int) -> None:
    """What is frozen above it runs in each step."""
    loaded = load_model(folders["llama"], tiny.federation(layers={"plan": plan}), suffix=True)
    blocks = {int(name.split(".")[2]) for name in absent(loaded.model) if ".layers." in name}
    assert blocks == set(range(count))


def test_a_whole_plan_keeps_the_whole_model(folders: dict[str, Path]) -> None:
    """Where the embeddings are trained nothing is absent."""
    loaded = load_model(folders["llama"], tiny.federation(layers={"plan": "all"}), suffix=True)
    assert absent(loaded.model) == ()


def test_embeddings_that_write_the_answer_stay(tmp_path: Path) -> None:
    """A model whose output layer is its input embedding needs it above the blocks; both remain one parameter."""
    folder = tiny.save_model(tmp_path / "model", "llama")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "tie_word_embeddings": True}))
    federation = tiny.federation(task={"kind": "extraction", "max_length": 64})
    loaded = load_model(folder, federation, suffix=True)
    assert {name.split(".")[1] for name in absent(loaded.model)} == {"layers"}
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight


def test_adapters_leave_what_is_below_them_away(folders: dict[str, Path]) -> None:
    """With LoRA in the top blocks the lower ones stay on the disk, and the hash is that of the loaded model."""
    federation = tiny.federation(adapter={"kind": "lora", "rank": 2})
    loaded = load_model(folders["llama"], federation, suffix=True)
    assert {name.split(".")[2] for name in absent(loaded.model) if ".layers." in name} == {"0", "1"}
    assert loaded.frozen_sha256 == load_model(folders["llama"], federation).frozen_sha256


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_are_widened_as_torch_does(folders: dict[str, Path], tmp_path: Path, dtype: torch.dtype) -> None:
    """A checkpoint in half or double precision gives torch's own float32, in memory and in the hash."""
    folder = shutil.copytree(folders["llama"], tmp_path / "model")
    stored = {name: values.to(dtype) for name, values in load_file(folder / "model.safetensors").items()}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    loaded, lazy = load_model(folder, FEDERATION), load_model(folder, FEDERATION, suffix=True)
    named = dict(loaded.model.named_parameters())
    for name, values in stored.items():
        assert torch.equal(named[f"model.{name}"], values.float())
    assert lazy.frozen_sha256 == loaded.frozen_sha256


def test_shards_are_read(folders: dict[str, Path], tmp_path: Path) -> None:
    """A checkpoint in several files is the same model."""
    whole = transformers.AutoModel.from_pretrained(folders["llama"])
    folder = shutil.copytree(folders["llama"], tmp_path / "model")
    (folder / "model.safetensors").unlink()
    whole.save_pretrained(folder, max_shard_size="10KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    ours, theirs = (load_model(each, FEDERATION, suffix=True) for each in (folder, folders["llama"]))
    assert ours.frozen_sha256 == theirs.frozen_sha256
    with ours.weights.whole(ours.model), theirs.weights.whole(theirs.model):
        assert bits(ours.model) == bits(theirs.model)


def test_a_tensor_of_many_blocks_is_read_whole(tmp_path: Path) -> None:
    """A block's length does not show in what comes out."""
    values = np.random.default_rng(0).normal(size=BLOCK_VALUES + 5).astype(np.float32)
    save_file({"w": torch.from_numpy(values)}, tmp_path / "model.safetensors")
    read = list(read_checkpoint(tmp_path)["w"].values())
    assert [block.size for block in read] == [BLOCK_VALUES, 5]
    assert np.array_equal(np.concatenate(read), values)


def test_files_that_change_under_a_running_site_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    """Weights that were replaced since the model was opened are not mixed with those from before."""
    folder = shutil.copytree(folders["llama"], tmp_path / "model")
    loaded = load_model(folder, FEDERATION, suffix=True)
    tensors = load_file(folder / "model.safetensors")
    save_file({name: values + 1 for name, values in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match="was changed while it was in use"), loaded.weights.whole(loaded.model):
        pass


@pytest.mark.parametrize("length", [4, 40, 4000])
def test_a_file_that_was_cut_short_is_refused(folders: dict[str, Path], tmp_path: Path, length: int) -> None:
    """The message names the file, before anything is loaded."""
    folder = shutil.copytree(folders["llama"], tmp_path / "model")
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(length)
    with pytest.raises(ConfigError, match=r"model.safetensors: the weights cannot be read"):
        load_model(folder, FEDERATION)
