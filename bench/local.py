"""Local training at a site: seconds an epoch and peak memory of each way to train, side by side.

    python -m bench.local --epochs 3 --json docs/results/local.json

A LLaMA of 16 blocks with random weights (width 384, about 30 million parameters), windows of synthetic notes, the real
trainer. Each way is a process of its own, so that its peak memory is its own; turns alternate, so that a machine whose
speed drifts drifts for all. The time to compute the frozen prefix is told apart: it is paid once for a data set, and
not once for an epoch.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.protocol import machine, peak_bytes
from mailboat.synth import make_notes

WAYS = {
    "full": {"layers": {"plan": "all"}},
    "layer skipping": {"layers": {"plan": "top:6"}},
    "cached suffix": {"layers": {"plan": "top:6"}},
}
"""What differs in federation.toml; the second and third differ in whether hidden states may be kept."""
UNCACHED = {"layer skipping"}
MAX_LENGTH = 128
BATCH = 8
NOTES = 24
"""Some 130 windows."""


def make_model(folder: Path) -> None:
    """Write a 16-block LLaMA with random weights and the shipped tokenizer."""
    import torch  # noqa: PLC0415 - the parent process measures, and shall stay small
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    from mailboat.demo.plan import SHIPPED_MODEL  # noqa: PLC0415

    tokenizer = AutoTokenizer.from_pretrained(SHIPPED_MODEL)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=16,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train_once(way: str, folder: Path, epochs: int) -> dict[str, Any]:
    """Train in this process; seconds of preparation and of each epoch, peak bytes, and the losses' mean."""
    import torch  # noqa: PLC0415

    from edge_client.data import load_notes  # noqa: PLC0415
    from edge_client.model import load_model, read_trainable  # noqa: PLC0415
    from edge_client.trainer import make_dataset, train  # noqa: PLC0415
    from shared.config import FederationConfig  # noqa: PLC0415

    torch.set_num_threads(1)
    federation = FederationConfig.model_validate(
        {
            "federation": {"name": "bench"},
            "model": {"base": str(folder / "model")},
            "task": {"max_length": MAX_LENGTH},
            "training": {"batch_size": BATCH, "lr": 1e-4},
            **WAYS[way],
        }
    )
    loaded = load_model(folder / "model", federation)
    before = peak_bytes(os.getpid())
    notes = load_notes(folder / "notes" / "site-1", loaded.task).notes
    began = time.perf_counter()
    limit = {"limit_bytes": 0} if way in UNCACHED else {}
    data = make_dataset(loaded, notes, batch_size=BATCH, seed=0, **limit)
    prepared = time.perf_counter() - began
    state, seconds, losses = read_trainable(loaded), [], []
    for epoch in range(epochs):
        result = train(loaded, state, data, federation.training, seed=epoch)
        seconds.append(result.metrics["seconds"])
        losses.append(result.metrics["loss"])
    return {
        "way": way,
        "trained": loaded.trained_parameters,
        "total": loaded.total_parameters,
        "batches": len(data.prepared.batches),
        "cached": data.prepared.cached,
        "prepare_s": round(prepared, 3),
        "epoch_s": [round(each, 3) for each in seconds],
        "loss": losses,
        "loaded_bytes": before,
        "peak_bytes": peak_bytes(os.getpid()),
    }


def main() -> None:
    """Measure each way in turns, print the ratios, write JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.local", description=__doc__)
    parser.add_argument("--epochs", type=int, default=3, help="of each process")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(train_once(options.one, options.folder, options.epochs)))
        return
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory(prefix="mailboat-local-") as name:
        folder = Path(name)
        make_model(folder / "model")
        make_notes(folder / "notes", sites=1, notes=NOTES, heldout=1, alpha=1.0, seed=0)
        for _ in range(options.turns):
            for way in WAYS:
                command = [sys.executable, "-m", "bench.local", "--one", way, "--folder", name]
                command += ["--epochs", str(options.epochs)]
                told = subprocess.run(command, check=True, stdout=subprocess.PIPE, env={**os.environ, **QUIET})
                found[way].append(json.loads(told.stdout.splitlines()[-1]))
                print(json.dumps(found[way][-1]), flush=True)
    summary = _summary(found)
    print(json.dumps(summary, indent=1))
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "summary": summary, "runs": found}, indent=1) + "\n")


QUIET = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


def _summary(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians, and what each way's epoch is of the cached one's; equal losses of the second and the third."""
    epoch = {way: statistics.median(s for run in runs for s in run["epoch_s"]) for way, runs in found.items()}
    return {
        "epoch_s": {way: round(seconds, 3) for way, seconds in epoch.items()},
        "times_cached": {way: round(seconds / epoch["cached suffix"], 2) for way, seconds in epoch.items()},
        "peak_mb": {way: round(max(run["peak_bytes"] for run in runs) / 1e6) for way, runs in found.items()},
        "equal_losses": found["layer skipping"][0]["loss"] == found["cached suffix"][0]["loss"],
    }


if __name__ == "__main__":
    main()
