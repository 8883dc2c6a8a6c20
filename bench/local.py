"""Local training at a site: seconds an epoch and peak memory of each way to train, side by side.

    make bench-local ARGS="--turns 3"

Two models: a LLaMA of 16 blocks with random weights, width 512 (52 million parameters), and the shipped one. Windows of
synthetic notes, the real trainer, one thread. Each way is a process of its own, so that its peak memory is its own;
turns alternate, so that a machine whose speed drifts drifts for all. The time to load and prepare is told apart: it is
paid once for a start, and not once for an epoch. Processor seconds are told beside seconds: other work on the machine
spoils them less. Memory is what the process held at most above what it holds with all modules imported and nothing
loaded.
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

from bench.protocol import machine, memory_bytes
from mailboat.demo.plan import SHIPPED_MODEL
from mailboat.synth import make_notes

_TOP = {"layers": {"plan": "top:6"}}
WAYS: dict[str, dict[str, Any]] = {
    "full": {"layers": {"plan": "all"}},
    "layer skipping": _TOP,
    "cached, first start": _TOP,
    "cached, next start": _TOP,
    "cached, bf16": _TOP,
    "LoRA, cached": _TOP | {"adapter": {"kind": "lora", "rank": 8, "alpha": 16}},
}
"""What differs in federation.toml. The first start computes what the next one finds on the disk."""
REFERENCE = "cached, next start"
UNCACHED = frozenset({"full", "layer skipping"})
MODELS = ("llama-512", "shipped")
MAX_LENGTH = 128
BATCH = 8
NOTES = 24
"""Some 130 windows."""


def make_model(folder: Path) -> None:
    """Write a 16-block LLaMA with random weights and the shipped tokenizer."""
    import torch  # noqa: PLC0415 - the parent process measures, and shall stay small
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    tokenizer = AutoTokenizer.from_pretrained(SHIPPED_MODEL)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=16,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train_once(way: str, model: Path, notes: Path, site: Path, epochs: int) -> dict[str, Any]:
    """Train in this process, as a site's worker does; seconds of preparation and of each epoch, bytes, and losses."""
    import torch  # noqa: PLC0415

    from edge_client.data import load_notes  # noqa: PLC0415
    from edge_client.model import load_model, version_zero  # noqa: PLC0415
    from edge_client.prefix_store import NOWHERE, OnDisk  # noqa: PLC0415
    from edge_client.statefile import read_state, write_tensors  # noqa: PLC0415
    from edge_client.trainer import make_dataset, train  # noqa: PLC0415
    from shared.config import FederationConfig, StateDType  # noqa: PLC0415

    torch.set_num_threads(1)
    federation = FederationConfig.model_validate(
        {
            "federation": {"name": "bench"},
            "model": {"base": str(model)},
            "task": {"max_length": MAX_LENGTH},
            "training": {"batch_size": BATCH, "lr": 1e-4},
            **WAYS[way],
        }
    )
    idle, began = memory_bytes(os.getpid(), "VmRSS"), time.perf_counter()
    loaded = load_model(model, federation, suffix=way not in UNCACHED)
    dtype: StateDType = "bf16" if way.endswith("bf16") else "f32"
    folder = site / f"{model.name}-{'lora' if way.startswith('LoRA') else dtype}"
    keep = NOWHERE if way in UNCACHED else OnDisk(folder, "training", dtype=dtype, limit=1 << 34, keep_free=0)
    data = make_dataset(loaded, load_notes(notes, loaded.task).notes, batch_size=BATCH, seed=0, keep=keep)
    if data.prepared.cached == (way in UNCACHED):
        raise AssertionError(data.prepared.reason)
    prepared, ready = time.perf_counter() - began, memory_bytes(os.getpid(), "VmRSS")
    site.mkdir(parents=True, exist_ok=True)
    published = site / f"{model.name}-{os.getpid()}.safetensors"
    write_tensors(published, version_zero(loaded))
    state, seconds, worked, losses = read_state(published), [], [], []
    for epoch in range(epochs):
        spent = time.process_time()
        result = train(loaded, state, data, federation.training, seed=epoch)
        worked.append(time.process_time() - spent)
        seconds.append(result.metrics["seconds"])
        losses.append(result.metrics["loss"])
    published.unlink()
    return {
        "way": way,
        "model": model.name,
        "trained": loaded.trained_parameters,
        "total": loaded.total_parameters,
        "batches": len(data.prepared.batches),
        "kept_bytes": sum(path.stat().st_size for path in folder.glob("*")),
        "prepare_s": round(prepared, 3),
        "epoch_s": [round(each, 3) for each in seconds],
        "epoch_processor_s": [round(each, 3) for each in worked],
        "loss": losses,
        "idle_bytes": idle,
        "ready_bytes": ready,
        "peak_bytes": memory_bytes(os.getpid(), "VmHWM"),
    }


def main() -> None:
    """Measure each way in turns, print the ratios, write JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.local", description=__doc__)
    parser.add_argument("--epochs", type=int, default=3, help="of each process")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("WAY", "MODEL"), help=argparse.SUPPRESS)
    parser.add_argument("--notes", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--site", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        way, model = options.one
        print(json.dumps(train_once(way, Path(model), options.notes, options.site, options.epochs)))
        return
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="mailboat-local-") as name:
        models = {"llama-512": Path(name) / "llama-512", "shipped": SHIPPED_MODEL}
        make_model(models["llama-512"])
        notes = Path(name) / "notes" / "site-1"
        make_notes(notes.parent, sites=1, notes=NOTES, heldout=1, alpha=1.0, seed=0)
        for turn in range(options.turns):
            for model in options.models:
                site = Path(name) / f"turn-{turn}"
                for way in WAYS:
                    command = [sys.executable, "-m", "bench.local", "--one", way, str(models[model])]
                    command += ["--notes", str(notes), "--site", str(site), "--epochs", str(options.epochs)]
                    told = subprocess.run(command, check=True, stdout=subprocess.PIPE, env={**os.environ, **QUIET})
                    found.append({**json.loads(told.stdout.splitlines()[-1]), "model": model})
                    print(json.dumps(found[-1]), flush=True)
    summary = {model: summarize([run for run in found if run["model"] == model]) for model in options.models}
    print(json.dumps(summary, indent=1))
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "summary": summary, "runs": found}, indent=1) + "\n")


QUIET = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


def summarize(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of one model, by way; its epoch as a multiple of the reference's, and whether the losses are equal."""
    told = {}
    for way in WAYS:
        own = [run for run in runs if run["way"] == way]
        told[way] = {
            "epoch_s": statistics.median(seconds for run in own for seconds in run["epoch_s"]),
            "epoch_processor_s": statistics.median(worked for run in own for worked in run["epoch_processor_s"]),
            "prepare_s": statistics.median(run["prepare_s"] for run in own),
            "ready_mb": round(max(run["ready_bytes"] - run["idle_bytes"] for run in own) / 1e6),
            "peak_mb": round(max(run["peak_bytes"] - run["idle_bytes"] for run in own) / 1e6),
            "kept_mb": round(own[0]["kept_bytes"] / 1e6, 1),
        }
    for row in told.values():
        for clock in ("epoch_s", "epoch_processor_s"):
            row[f"{clock}_of_cached"] = round(row[clock] / told[REFERENCE][clock], 2)
    losses = {way: [run["loss"] for run in runs if run["way"] == way] for way in WAYS}
    exact = ("layer skipping", "cached, first start", "cached, next start")
    return {"ways": told, "equal_losses": all(losses[way] == losses[exact[0]] for way in exact)}


if __name__ == "__main__":
    main()
