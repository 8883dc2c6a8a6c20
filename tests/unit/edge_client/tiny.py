"""Tiny random models of each known type with tokenizers of their own, and notes to train them on."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

from edge_client.data import Entity, Note, Sentence
from mailboat.synth.write import write_i2b2
from shared.config import FederationConfig

WIDTH = 16
DEPTH = 4
MODEL_TYPES = ("bert", "gpt2", "llama", "mistral", "qwen2", "qwen3")

PROBLEMS = ("fever", "chest pain", "acute renal failure", "pneumonia")
TREATMENTS = ("aspirin", "insulin drip", "warfarin")
TESTS = ("chest x-ray", "troponin", "cbc")
FILLER = ("patient", "was", "given", "for", "noted", "and", "then", "showed", "without", "today")


def federation(**changes: object) -> FederationConfig:
    """A federation whose sections are changed by `section={key: value}`."""
    base: dict[str, dict[str, object]] = {
        "federation": {"name": "trial", "seed": 7},
        "model": {"base": "tiny"},
        "task": {"max_length": 32},
        "layers": {"plan": "top:2"},
        "training": {"batch_size": 4, "lr": 5e-3},
    }
    for section, values in changes.items():
        assert isinstance(values, dict)
        base[section] = {**base.get(section, {}), **values}
    return FederationConfig.model_validate(base)


def notes(count: int = 6, *, seed: int = 0, lines: int = 5) -> tuple[Note, ...]:
    """Synthetic notes in which a phrase's words tell its label."""
    draw = random.Random(seed)
    return tuple(Note(f"note-{index:03}", tuple(_line(draw) for _ in range(lines))) for index in range(count))


def _line(draw: random.Random) -> Sentence:
    tokens: list[str] = []
    entities: list[Entity] = []
    for _ in range(draw.randint(2, 4)):
        tokens += draw.sample(FILLER, draw.randint(1, 3))
        label, phrases = draw.choice((("problem", PROBLEMS), ("treatment", TREATMENTS), ("test", TESTS)))
        words = draw.choice(phrases).split()
        entities.append(Entity(len(tokens), len(tokens) + len(words), label))
        tokens += words
    return Sentence(tuple(tokens), tuple(entities))


def write_conll(path: Path, written: tuple[Note, ...]) -> Path:
    """Write notes as a CoNLL file that the site's reader takes."""
    rows: list[str] = []
    for note in written:
        rows += [f"-DOCSTART- {note.id}", ""]
        for line in note.sentences:
            tags = ["O"] * len(line.tokens)
            for entity in line.entities:
                tags[entity.start : entity.end] = [f"I-{entity.label}"] * (entity.end - entity.start)
                tags[entity.start] = f"B-{entity.label}"
            rows += [f"{word} {tag}" for word, tag in zip(line.tokens, tags, strict=True)]
            rows.append("")
    path.write_text("\n".join(rows), encoding="utf-8")
    return path


def write_relations(folder: Path, written: tuple[Note, ...]) -> Path:
    """Write notes in the i2b2 layout; each line's first entity is `present` and stands in PIP to the second."""
    write_i2b2(folder, written)
    for name in ("rel", "ast"):
        (folder / name).mkdir()
    for note in written:
        rel, ast = "", ""
        for number, line in enumerate(note.sentences, start=1):
            first, second = (
                f'c="{" ".join(line.tokens[entity.start : entity.end])}" '
                f"{number}:{entity.start} {number}:{entity.end - 1}"
                for entity in line.entities[:2]
            )
            rel += f'{first}||r="PIP"||{second}\n'
            ast += f'{first}||t="{line.entities[0].label}"||a="present"\n'
        (folder / "rel" / f"{note.id}.rel").write_text(rel, encoding="utf-8")
        (folder / "ast" / f"{note.id}.ast").write_text(ast, encoding="utf-8")
    return folder


def save_model(folder: Path, model_type: str, *, depth: int = DEPTH) -> Path:
    """Write a random backbone without a head, float32, and its tokenizer, as a pre-trained model would come."""
    tokenizer = _wordpiece() if model_type == "bert" else _byte_level()
    tokenizer.save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = AutoModel.from_config(_config(model_type, len(tokenizer), depth))  # type: ignore[no-untyped-call]
        model.save_pretrained(folder)
    return folder


def _config(model_type: str, vocabulary: int, depth: int) -> Any:
    no_specials = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    if model_type == "gpt2":
        size: dict[str, Any] = {"n_embd": WIDTH, "n_layer": depth, "n_head": 2, "n_positions": 64}
    else:
        size = {
            "hidden_size": WIDTH,
            "intermediate_size": 2 * WIDTH,
            "num_hidden_layers": depth,
            "num_attention_heads": 2,
            "max_position_embeddings": 64,
        }
    if model_type in {"llama", "mistral", "qwen2", "qwen3"}:
        size["num_key_value_heads"] = 1
    if model_type == "qwen3":
        size["head_dim"] = WIDTH // 2
    return AutoConfig.for_model(model_type, vocab_size=vocabulary, **no_specials, **size)


def _corpus() -> list[str]:
    return [" ".join(line.tokens) for note in notes(20, seed=99) for line in note.sentences]


def _wordpiece() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )


def _byte_level() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")  # type: ignore[no-untyped-call]
