from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import nn
from transformers import AutoModelForTokenClassification
from transformers.pytorch_utils import Conv1D

from edge_client.adapters import PREFIX, targets
from edge_client.layers import FAMILIES
from edge_client.model import (
    LoadedModel,
    State,
    apply_state,
    export,
    load_model,
    read_personal,
    read_trainable,
    seal,
    seal_plan,
    train_only,
    version_zero,
)
from edge_client.trainer import evaluate, make_dataset, train
from shared.config import AdapterSection, FederationConfig
from shared.errors import ConfigError
from tests.unit.edge_client import tiny

KINDS = ("lora", "ffa-lora", "fedsa-lora", "fedex-lora")
BLOCK = {
    "bert": "bert.encoder.layer.{}.",
    "gpt2": "transformer.h.{}.",
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), "model.layers.{}."),
}


def federation(kind: str = "lora", plan: str = "top:2", **adapter: Any) -> FederationConfig:
    """A federation of adapters of rank 4 in the top two of four blocks."""
    return tiny.federation(layers={"plan": plan}, adapter={"kind": kind, "rank": 4, "alpha": 8, **adapter})


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with a tiny model of each type."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("models")
    return {model_type: tiny.save_model(root / model_type, model_type) for model_type in tiny.MODEL_TYPES}


def logits_of(loaded: LoadedModel) -> torch.Tensor:
    """What the model says of some token ids."""
    with torch.no_grad():
        found: torch.Tensor = loaded.model(input_ids=torch.arange(4, 24).reshape(2, 10)).logits
    return found


def begun(loaded: LoadedModel) -> State:
    """Version 0 as a site has it, with what is its own."""
    return version_zero(loaded) | read_personal(loaded)


def moved(loaded: LoadedModel, seed: int = 5) -> State:
    """The same with random tensors, about as large as they become."""
    draw = np.random.default_rng(seed)
    return {name: draw.normal(0, 0.3, there.shape).astype(np.float32) for name, there in begun(loaded).items()}


@pytest.mark.parametrize("model_type", tiny.MODEL_TYPES)
def test_every_linear_layer_of_the_chosen_blocks_gets_an_adapter(folders: dict[str, Path], model_type: str) -> None:
    """Two factors for each linear layer of the two blocks, and the head, are trained, by peft's names; nothing else."""
    loaded = load_model(folders[model_type], federation())
    family, parameters = FAMILIES[model_type], dict(loaded.model.named_parameters())
    wanted = {
        f"{PREFIX}{BLOCK[model_type].format(block)}{path}.lora_{factor}.weight"
        for block in (2, 3)
        for path in family.linears
        for factor in "AB"
    } | {f"{PREFIX}{family.head}.weight", f"{PREFIX}{family.head}.bias"}
    assert set(loaded.trainable) == wanted
    assert list(loaded.trainable) == sorted(wanted)
    trained = {id(parameter) for parameter in loaded.trainable.values()}
    assert {id(parameter) for parameter in parameters.values() if parameter.requires_grad} == trained
    plan, _ = seal_plan(federation(), folders[model_type])
    assert (plan.layers, set(plan.tensors)) == ((2, 3), wanted)
    assert plan.trained_parameters == sum(parameter.numel() for parameter in loaded.trainable.values())
    bare = load_model(folders[model_type], tiny.federation())
    assert plan.total_parameters == sum(parameter.numel() for parameter in bare.model.parameters())
    block = bare.model.get_submodule(BLOCK[model_type].format(0)[:-1])
    assert {path for path, module in block.named_modules() if isinstance(module, nn.Linear | Conv1D)} == {
        *family.linears
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", ["bert", "gpt2", "llama"])
def test_version_0_computes_what_the_base_model_does(folders: dict[str, Path], model_type: str, kind: str) -> None:
    """With B at 0 the logits are those of the model without adapters, bit for bit, and residuals begin at 0."""
    bare, loaded = load_model(folders[model_type], tiny.federation()), load_model(folders[model_type], federation(kind))
    apply_state(loaded, begun(loaded))
    assert torch.equal(logits_of(bare), logits_of(loaded))


def test_everybody_draws_the_same_adapters(folders: dict[str, Path]) -> None:
    """A follows from the federation's seed alone; another seed draws another."""
    torch.manual_seed(1)
    first, state = seal_plan(federation(), folders["llama"])
    torch.manual_seed(2)
    second, again = seal_plan(federation(), folders["llama"])
    other = read_trainable(load_model(folders["llama"], federation().model_copy(update={"federation": _seeded(8)})))
    name = f"{PREFIX}model.layers.3.mlp.up_proj.lora_A.weight"
    assert first.fingerprint == second.fingerprint
    assert all(np.array_equal(values, again[each]) for each, values in state.items())
    assert np.abs(state[name]).min() > 0
    assert not np.array_equal(state[name], other[name])


def _seeded(seed: int) -> object:
    return tiny.federation(federation={"seed": seed}).federation


def test_the_frozen_hash_covers_the_whole_base(folders: dict[str, Path], tmp_path: Path) -> None:
    """Whatever is adapted, the hash is that of all weights but the head; a weight of an adapted block is in it."""
    hashes = {seal_plan(federation(plan=plan), folders["llama"])[0].frozen_sha256 for plan in ("top:1", "0,2", "all")}
    assert len(hashes) == 1
    folder = Path(shutil.copytree(folders["llama"], tmp_path / "copy"))
    tensors = load_file(folder / "model.safetensors")
    tensors["layers.3.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert seal_plan(federation(), folder)[0].frozen_sha256 not in hashes


def test_an_a_that_stays_is_part_of_what_is_agreed(folders: dict[str, Path]) -> None:
    """In ffa-lora A does not travel, so the hash of what is frozen tells whether two sites have drawn the same."""
    drawn = [federation("ffa-lora").model_copy(update={"federation": _seeded(seed)}) for seed in (7, 7, 8)]
    first, same, other = (load_model(folders["llama"], each).frozen_sha256 for each in drawn)
    assert first == same != other
    assert first != load_model(folders["llama"], federation("lora")).frozen_sha256


@pytest.mark.parametrize("change", [{"rank": 2}, {"alpha": 9}, {"dropout": 0.1}, {"rank_stabilized": True}])
def test_other_adapters_are_another_federation(folders: dict[str, Path], change: dict[str, Any]) -> None:
    """Each setting of the adapters is in the fingerprint."""
    plans = [seal_plan(federation(**settings), folders["llama"])[0] for settings in ({}, change)]
    assert plans[0].fingerprint != plans[1].fingerprint


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", tiny.MODEL_TYPES)
def test_training_moves_the_adapters_alone(folders: dict[str, Path], model_type: str, kind: str) -> None:
    """After an update the factors that this kind trains, and the head, have moved by their delta; nothing else has."""
    loaded = load_model(folders[model_type], federation(kind))
    state = begun(loaded)
    before = {name: parameter.detach().clone() for name, parameter in loaded.model.named_parameters()}
    data = make_dataset(loaded, tiny.notes(2), batch_size=2, seed=0)
    result = train(loaded, state, data, federation().training, seed=1)
    after = dict(loaded.model.named_parameters())
    changed = {id(after[name]) for name in before if not torch.equal(before[name], after[name])}
    assert changed == {id(parameter) for parameter in loaded.trained.values()}
    assert (list(result.delta), list(result.personal)) == (list(loaded.trainable), list(loaded.personal))
    assert any("lora_A" in name for name in result.delta) == (kind != "ffa-lora")
    assert any("lora_B" in name for name in result.delta) == (kind != "fedsa-lora")
    for name, delta in result.delta.items():
        np.testing.assert_array_equal(delta, loaded.trainable[name].detach().numpy() - state[name])


@pytest.mark.parametrize("model_type", tiny.MODEL_TYPES)
def test_the_frozen_blocks_below_are_computed_once(folders: dict[str, Path], model_type: str) -> None:
    """Below the first adapted block the states are kept, and training from them gives the same bits."""
    loaded = load_model(folders[model_type], federation(dropout=0.2))
    state, data = version_zero(loaded), make_dataset(loaded, tiny.notes(4), batch_size=4, seed=3)
    assert data.prepared.cached, data.prepared.reason
    assert data.prepared.first_block == 2
    whole = replace(data, prepared=replace(data.prepared, reason="asked for"))
    cached, plain = (train(loaded, state, each, federation().training, seed=5).delta for each in (data, whole))
    assert all(np.array_equal(delta, plain[name]) for name, delta in cached.items())


def test_adapters_everywhere_leave_the_embeddings_frozen(folders: dict[str, Path]) -> None:
    """Under the plan `all` every block has adapters; embeddings and norms stay."""
    loaded = load_model(folders["llama"], federation(plan="all"))
    assert (loaded.layers, loaded.full) == ((0, 1, 2, 3), False)
    assert {name.split(".")[4] for name in loaded.trainable if "lora" in name} == set("0123")
    assert not loaded.model.get_input_embeddings().weight.requires_grad
    assert "block 0" in make_dataset(loaded, tiny.notes(1), batch_size=4, seed=0).prepared.reason


def test_every_b_stays_at_its_site(folders: dict[str, Path]) -> None:
    """In fedsa-lora the plan has A's and the head for what travels, and B's for what each site keeps."""
    plan, state = seal_plan(federation("fedsa-lora"), folders["llama"])
    assert {name.split(".")[-2] for name in plan.tensors} == {"lora_A", "score"}
    assert {name.split(".")[-2] for name in plan.personal} == {"lora_B"}
    assert len(plan.personal) == 2 * len(FAMILIES["llama"].linears)
    assert set(state) == set(plan.tensors)


def test_a_pattern_names_the_head_as_without_adapters(folders: dict[str, Path]) -> None:
    """What peft puts before all names need not be known to keep a tensor at its site."""
    settings = tiny.federation(layers={"personal": ["score.*"]}, adapter={"kind": "lora", "rank": 4})
    assert set(load_model(folders["llama"], settings).personal) == {f"{PREFIX}score.weight", f"{PREFIX}score.bias"}


def test_a_site_of_less_depth_trains_the_adapters_of_its_blocks(folders: dict[str, Path]) -> None:
    """Where the top block alone is trained, an update holds that block's adapters and the head."""
    here = train_only(load_model(folders["llama"], federation()), (3,))
    data = make_dataset(here, tiny.notes(2), batch_size=2, seed=0)
    delta = train(here, begun(here), data, federation().training, seed=1).delta
    assert {name.split(".")[4] for name in delta if "lora" in name} == {"3"}
    assert len(delta) == 2 * len(FAMILIES["llama"].linears) + 2


def test_targets_by_name() -> None:
    """A target is the end of a path below the block; one that no block has is named with those that it has."""
    llama, bert = FAMILIES["llama"], FAMILIES["bert"]
    assert targets(llama, AdapterSection()) == llama.linears
    assert targets(llama, AdapterSection(targets=("v_proj", "self_attn.q_proj"))) == (
        "self_attn.q_proj",
        "self_attn.v_proj",
    )
    assert targets(bert, AdapterSection(targets=("query",))) == ("attention.self.query",)
    with pytest.raises(ConfigError, match=r"adapter.targets names c_attn") as caught:
        targets(llama, AdapterSection(targets=("q_proj", "c_attn")))
    assert "self_attn.q_proj" in caught.value.hint


def test_only_the_targets_are_adapted(folders: dict[str, Path]) -> None:
    """With one target, each chosen block has one adapter."""
    loaded = load_model(folders["llama"], federation(targets=["v_proj"]))
    assert [name for name in loaded.trainable if "lora_A" in name] == [
        f"{PREFIX}model.layers.{block}.self_attn.v_proj.lora_A.weight" for block in (2, 3)
    ]


@pytest.mark.parametrize("stabilized", [False, True])
def test_the_scale_is_what_the_configuration_says(folders: dict[str, Path], stabilized: bool) -> None:
    """By hand: alpha / r is 8 / 4 = 2, alpha / sqrt(r) is 8 / 2 = 4; peft uses the number that the coordinator does."""
    settings = federation(rank_stabilized=stabilized)
    layer = load_model(folders["llama"], settings).model.model.layers[3].mlp.up_proj
    assert layer.scaling["default"] == settings.adapter.scale == (4 if stabilized else 2)


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "llama"])
def test_a_residual_is_added_to_the_base_models_weight(folders: dict[str, Path], model_type: str) -> None:
    """A state's residual R makes the layer compute (W + R) x, however W is stored; R = 0 gives back W bit for bit."""
    loaded = load_model(folders[model_type], federation("fedex-lora"))
    zero, state = version_zero(loaded), moved(loaded)
    residuals = {name: values for name, values in state.items() if name in loaded.residuals}
    assert len(residuals) == 2 * len(loaded.family.linears)
    before = {name: residual.weight.detach().clone() for name, residual in loaded.residuals.items()}
    apply_state(loaded, zero | residuals)
    for name, values in residuals.items():
        path = name.removeprefix(PREFIX).removesuffix(".residual")
        layer = loaded.model.get_submodule(path).base_layer
        x, w = torch.randn(3, values.shape[1]), before[name].T if model_type == "gpt2" else before[name]
        with torch.no_grad():
            wanted = nn.functional.linear(x, w + torch.from_numpy(values), layer.bias)
            torch.testing.assert_close(layer(x), wanted)
    apply_state(loaded, zero)
    assert all(torch.equal(residual.weight, before[name]) for name, residual in loaded.residuals.items())
    assert {name: residual.factors for name, residual in loaded.residuals.items()} == seal(
        loaded, federation("fedex-lora")
    ).residuals


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", tiny.MODEL_TYPES)
def test_the_whole_model_has_the_adapters_folded_in(
    folders: dict[str, Path], tmp_path: Path, model_type: str, kind: str
) -> None:
    """Plain transformers loads the exported folder, without peft, and says the same; ours is as it was before."""
    loaded = load_model(folders[model_type], federation(kind))
    apply_state(loaded, moved(loaded))
    before = {name: parameter.detach().clone() for name, parameter in loaded.model.named_parameters()}
    export(loaded, tmp_path / "out")
    after = dict(loaded.model.named_parameters())
    assert all(torch.equal(values, after[name]) for name, values in before.items())
    assert not list((tmp_path / "out").glob("adapter*"))
    plain = AutoModelForTokenClassification.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        logits = plain(input_ids=torch.arange(4, 24).reshape(2, 10)).logits
    torch.testing.assert_close(logits, logits_of(loaded), rtol=1e-4, atol=1e-4)
    assert plain.num_parameters() == loaded.total_parameters


def test_it_learns(folders: dict[str, Path]) -> None:
    """Fifteen epochs over notes whose words tell their labels lift held-out strict F1 far above the start."""
    settings = federation(plan="all", rank=8, alpha=8)
    loaded = load_model(folders["llama"], settings)
    data = make_dataset(loaded, tiny.notes(16), batch_size=8, seed=0)
    held_out = make_dataset(loaded, tiny.notes(4, seed=1), batch_size=8, seed=0)
    section = settings.training.model_copy(update={"epochs": 15, "lr": 3e-2})
    start = evaluate(loaded, held_out).main
    train(loaded, version_zero(loaded), data, section, seed=1)
    assert start < 0.3
    assert evaluate(loaded, held_out).main > 0.6
