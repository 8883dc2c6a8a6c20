"""A merge alone: parameters a second, beside the rate at which the machine multiplies and adds, and its memory.

    make bench-merge ARGS="--updates 2,64"

The coordinator's own merge, with a fedbuff plan, of updates that are all there: frames hashed, expanded, decoded and
added up, the server's step, master and state written and synced, on a RAM disk. A few updates are drawn from a normal
distribution, and the others are further names of the same files, so that a thousand of them fit; together they are
larger than the processor's caches. Parameters are those of all updates, seconds those of the processor, so that other
work on the machine spoils them less. Memory is what the process held at most above what it held before.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from bench.protocol import machine, memory_bytes
from coordinator.records import Accepted
from shared.config import CodecSection, StateCodecName
from shared.tensorfile import F32Array
from tests.small_run import SmallRun

TENSORS = 16
DISTINCT = 8
"""Updates with contents of their own."""


def make_run(folder: Path, values: int, codec: StateCodecName) -> tuple[SmallRun, list[Accepted]]:
    """A run of so many parameters at version 0, and DISTINCT updates that it has accepted."""
    chance = np.random.default_rng(0)

    def drawn() -> dict[str, F32Array]:
        shape = values // TENSORS
        return {f"block.{at:02d}": chance.normal(0, 1e-3, shape).astype(np.float32) for at in range(TENSORS)}

    run = SmallRun(folder, drawn(), codec=CodecSection(up=codec, down="f32"))
    return run, [run.update(f"site-{number}", drawn()) for number in range(DISTINCT)]


def repeat(run: SmallRun, accepted: list[Accepted], count: int) -> list[Accepted]:
    """So many updates, of which each is one of those `accepted` under another id and site."""
    found = []
    for number in range(count):
        origin = accepted[number % len(accepted)]
        stored = run.updates.get(origin.update_id)
        assert stored is not None
        update_id, site = f"{number:032x}", f"site-{number:04d}"
        facts = stored.manifest.update.model_copy(update={"site": site})
        manifest = stored.manifest.model_copy(update={"transfer_id": update_id, "facts": facts})
        frames = stored.path.with_name(f"{update_id}.frames")
        if not frames.exists():
            frames.hardlink_to(stored.path)
            frames.with_suffix(".manifest").write_bytes(manifest.to_bytes())
        found.append(replace(origin, update_id=update_id, site=site, manifest_sha256=manifest.digest))
    return found


def measure(run: SmallRun, accepted: list[Accepted], values: int, turns: int) -> dict[str, Any]:
    """Merge these updates a few times: medians of seconds, and the most memory above what was held before."""
    plan = run.planned(accepted)
    seconds, taken = [], []
    # What making the updates took goes back to the system, which then forgets the peak so far.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = memory_bytes(os.getpid(), "VmRSS")
    for _ in range(turns):
        began, worked = time.monotonic(), time.process_time()
        run.run_plan(plan)
        taken.append(time.monotonic() - began)
        seconds.append(time.process_time() - worked)
    return {
        "updates": len(accepted),
        "processor_s": round(statistics.median(seconds), 3),
        "seconds": round(statistics.median(taken), 3),
        "parameters_per_s": round(len(accepted) * values / statistics.median(seconds)),
        "peak_bytes": memory_bytes(os.getpid(), "VmHWM") - before,
    }


def memory_rate(values: int = 1 << 26, block: int = 1 << 16) -> float:
    """Parameters a second of acc += w x, both arrays far larger than the caches, in blocks that fit into them."""
    acc, x, scratch = np.zeros(values, np.float32), np.ones(values, np.float32), np.empty(block, np.float32)
    best = float("inf")
    for _ in range(5):
        began = time.process_time()
        for at in range(0, values, block):
            np.multiply(x[at : at + block], np.float32(0.5), out=scratch)
            acc[at : at + block] += scratch
        best = min(best, time.process_time() - began)
    return values / best


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.merge", description=__doc__)
    parser.add_argument("--updates", default="2,8,64,256,1000", help="numbers of updates")
    parser.add_argument("--parameters", type=float, default=4.0, help="millions of parameters of each update")
    parser.add_argument("--codecs", nargs="+", choices=get_args(StateCodecName), default=["f32", "bf16", "int8"])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--place", type=Path, default=Path("/dev/shm"), help="folder to work in")  # noqa: S108 - a RAM disk
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    values = round(options.parameters * 1e6)
    rate, found = memory_rate(), []
    print(f"memory: {rate / 1e6:,.0f} M parameters/s")
    for codec in options.codecs:
        with tempfile.TemporaryDirectory(prefix="mailboat-merge-", dir=options.place) as folder:
            run, accepted = make_run(Path(folder), values, codec)
            for count in map(int, options.updates.split(",")):
                row = measure(run, repeat(run, accepted, count), values, options.turns)
                row |= {"codec": codec, "of_memory_rate": round(row["parameters_per_s"] / rate, 4)}
                found.append(row)
                print(json.dumps(row), flush=True)
    if options.json:
        result = {"machine": machine(), "parameters": values, "memory_parameters_per_s": round(rate), "runs": found}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
