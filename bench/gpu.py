"""Local training on a GPU: layer skipping on a model of LLaMA-3.2-1B's shape, with random weights made on the spot.

    make bench-gpu ARGS="--json docs/results/gpu.json"
    python -m bench.gpu --device cpu --tiny              # whether all of it runs; its numbers say nothing

The top 4, 6 and 8 of 16 blocks, from kept states and through the whole model, and all of the model, each by the site's
own trainer on windows of random tokens. For each: tokens a second (from the median step, the first WARM left out), the
most memory that tensors took on the GPU, seconds of a round (the training of all batches, with the state's way there
and the delta's way back; then encoding and decoding on the processor), and how much of the GPU's peak the steps reach.

What a step computes is counted, not measured: for each token and block 2 operations for each weight and 4 s d for
attention over s tokens of width d, once forwards and, in a trained block, twice more backwards (Kaplan et al., arXiv
2001.08361, section 2.1; Chowdhery et al., arXiv 2204.02311, appendix B). Attention is counted whole, of which a causal
kernel may leave out half; head, norms and optimizer are not counted.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from bench.codec import reader_of, sealed
from bench.protocol import machine
from edge_client.batches import make_batches
from edge_client.device import Device, find_device
from edge_client.model import LoadedModel, State, load_model, version_zero
from edge_client.prefix import prepare
from edge_client.prefix_store import NOWHERE, OnDisk
from edge_client.tasks import Window
from edge_client.trainer import Dataset, train
from mailboat.demo.plan import SHIPPED_MODEL
from shared.codec import Codec
from shared.config import ComputeSection, FederationConfig
from shared.errors import ConfigError

PEAKS = {
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
}
"""Operations a second in bfloat16, dense, as NVIDIA's data sheets have them, by the name that torch gives."""

CODECS: tuple[Codec, ...] = ("int8", "bf16")
WARM = 3
"""Steps of each training that are not counted: kernels are chosen and memory is taken in them."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A LLaMA, and the windows that it reads."""

    depth: int
    width: int
    heads: int
    kv_heads: int
    inner: int
    vocabulary: int | None
    """None: as large as the shipped tokenizer's."""
    sequence: int

    @property
    def block_weights(self) -> int:
        """Of the matrices of a block: queries and output, keys and values, and the three of the MLP."""
        of_head = self.width // self.heads
        return self.width * (2 * self.width + 2 * self.kv_heads * of_head + 3 * self.inner)


LLAMA_1B = Shape(depth=16, width=2048, heads=32, kv_heads=8, inner=8192, vocabulary=128_256, sequence=512)
TINY = Shape(depth=16, width=32, heads=4, kv_heads=2, inner=64, vocabulary=None, sequence=32)


@dataclass(frozen=True, slots=True)
class Way:
    """What is trained, and from where."""

    blocks: int
    """The topmost, or all of them and the embeddings."""
    kept: bool

    def title(self, shape: Shape) -> str:
        """What it is called."""
        return "full" if self.blocks == shape.depth else f"top {self.blocks}, {'kept' if self.kept else 'plain'}"

    def plan(self, shape: Shape) -> str:
        """`layers.plan` of it."""
        return "all" if self.blocks == shape.depth else f"top:{self.blocks}"


def step_operations(shape: Shape, way: Way, tokens: int) -> int:
    """Floating-point operations of one step over so many tokens; see the module's docstring."""
    forwards = tokens * (2 * shape.block_weights + 4 * shape.sequence * shape.width)
    frozen = 0 if way.kept else shape.depth - way.blocks
    return forwards * (3 * way.blocks + frozen)


def peak_of(device: Device) -> float | None:
    """Operations a second at most; None where no table here has it."""
    known = device.is_gpu and device.precision == "bf16"
    return PEAKS.get(torch.cuda.get_device_name(device.at)) if known else None


def make_model(folder: Path, shape: Shape, device: Device) -> None:
    """Write a LLaMA with random weights in bfloat16, and the shipped tokenizer, which knows fewer tokens."""
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED_MODEL)
    config = LlamaConfig(
        vocab_size=shape.vocabulary or len(tokenizer),
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.depth,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.sequence,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    with device.seeded(0), torch.device(device.at):
        model = LlamaForCausalLM(config)
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_windows(loaded: LoadedModel, count: int) -> list[Window]:
    """Random tokens, each of which bears a random label."""
    chance, size = np.random.default_rng(0), loaded.max_length
    tokens = loaded.model.get_input_embeddings().num_embeddings
    everywhere = np.arange(size)
    return [
        Window(
            ids=chance.integers(0, tokens, size),
            targets=chance.integers(0, len(loaded.task.classes), size),
            positions=everywhere,
            units=everywhere + number * size,
        )
        for number in range(count)
    ]


def measure(way: Way, model: Path, shape: Shape, device: Device, options: argparse.Namespace) -> dict[str, Any]:
    """Train one way, as a site's worker does, and send what came of it through the codecs."""
    federation = FederationConfig.model_validate(
        {
            "federation": {"name": "bench"},
            "model": {"base": str(model)},
            "task": {"max_length": shape.sequence},
            "layers": {"plan": way.plan(shape)},
            "training": {"batch_size": options.batch, "lr": 1e-5, "epochs": 1},
        }
    )
    began = time.perf_counter()
    loaded = load_model(model, federation, suffix=way.kept, device=device)
    windows = make_windows(loaded, options.batch * options.batches)
    batches = make_batches(
        windows, size=options.batch, pad_id=loaded.pad_id, causal=True, per_token=loaded.task.head.per_token, seed=0
    )
    with tempfile.TemporaryDirectory(dir=model.parent) as name:
        folder = Path(name)
        keep = OnDisk(folder, "training", dtype="f32", limit=1 << 40, keep_free=0) if way.kept else NOWHERE
        data = Dataset((), prepare(loaded, batches, keep), len(windows))
        if data.prepared.cached != way.kept:
            raise AssertionError(data.prepared.reason)
        prepared = time.perf_counter() - began
        row = _trained(way, loaded, data, federation, shape)
        kept_bytes = sum(path.stat().st_size for path in folder.iterdir())
    return {"way": way.title(shape), "prepare_s": round(prepared, 2), "kept_bytes": kept_bytes, **row}


def _trained(
    way: Way, loaded: LoadedModel, data: Dataset, federation: FederationConfig, shape: Shape
) -> dict[str, Any]:
    device, state, losses = loaded.device, version_zero(loaded), list[float]()
    device.give_back()
    if device.is_gpu:
        torch.cuda.reset_peak_memory_stats(device.at)
    clock = [time.perf_counter()]

    def note(_share: float, loss: float) -> None:
        clock.append(time.perf_counter())
        losses.append(loss)

    result = train(loaded, state, data, federation.training, seed=0, progress=note)
    train_s = time.perf_counter() - clock[0]
    step_s = statistics.median(np.diff(clock)[WARM:])
    tokens = data.prepared.batches[0].ids.numel()
    rate, peak = step_operations(shape, way, tokens) / step_s, peak_of(device)
    found = {codec: coded(result.delta, codec) for codec in CODECS}
    return {
        "trained": loaded.trained_parameters,
        "steps": len(losses),
        "step_s": round(step_s, 5),
        "tokens_s": round(tokens / step_s, 1),
        "peak_bytes": torch.cuda.max_memory_allocated(device.at) if device.is_gpu else None,
        "tflop_s": round(rate / 1e12, 4),
        "share_of_peak": None if peak is None else round(rate / peak, 4),
        "train_s": round(train_s, 3),
        "codecs": found,
        "round_s": {codec: round(train_s + each["encode_s"] + each["decode_s"], 3) for codec, each in found.items()},
        "losses": [losses[0], losses[-1]],
    }


def coded(delta: State, codec: Codec) -> dict[str, float]:
    """Seconds of sealing an update but for the disk, and of adding it up, and its bytes."""
    sums = {name: np.zeros_like(values) for name, values in delta.items()}
    clock = [time.perf_counter()]
    manifest, frames = sealed(delta, codec)
    clock.append(time.perf_counter())
    reader = reader_of(manifest, frames)
    for name, total in sums.items():
        reader.add_tensor(name, 1.0, total)
    clock.append(time.perf_counter())
    encode_s, decode_s = np.diff(clock).round(3).tolist()
    return {"encode_s": encode_s, "decode_s": decode_s, "bytes": manifest.wire_bytes}


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """A table for people."""
    found = [f"{'':14}{'tokens/s':>12}{'peak GB':>10}{'TFLOP/s':>10}{'of peak':>9}{'round s, int8':>15}{'bf16':>9}"]
    for row in rows:
        peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.2f}"
        share = "unknown" if row["share_of_peak"] is None else f"{100 * row['share_of_peak']:.1f} %"
        rounds = row["round_s"]
        found.append(
            f"{row['way']:14}{row['tokens_s']:12,.0f}{peak:>10}{row['tflop_s']:10.2f}{share:>9}"
            f"{rounds['int8']:15.2f}{rounds['bf16']:9.2f}"
        )
    return found


def main() -> None:
    """Measure each way, print a table, write JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu")
    parser.add_argument("--precision", choices=("bf16", "f32"), default="bf16")
    parser.add_argument("--tiny", action="store_true", help="a model of width 32, to see whether all of it runs")
    parser.add_argument("--batch", type=int, default=8, help="windows in a step")
    parser.add_argument("--batches", type=int, default=20, help="steps of each training")
    parser.add_argument("--tops", type=int, nargs="+", default=[4, 6, 8], help="blocks trained")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.batches <= WARM:
        parser.error(f"--batches must be more than {WARM}, which are not counted")
    try:
        device = find_device(ComputeSection(device=options.device, precision=options.precision))
    except ConfigError as error:
        sys.exit(f"bench.gpu: {error.message}; --device cpu --tiny shows whether it runs")
    shape = TINY if options.tiny else LLAMA_1B
    ways = [Way(blocks, kept) for blocks in options.tops for kept in (True, False)] + [Way(shape.depth, kept=False)]
    rows = []
    with tempfile.TemporaryDirectory(prefix="mailboat-gpu-") as name:
        model = Path(name) / "model"
        make_model(model, shape, device)
        for way in ways:
            gc.collect()
            device.give_back()
            rows.append(measure(way, model, shape, device, options))
            print(json.dumps(rows[-1]), flush=True)
    peak = peak_of(device)
    told = f"peak {peak / 1e12:.0f} TFLOP/s" if peak else "peak unknown"
    print(f"{device.title}, {device.precision}, {options.batch} x {shape.sequence} tokens a step, {told}")
    print("\n".join(lines(rows)))
    if options.json:
        about = machine() | {"device": device.title, "precision": device.precision, "torch": torch.__version__}
        setting = {"batch": options.batch, "batches": options.batches, "sequence": shape.sequence, "tiny": options.tiny}
        options.json.write_text(json.dumps({"machine": about, "setting": setting, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
