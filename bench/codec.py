"""Codecs alone: share of float32, relative error, and megabytes of float32 a second and core, there and back.

    python -m bench.codec --turns 5 --json docs/results/codec.json

The deltas are real: each of the demonstration's sites has trained the shipped model once, for a few hundred steps of
AdamW; for the rates their values are laid out as matrices of 4 M values, as larger models have. *Encode* is all that a
seal does but the disk: codec, file, its digest, slices, zstd, digests of frames. *Decode and add* is all that a merge
does but the disk: digests of frames, zstd, codec, the sum. Both in processor seconds of all threads, codecs in turns,
the fastest of all turns, so that other work on the machine costs little. Beside them zstd alone on the same float32 and
bfloat16 bytes, and what others have published.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import zstandard

from bench.protocol import machine
from shared.codec import Codec
from shared.digest import digest
from shared.errors import CorruptError
from shared.manifest import Manifest, UpdateFacts
from shared.reader import TensorReader
from shared.slices import make_transfer_frames
from shared.tensorfile import F32Array, f32_to_bf16

CODECS: tuple[Codec, ...] = get_args(Codec)
Tensors = Mapping[str, F32Array]

ZSTD_LEVELS = (1, 3)
SLICE_BYTES = 512 * 1024
LARGE = (2048, 2048)

PUBLISHED = {
    "ZipNN (arXiv 2411.05239), weights in bfloat16, share of bfloat16": 66.2,
    "zstd alone, from the same paper, share of bfloat16": 78.7,
    "NVIDIA FLARE 2.9, 1 B parameters, fp16 messages, share of float32": 50.0,
    "NVIDIA FLARE 2.9, 1 B parameters, int8 messages, share of float32": 25.03,
    "NVIDIA FLARE 2.9, 1 B parameters, 4-bit messages, share of float32": 14.06,
}
"""Not measured here."""


def trained_deltas() -> list[Tensors]:
    """One delta of each of the demonstration's sites, from version 0."""
    import torch  # noqa: PLC0415 - the functions below need neither it nor what follows

    from edge_client.data import load_notes  # noqa: PLC0415
    from edge_client.model import load_model, read_trainable  # noqa: PLC0415
    from edge_client.trainer import make_dataset, round_seed, train  # noqa: PLC0415
    from mailboat.demo.plan import DemoOptions, make_plan  # noqa: PLC0415

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="mailboat-codec-") as name:
        plan = make_plan(DemoOptions(workdir=Path(name) / "demo"), name="bench")
        options, training = plan.options, plan.federation.training
        plan.task.notes.make(
            plan.layout.notes, sites=options.sites, notes=options.notes, alpha=options.alpha, seed=0, heldout=1
        )
        loaded = load_model(plan.federation.model.base, plan.federation)
        initial = read_trainable(loaded)
        deltas: list[Tensors] = []
        for site in plan.started:
            notes = load_notes(plan.layout.notes / site, loaded.task).notes
            data = make_dataset(loaded, notes, batch_size=training.batch_size, seed=0)
            deltas.append(train(loaded, initial, data, training, seed=round_seed(0, site, 0)).delta)
    return deltas


def sealed(delta: Tensors, codec: Codec) -> tuple[Manifest, list[bytes]]:
    """The frames of an update and its manifest."""
    frames = make_transfer_frames(delta, codec, {"mailboat": "update"}, SLICE_BYTES)
    data = [frame.data for frame in frames]
    summary = frames.summary
    manifest = Manifest(
        transfer_id="0" * 32,
        federation="bench",
        fingerprint="0" * 64,
        codec=codec,
        **dataclasses.asdict(summary),
        created=0.0,
        facts=UpdateFacts(site="bench", base_version=0, base_digest="0" * 64, examples=1, metrics={}),
    )
    return manifest, data


def reader_of(manifest: Manifest, frames: list[bytes]) -> TensorReader:
    """As a merge opens an update: each frame is compared with its hash."""

    def read(index: int) -> bytes:
        if digest(frames[index]) != manifest.frame_hash(index):
            raise CorruptError("a frame changed in memory", hint="look for memory errors")
        return frames[index]

    return TensorReader(manifest, read, verify=False)


def seconds(work: Callable[[], object]) -> float:
    """Processor seconds of this process: a slice is compressed in another thread than hashes it."""
    began = time.process_time()
    work()
    return time.process_time() - began


class Rates:
    """What is measured over some updates, in turns."""

    def __init__(self, deltas: Sequence[Tensors]) -> None:
        self._deltas = deltas
        self._exact_bytes = exact_bytes(deltas)
        self._sums = {name: np.zeros_like(values) for name, values in deltas[0].items()}
        self._sealed = {codec: [sealed(delta, codec) for delta in deltas] for codec in CODECS}
        self._spent: dict[tuple[Codec, str], float] = {}

    def turn(self) -> None:
        """Measure each codec once."""
        for codec in CODECS:
            self._least(codec, "encode", self._seal)
            self._least(codec, "decode_add", self._merge)

    def _least(self, codec: Codec, what: str, work: Callable[[Codec], None]) -> None:
        spent = seconds(lambda: work(codec))
        self._spent[codec, what] = min(spent, self._spent.get((codec, what), spent))

    def _seal(self, codec: Codec) -> None:
        for delta in self._deltas:
            sealed(delta, codec)

    def _merge(self, codec: Codec) -> None:
        for manifest, frames in self._sealed[codec]:
            reader = reader_of(manifest, frames)
            for name, total in self._sums.items():
                reader.add_tensor(name, 0.25, total)

    def of(self, codec: Codec) -> dict[str, float]:
        """MB of float32 a second."""
        return {
            f"{what}_mb_s": round(self._exact_bytes / self._spent[codec, what] / 1e6)
            for what in ("encode", "decode_add")
        }


def sizes_and_errors(deltas: Sequence[Tensors], codec: Codec) -> dict[str, float]:
    """Bytes of frames and manifests in per cent of float32, and ||error|| / ||delta||."""
    found = [sealed(delta, codec) for delta in deltas]
    sent = sum(manifest.wire_bytes + len(manifest.to_bytes()) for manifest, _ in found)
    off = exact = 0.0
    for delta, update in zip(deltas, found, strict=True):
        reader = reader_of(*update)
        for name, values in delta.items():
            wide = values.astype(np.float64)
            off += float(np.square(reader.tensor(name) - wide).sum())
            exact += float(np.square(wide).sum())
    return {
        "share_percent": round(100 * sent / exact_bytes(deltas), 3),
        "relative_error": float(f"{math.sqrt(off / exact):.3g}"),
    }


def large_tensors(deltas: Sequence[Tensors]) -> list[Tensors]:
    """The same values, one behind the other and again, as four matrices of the size that layers of 1 B models have."""
    flat = np.concatenate([values.reshape(-1) for delta in deltas for values in delta.values()])
    return [{f"layer.{number}": np.resize(np.roll(flat, -number * 999_983), LARGE) for number in range(4)}]


def exact_bytes(deltas: Sequence[Tensors]) -> int:
    """Bytes in float32."""
    return sum(4 * values.size for delta in deltas for values in delta.values())


def zstd_alone(deltas: Sequence[Tensors]) -> dict[str, dict[str, float]]:
    """The same bytes in the same slices, as zstd packs them by itself: neither grouped nor hashed."""
    flat = np.concatenate([values.reshape(-1) for delta in deltas for values in delta.values()])
    rows = {}
    for name, data in (("f32", flat.view(np.uint8)), ("bf16", f32_to_bf16(flat).view(np.uint8))):
        slices = [data[start : start + SLICE_BYTES].tobytes() for start in range(0, data.size, SLICE_BYTES)]
        for level in ZSTD_LEVELS:
            frames: list[bytes] = []
            spent = seconds(lambda: frames.extend(map(zstandard.ZstdCompressor(level=level).compress, slices)))  # noqa: B023
            rows[f"zstd -{level} on {name}"] = {
                "share_percent": round(100 * sum(map(len, frames)) / flat.nbytes, 3),
                "compress_mb_s": round(flat.nbytes / spent / 1e6),
            }
    return rows


def main() -> None:
    """Print a table, write JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.codec", description=__doc__)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    deltas = trained_deltas()
    rates, rates_small = Rates(large_tensors(deltas)), Rates(deltas)
    for _ in range(options.turns):
        rates.turn()
        rates_small.turn()
    rows = {codec: sizes_and_errors(deltas, codec) | rates.of(codec) for codec in CODECS}
    alone = zstd_alone(deltas)
    print(f"{'':16}{'share %':>9}{'error':>9}{'encode':>9}{'decode+add':>12}   MB of float32 a second and core")
    for codec, row in rows.items():
        told = f"{row['encode_mb_s']:>9.0f}{row['decode_add_mb_s']:>12.0f}"
        print(f"{codec:16}{row['share_percent']:>9.2f}{row['relative_error']:>9.3g}{told}")
    for name, row in alone.items():
        print(f"{name:16}{row['share_percent']:>9.2f}{'':>9}{row['compress_mb_s']:>9.0f}")
    for name, share in PUBLISHED.items():
        print(f"published: {name}: {share:g} %")
    if options.json:
        found = {
            "machine": machine(),
            "turns": options.turns,
            "codecs": rows,
            "codecs_of_the_small_tensors_as_trained": {codec: rates_small.of(codec) for codec in CODECS},
            "zstd_alone": alone,
            "published_not_measured_here": PUBLISHED,
        }
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
