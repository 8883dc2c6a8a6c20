"""The coordinator's peak memory over many concurrent uploads, against that over two.

    python -m bench.memory --uploads 2,64 --mb 50 --json docs/results/memory.json

A real broker and a real coordinator process; the sites speak the protocol and do nothing else: they pull no state,
train nothing, and send the same frames from memory, each under an update id of its own. Every update is accepted before
the coordinator is looked at (VmHWM in /proc), so all of them were on their way and on the disk: UPLOADS x MB of it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.protocol import ProtocolSite, machine, make_load, peak_bytes, serving


async def measure(uploads: int, megabytes: float) -> dict[str, Any]:
    """Peak memory of a fresh coordinator over so many concurrent uploads."""
    with tempfile.TemporaryDirectory(prefix="mailboat-memory-") as folder:
        root = Path(folder)
        load = make_load(root, megabytes, 'mode = "sync"\nquorum = 100000\ndeadline_s = 1e6')
        async with serving(root) as (url, _broker, coordinator):
            idle = peak_bytes(coordinator)
            began = time.monotonic()
            gate = asyncio.Event()
            gate.set()
            async with asyncio.TaskGroup() as tasks:
                for number in range(uploads):
                    tasks.create_task(ProtocolSite(f"site-{number:02d}", url, load, gate=gate).run())
            seconds = time.monotonic() - began
            peak = peak_bytes(coordinator)
    return {
        "uploads": uploads,
        "wire_bytes_each": sum(map(len, load.frames)),
        "idle_bytes": idle,
        "peak_bytes": peak,
        "seconds": round(seconds, 1),
    }


def main() -> None:
    """Measure, print the ratio of the last to the first, write JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__)
    parser.add_argument("--uploads", default="2,64", help="numbers of concurrent uploads, the base first")
    parser.add_argument("--mb", type=float, default=50.0, help="megabytes of each update")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = []
    for uploads in map(int, options.uploads.split(",")):
        found.append(asyncio.run(measure(uploads, options.mb)))
        print(found[-1], flush=True)
    ratio = found[-1]["peak_bytes"] / found[0]["peak_bytes"]
    print(f"peak with {found[-1]['uploads']} uploads / peak with {found[0]['uploads']}: {ratio:.3f}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(
            json.dumps({"machine": machine(), "mb": options.mb, "runs": found, "ratio": ratio}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
