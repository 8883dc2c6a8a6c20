"""Pre-train the small base model that ships with the project, and write it as a Hugging Face directory.

    OMP_NUM_THREADS=1 nice python tools/pretrain_base.py

Everything is seeded and runs on one CPU thread, so that the same versions of torch and tokenizers write the same
weights. The text is drawn by `mailboat.synth.prose`; no synthetic note is seen.
"""

from __future__ import annotations

import argparse
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mailboat.synth.prose import draw_prose

OUT = Path(__file__).parent.parent / "mailboat" / "assets" / "base-llama-16"
CARD = Path(__file__).parent / "base_model_card.md"
SEED = 20260
VOCABULARY = 2560
CONTEXT = 128  # tokens of one training row: several lines of a note
ROWS = 9
CHECK_ROWS = 64
BOS, EOS, PAD, UNK = "<s>", "</s>", "<pad>", "<unk>"


@dataclass(frozen=True, slots=True)
class Run:
    """What a pre-training run used and reached; losses are nats per token."""

    steps: int
    train_tokens: int
    train_loss: float
    unseen_loss: float
    seconds: float


def main() -> None:
    """Train tokenizer and model, and write the directory."""
    parser = argparse.ArgumentParser(description="Pre-train the shipped base model.")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--steps", type=int, default=1350)
    options = parser.parse_args()
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(mode=True)
    tokenizer = train_tokenizer()
    rows = encode_rows(tokenizer, options.steps * ROWS, SEED)
    # Another seed knows other forms of the concepts too, so this loss also holds words never met in training.
    unseen = encode_rows(tokenizer, CHECK_ROWS, SEED + 1)
    model = make_model(tokenizer)
    run = train(model, rows, unseen)
    save(model, tokenizer, run, options.out)


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer with the special tokens of a LLaMA model."""
    core = Tokenizer(models.BPE(unk_token=UNK))
    # A leading blank before the first word as well: words given one by one then get the tokens they have in a line.
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[UNK, BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(draw_prose(6000, SEED), trainer)
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, core.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        model_max_length=512,
        padding_side="right",
        model_input_names=["input_ids", "attention_mask"],
    )


def encode_rows(tokenizer: PreTrainedTokenizerFast, count: int, seed: int) -> torch.Tensor:
    """Return `count` rows of CONTEXT token ids (int64): paragraphs one after the other, cut anywhere."""
    ids = chain.from_iterable(paragraph_ids(tokenizer, seed))
    flat = [next(ids) for _ in range(count * CONTEXT)]
    return torch.tensor(flat).view(count, CONTEXT)


def paragraph_ids(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[list[int]]:
    """Yield the ids of each paragraph between a BOS and an EOS."""
    for text in draw_prose(1_000_000, seed):
        yield [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return the untrained 16-block model, about 3 million parameters."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        # The default of 0.02 suits wide models; at this width it slows the first hundreds of steps.
        initializer_range=0.06,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def train(model: LlamaForCausalLM, rows: torch.Tensor, unseen: torch.Tensor) -> Run:
    """Train for one pass over `rows` and return what was reached."""
    started = time.monotonic()
    steps = len(rows) // ROWS
    peak = 4e-3
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, steps))
    recent: list[float] = []
    model.train()
    for step in range(steps):
        batch = rows[step * ROWS : (step + 1) * ROWS]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        recent = [*recent[-49:], loss.item()]
        if (step + 1) % 50 == 0:
            elapsed = time.monotonic() - started
            print(f"step {step + 1}/{steps}  loss {sum(recent) / len(recent):.3f}  {elapsed:.0f} s", flush=True)
    model.train(mode=False)
    with torch.inference_mode():
        unseen_loss = model(input_ids=unseen, labels=unseen).loss.item()
    print(f"loss on unseen prose {unseen_loss:.3f}")
    return Run(steps, rows.numel(), sum(recent) / len(recent), unseen_loss, time.monotonic() - started)


def learning_rate(step: int, steps: int) -> float:
    """Return the factor on the peak rate: linear warm-up over 5 % of the steps, then a cosine down to 5 %."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress))


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, run: Run, out: Path) -> None:
    """Write config, tokenizer, weights (bfloat16 on disk, to halve the file) and model card."""
    shutil.rmtree(out, ignore_errors=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    weights = out / "model.safetensors"
    # config.json keeps `float32`, so that from_pretrained widens the weights again and trains at full precision.
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    card = CARD.read_text(encoding="utf-8")
    facts = {
        "parameters": f"{model.num_parameters():,}",
        "vocabulary": f"{len(tokenizer):,}",
        "steps": f"{run.steps:,}",
        "tokens": f"{run.train_tokens:,}",
        "context": str(CONTEXT),
        "rows": str(ROWS),
        "seed": str(SEED),
        "train_loss": f"{run.train_loss:.3f}",
        "unseen_loss": f"{run.unseen_loss:.3f}",
        "minutes": f"{run.seconds / 60:.0f}",
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"tokenizers {tokenizers.__version__}",
    }
    for key, value in facts.items():
        card = card.replace(f"@{key}@", value)
    (out / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
