"""The base model that ships with the project, loaded as anybody would load it."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

import mailboat
from mailboat.synth.prose import draw_prose

BASE = Path(mailboat.__file__).parent / "assets" / "base-llama-16"
UNSEEN_SEED = 77


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """The shipped tokenizer."""
    return AutoTokenizer.from_pretrained(BASE)


def test_it_is_a_small_llama_of_16_blocks() -> None:
    """Any token-classification user gets 16 blocks, about 3 million parameters, in full precision."""
    model = AutoModelForTokenClassification.from_pretrained(BASE, num_labels=7)
    assert model.config.model_type == "llama"
    assert len(model.model.layers) == 16
    assert 2.5e6 < model.num_parameters() < 3.5e6
    assert model.dtype == torch.float32


def test_it_has_learnt_the_prose(tokenizer: Any) -> None:
    """On prose of a seed that was not trained on, the loss is far below that of a guess (7.8 nats per token)."""
    model: Any = AutoModelForCausalLM.from_pretrained(BASE)
    model.eval()
    losses = []
    for text in islice(draw_prose(10, UNSEEN_SEED), 10):
        ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=128)["input_ids"]
        with torch.inference_mode():
            losses.append(model(input_ids=ids, labels=ids).loss.item())
    assert sum(losses) / len(losses) < 2.5


def test_a_line_break_is_one_token(tokenizer: Any) -> None:
    """Lines joined into one text cost one token for each break."""
    assert len(tokenizer("\n", add_special_tokens=False)["input_ids"]) == 1


@pytest.mark.parametrize(
    "text", ["sodium 138, potassium 4.2", "BP 130/85 on 2026-11-20", "T38.5 q8h x10d", "µg/kg, naïve"]
)
def test_text_survives_the_tokenizer(tokenizer: Any, text: str) -> None:
    """Numbers, units and letters with accents come back as they went in."""
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True).strip() == text


@pytest.mark.parametrize("word", ["metoprolol", "38.5", "CXR", "130/85"])
def test_a_word_has_the_same_tokens_alone_and_in_a_line(tokenizer: Any, word: str) -> None:
    """Notes come as words; what the model learnt of them in prose must apply."""
    alone = tokenizer(word, add_special_tokens=False)["input_ids"]
    line = tokenizer(f"given {word} again", add_special_tokens=False)["input_ids"]
    assert any(line[at : at + len(alone)] == alone for at in range(len(line)))
