"""What a codec costs in F1: the demonstration's federation in one process, sync, once for each codec.

    python -m bench.codec_rounds --codecs f32 bf16 int8 int4 topk2 --versions 10 --seeds 0
    python -m bench.codec_rounds --codecs f32/bf16 f32/int8 f32/int8/4 f32/int4/8 --versions 10 --seeds 0

A codec may name its feedback and the server's momentum: `topk2:0.95:0`. It may name the downlink's: `int8/int8/4` is
int8 both ways, down as steps, and every fourth version whole; else states travel as bf16, with f32 as f32. The same
trainer, seals, admission and merge as in a real run. Bytes are those of the updates as sealed, and of what a site
fetches of each version, against float32.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from bench.hospitals import Hospitals
from bench.protocol import machine
from mailboat.demo import defaults
from shared.config import CodecName, CodecSection


def parse_codec(text: str) -> tuple[CodecSection, float]:
    """The codec section and the server's momentum that `up[/down[/steps]][:feedback[:momentum]]` means."""
    names, *numbers = text.split(":")
    up, *ways = names.split("/")
    down = ways[0] if ways else "f32" if up == "f32" else "bf16"
    steps = int(ways[1]) if len(ways) > 1 else 0
    feedback = float(numbers[0]) if numbers and numbers[0] else None
    momentum = float(numbers[1]) if len(numbers) > 1 else defaults.SERVER_MOMENTUM
    codecs = {"up": up, "down": down, "steps": steps, "feedback": feedback}
    return CodecSection.model_validate({**codecs, "slice_kib": defaults.SLICE_KIB}), momentum


def measure(hospitals: Hospitals, text: str) -> dict[str, Any]:
    """F1 of each version under a codec, and the shares of float32 that updates and versions took."""
    codec, momentum = parse_codec(text)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mailboat-codec-") as name:
        versions = list(hospitals.run(Path(name) / "run", codec, momentum=momentum))
    exact = 4 * hospitals.loaded.trained_parameters * len(versions)
    return {
        "codec": text,
        "feedback": codec.decay,
        "momentum": momentum,
        "f1": [round(100 * version.f1, 1) for version in versions],
        "share": round(100 * sum(version.wire_bytes for version in versions) / (exact * len(hospitals.sites)), 3),
        "down_share": round(100 * sum(version.down_bytes for version in versions) / exact, 3),
        "seconds": round(time.monotonic() - began),
    }


def measure_all(codecs: list[str], versions: int, seeds: list[int]) -> Iterator[dict[str, Any]]:
    """Yield what was measured of each codec and seed, as it is done."""
    for seed in seeds:
        with tempfile.TemporaryDirectory(prefix="mailboat-hospitals-") as name:
            hospitals = Hospitals(Path(name), versions=versions, seed=seed)
            for codec in codecs:
                yield {"seed": seed, **measure(hospitals, codec)}


def main() -> None:
    """Print one line for each codec and seed, write JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.codec_rounds", description=__doc__)
    parser.add_argument(
        "--codecs", nargs="+", default=list(get_args(CodecName)), metavar="UP[/DOWN[/STEPS]][:FEEDBACK[:MOMENTUM]]"
    )
    parser.add_argument("--versions", type=int, default=defaults.ROUNDS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    runs = []
    for run in measure_all(options.codecs, options.versions, options.seeds):
        print(json.dumps(run), flush=True)
        runs.append(run)
        if options.json:  # also when it is ended before all are through
            options.json.write_text(json.dumps({"machine": machine(), "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
