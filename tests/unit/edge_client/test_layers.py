from __future__ import annotations

import pytest

from edge_client.layers import (
    FAMILIES,
    depth_of,
    family_of,
    is_full,
    personal_names,
    resolve_plan,
    trainable_names,
    trained_at_once,
)
from shared.errors import ConfigError

LLAMA = [
    "model.embed_tokens.weight",
    *(f"model.layers.{index}.mlp.up_proj.weight" for index in range(12)),
    "model.norm.weight",
    "score.bias",
    "score.weight",
]
BERT = [
    "bert.embeddings.word_embeddings.weight",
    *(f"bert.encoder.layer.{index}.output.dense.bias" for index in range(3)),
    "classifier.weight",
]


@pytest.mark.parametrize(
    ("text", "depth", "layers"),
    [
        ("6", 16, (10, 11, 12, 13, 14, 15)),
        ("top:6", 16, (10, 11, 12, 13, 14, 15)),
        (" Top:1 ", 16, (15,)),
        ("16", 16, tuple(range(16))),
        ("0.375", 16, (10, 11, 12, 13, 14, 15)),
        ("0.01", 16, (15,)),
        ("1.0", 3, (0, 1, 2)),
        ("top:0.375", 16, (10, 11, 12, 13, 14, 15)),
        ("bottom:3", 16, (0, 1, 2)),
        ("bottom:0.25", 4, (0,)),
        ("middle:4", 16, (6, 7, 8, 9)),
        ("middle:3", 16, (6, 7, 8)),
        ("middle:4", 5, (0, 1, 2, 3)),
        ("middle:1", 1, (0,)),
        ("random:16", 16, tuple(range(16))),
        ("15,10,11", 16, (10, 11, 15)),
        ("3,", 4, (3,)),
        ("0, 2", 4, (0, 2)),
        ("all", 3, (0, 1, 2)),
    ],
)
def test_a_plan_means_blocks(text: str, depth: int, layers: tuple[int, ...]) -> None:
    """Each form of a plan resolves to ascending block numbers of the real depth."""
    assert resolve_plan(text, depth) == layers


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("bottom:17", "asks for 17 blocks, the model has 16"),
        ("middle:0", "trains no block of the model's 16"),
        ("random:1.5", "no share of the model's 16 blocks"),
        ("lowest:3", "not a layer plan"),
        (":3", "not a layer plan"),
        ("17", "asks for 17 blocks, the model has 16"),
        ("top:17", "asks for 17 blocks, the model has 16"),
        ("10,16", "names block 16, the model has 16"),
        ("0", "trains no block of the model's 16"),
        ("1.5", "no share of the model's 16 blocks"),
        ("0.0", "no share of the model's 16 blocks"),
        ("3,3", "names a block twice"),
        ("-1", "not a layer plan (the model has 16 blocks)"),
        ("nan.", "not a layer plan"),
        ("top:", "not a layer plan"),
        ("top", "not a layer plan"),
        ("", "not a layer plan"),
        (",", "not a layer plan"),
        ("1,-2", "not a layer plan"),
        ("²", "not a layer plan"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(text: str, says: str) -> None:
    """A plan deeper than the model, or no plan at all, is an error that names the key, the plan and the depth."""
    with pytest.raises(ConfigError) as caught:
        resolve_plan(text, 16)
    assert says in caught.value.message
    assert f"layers.plan = {text.strip()!r}" in caught.value.message


def test_random_blocks_follow_from_the_seed() -> None:
    """One seed gives one choice for all, of as many blocks as asked; among all seeds every block has its turn."""
    drawn = [resolve_plan("random:4", 16, seed=seed) for seed in range(40)]
    assert drawn == [resolve_plan("random:4", 16, seed=seed) for seed in range(40)]
    assert all(len(set(blocks)) == 4 and list(blocks) == sorted(blocks) for blocks in drawn)
    assert {block for blocks in drawn for block in blocks} == set(range(16))
    assert set(resolve_plan("random:4", 16, seed=3)) < set(resolve_plan("random:5", 16, seed=3))


def test_importance_chooses_among_the_blocks_of_a_plan() -> None:
    """The federation's blocks are the candidates, all where no plan narrows them; so many are trained at a time."""
    assert resolve_plan("importance:2", 16) == tuple(range(16))
    assert resolve_plan(" Importance:2", 16, among="top:4") == (12, 13, 14, 15)
    assert resolve_plan("importance:1", 16, among="1,5") == (1, 5)
    assert trained_at_once("importance:2", 16, (1, 5)) == 2
    assert trained_at_once("importance:0.25", 16, tuple(range(16))) == 4
    assert trained_at_once("top:2", 16, (14, 15)) is None


@pytest.mark.parametrize(
    ("plan", "among", "depth", "says"),
    [
        ("importance:5", "top:4", 16, "asks for 5 blocks of the 4 in layers.among"),
        ("importance:0", "1.0", 16, "trains no block"),
        ("importance:", "1.0", 16, "not a layer plan"),
        ("importance:4", "all", 16, "layers.among = 'all' names no blocks to choose among"),
        ("importance:4", "importance:8", 16, "layers.among = 'importance:8' names no blocks"),
        ("importance:4", "1.0", 64, "would choose among 64 blocks, at most 48 are possible"),
    ],
)
def test_a_choice_that_cannot_be_made_is_refused(plan: str, among: str, depth: int, says: str) -> None:
    """More than there are, or than the metrics of an update can tell of."""
    with pytest.raises(ConfigError) as caught:
        trained_at_once(plan, depth, resolve_plan(plan, depth, among=among))
    assert says in caught.value.message


def test_an_unknown_plan_lists_the_known_ones() -> None:
    """Whoever misspells one sees what there is."""
    with pytest.raises(ConfigError) as caught:
        resolve_plan("lowest:3", 16)
    for form in ("top:6", "bottom:6", "middle:6", "random:6", "0.375", "10,11,15", "importance:6", "all"):
        assert form in caught.value.hint


def test_block_1_is_not_block_11() -> None:
    """Names are matched by whole block numbers."""
    assert trainable_names(LLAMA, FAMILIES["llama"], (1,), full=False) == (
        "model.layers.1.mlp.up_proj.weight",
        "score.bias",
        "score.weight",
    )


def test_the_final_norm_goes_with_the_top_block() -> None:
    """The norm above the blocks is trained exactly when the top block is; embeddings are not."""
    top = trainable_names(LLAMA, FAMILIES["llama"], (10, 11), full=False)
    assert "model.norm.weight" in top
    assert "model.embed_tokens.weight" not in top
    assert "model.norm.weight" not in trainable_names(LLAMA, FAMILIES["llama"], (9, 10), full=False)


def test_bert_has_no_final_norm() -> None:
    """In BERT each block ends in its own norm, so that blocks and head are all that is trained."""
    assert trainable_names(BERT, FAMILIES["bert"], (2,), full=False) == (
        "bert.encoder.layer.2.output.dense.bias",
        "classifier.weight",
    )


def test_a_whole_sequence_has_its_own_head() -> None:
    """In the class for whole sequences BERT trains its pooler too, and GPT-2 calls its classifier score."""
    names = ["bert.embeddings.word_embeddings.weight", "bert.pooler.dense.bias", "classifier.weight"]
    whole = FAMILIES["bert"].for_whole()
    assert trainable_names(names, whole, (), full=False) == ("bert.pooler.dense.bias", "classifier.weight")
    assert [name for name in names if whole.is_head(name)] == names[1:]
    assert not FAMILIES["bert"].is_head("bert.pooler.dense.bias")
    assert FAMILIES["gpt2"].for_whole().head_parts == ("score",)


def test_the_full_plan_trains_everything() -> None:
    """Under `all` the embeddings are trained too."""
    assert is_full(" ALL ")
    assert not is_full("16")
    assert trainable_names(BERT, FAMILIES["bert"], (0, 1, 2), full=True) == tuple(sorted(BERT))


def test_depth_is_counted_from_the_names() -> None:
    """Blocks are counted, not tensors."""
    assert depth_of(LLAMA, FAMILIES["llama"]) == 12
    assert depth_of([*LLAMA, "model.layers.3.mlp.down_proj.weight"], FAMILIES["llama"]) == 12


def test_an_unknown_type_is_named() -> None:
    """A model of an unknown type is refused with its place, its type and the known types."""
    with pytest.raises(ConfigError) as caught:
        family_of("t5", "models/t5")
    assert "models/t5" in caught.value.message
    assert "'t5'" in caught.value.message
    assert "bert, gpt2, llama, mistral, qwen2, qwen3" in caught.value.hint


def test_patterns_say_what_stays() -> None:
    """A star stands for any characters, also dots; the order is that of the trained tensors."""
    trained = trainable_names(LLAMA, FAMILIES["llama"], (10, 11), full=False)
    assert personal_names(trained, ()) == ()
    assert personal_names(trained, ("score.*",)) == ("score.bias", "score.weight")
    assert personal_names(trained, ("score.weight", "*.norm.weight", "score.?eight")) == (
        "model.norm.weight",
        "score.weight",
    )
    assert personal_names(trained, ("*.11.*",)) == ("model.layers.11.mlp.up_proj.weight",)


@pytest.mark.parametrize(
    ("patterns", "says"),
    [
        (("classifier.*",), "layers.personal = 'classifier.*' matches none of the 5 tensors"),
        (("score.*", "model.layers.1.*"), "layers.personal = 'model.layers.1.*' matches none"),
        (("Score.*",), "matches none"),
        (("*",), "nothing is left to exchange"),
    ],
)
def test_what_cannot_stay_is_refused(patterns: tuple[str, ...], says: str) -> None:
    """A pattern that matches nothing that is trained is a mistake, and so is keeping everything."""
    trained = trainable_names(LLAMA, FAMILIES["llama"], (10, 11), full=False)
    with pytest.raises(ConfigError) as caught:
        personal_names(trained, patterns)
    assert says in caught.value.message
