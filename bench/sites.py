"""Many sites over one real broker: what an update costs the coordinator, and how soon everybody hears of a version.

    python -m bench.sites --sites 10,100,1000 --mb 1 --json docs/results/sites.json

A buffered round (FedBuff with a buffer of all sites): everybody connects, then all bring an update at once, then the
coordinator merges and announces. Broker and coordinator are real processes; the sites speak the protocol from one
process, each over a connection of its own, which takes the larger share of the machine. So seconds say little; the
coordinator's processor seconds for each update, and the memory of coordinator and broker, are theirs alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.peers.stage import processor_s
from bench.protocol import ProtocolSite, machine, make_load, peak_bytes, serving

CONNECTING = 50
"""Sites that connect at a time: a thousand at once is a test of the kernel's queue of connections."""


async def measure(sites: int, megabytes: float, root: Path) -> dict[str, Any]:
    """One buffered round of so many sites, from a fresh coordinator; seconds and bytes."""
    load = make_load(root, megabytes, f'mode = "fedbuff"\nbuffer = {sites}\ndeadline_s = 3600')
    async with serving(root) as (url, broker, coordinator), asyncio.TaskGroup() as tasks:
        gate = asyncio.Event()
        crowd = [ProtocolSite(f"site-{n:04d}", url, load, gate=gate, stays=True) for n in range(sites)]
        idle = {"coordinator": peak_bytes(coordinator), "broker": peak_bytes(broker)}
        for start in range(0, sites, CONNECTING):
            arriving = crowd[start : start + CONNECTING]
            running = [tasks.create_task(site.run()) for site in arriving]
            await asyncio.gather(*(site.ready.wait() for site in arriving))
            del running
        connected = {"coordinator": peak_bytes(coordinator), "broker": peak_bytes(broker)}
        before, began = processor_s(coordinator), time.monotonic()
        broker_before = processor_s(broker)
        gate.set()
        await _until(lambda: all(site.receipted for site in crowd))
        accepted, worked = time.monotonic() - began, processor_s(coordinator) - before
        await _until(lambda: all(site.announced for site in crowd))
        heard = [site.announced for site in crowd if site.announced is not None]
        return {
            "sites": sites,
            "wire_bytes_each": sum(map(len, load.frames)),
            "accepted_s": round(accepted, 2),
            "updates_per_s": round(sites / accepted, 1),
            "coordinator_ms_per_update": round(1000 * worked / sites, 2),
            "coordinator_ms_per_update_with_merge": round(1000 * (processor_s(coordinator) - before) / sites, 2),
            "broker_ms_per_update": round(1000 * (processor_s(broker) - broker_before) / sites, 2),
            "first_to_last_heard_s": round(max(heard) - min(heard), 3),
            "idle_bytes": idle,
            "connected_bytes": connected,
            "peak_bytes": {"coordinator": peak_bytes(coordinator), "broker": peak_bytes(broker)},
        }


async def _until(condition: Any) -> None:
    while not condition():
        await asyncio.sleep(0.05)


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.sites", description=__doc__)
    parser.add_argument("--sites", default="10,100,1000", help="numbers of sites")
    parser.add_argument("--mb", type=float, default=1.0, help="megabytes of each update")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = []
    for sites in map(int, options.sites.split(",")):
        with tempfile.TemporaryDirectory(prefix="mailboat-sites-") as folder:
            found.append(asyncio.run(measure(sites, options.mb, Path(folder))))
        print(json.dumps(found[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "mb": options.mb, "runs": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
