"""How long after a link's return the bytes of a transfer move again.

    python -m bench.reconnect --json docs/results/reconnect.json

Real Mosquitto, coordinator and site processes at the default settings; only the site's link is bad (a seeded TCP
proxy). A run strikes its site in the midst of an upload, or of the pull of a state, again and again: the link falls
silent (`hole`: half-open connections, no answer to new ones) or breaks (`down`: reset, new ones refused) for some time.
Measured at the proxy: the time from the link's return until PROGRESS_BYTES have crossed in the transfer's direction,
more than all that is said around a transfer. Runs go on side by side.

What a busy machine delays says nothing: a measurement is marked when this process was late for its own looks between
the link's return and the progress, made once more at the end, and left out of the verdict.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import random
import shutil
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mailboat.flaky import Conditions, FlakyProxy
from shared.config import LinkSection
from tests.chaos.conduct import Run
from tests.chaos.plan import COORDINATOR_NAME, Patience, Plan
from tests.chaos.recovery import Looks
from tests.chaos.results import machine

Direction = Literal["up", "down"]
Kind = Literal["hole", "down"]

SITE = "site-1"
DEFAULTS = LinkSection()
PARAMETERS = 2_000_000
SLICE_KIB = 512
MBIT = 4.0
LATENCY_S = 0.025
TRANSFER_S = 4 * PARAMETERS / (MBIT * 125_000)
BEGUN_SHARE = (0.1, 0.5)
"""How much of a transfer is over when the link fails: drawn from this span, so that some of it is left afterwards."""
PROGRESS_BYTES = 16 * 1024
SHORT_S, SHORT_BOUND_S = 60.0, 2.0
LONG_BOUND_S = DEFAULTS.backoff_cap_s
OUTAGES = "1,5,20,60,90,150"
LOOK_S = 0.005
GIVE_UP_S = 120.0
STARVED_MAX = 0.1
"""Share of the time by which looks may be late before a measurement says nothing."""


@dataclass(frozen=True, slots=True)
class Outage:
    """One failure of the link, in the midst of a transfer."""

    kind: Kind
    direction: Direction
    for_s: float
    phase: float
    """Share of the transfer that is over when it begins."""

    @property
    def bound_s(self) -> float:
        """Within which bytes must move."""
        return SHORT_BOUND_S if self.for_s <= SHORT_S else LONG_BOUND_S


@dataclass(frozen=True, slots=True)
class Measured:
    """What one outage led to; `progress_s` is None when nothing had moved after GIVE_UP_S."""

    outage: Outage
    progress_s: float | None
    resent_bytes: int
    """Bytes of chunks that the broker had from the site before (uploads only)."""
    starved: float

    @property
    def calm(self) -> bool:
        """Whether the time means anything."""
        return self.starved <= STARVED_MAX

    @property
    def kept(self) -> bool:
        """Whether the bound was kept."""
        return self.progress_s is not None and self.progress_s <= self.outage.bound_s


def outages(seed: int, lengths_s: Iterable[float], phases: int, long_phases: int) -> list[Outage]:
    """All that are to be measured, the longest first."""
    chance = random.Random(f"reconnect/{seed}")
    lengths = [for_s for for_s in lengths_s for _ in range(phases if for_s <= SHORT_S else long_phases)]
    kinds: tuple[Kind, ...] = ("hole", "down")
    directions: tuple[Direction, ...] = ("up", "down")
    drawn = [
        Outage(kind, direction, for_s, round(chance.uniform(*BEGUN_SHARE), 3))
        for for_s in lengths
        for kind in kinds
        for direction in directions
    ]
    return sorted(drawn, key=lambda outage: -outage.for_s)


def plan(seed: int) -> Plan:
    """One site that uploads and pulls in turn, for as long as it is asked to; everything else at its default."""
    return Plan(
        seed=seed,
        mode="sync",
        sites=1,
        versions=1000,
        parameters=PARAMETERS,
        slice_kib=SLICE_KIB,
        window=DEFAULTS.window,
        queue_max=1000,
        sealed=False,
        training_s=0.1,
        links={COORDINATOR_NAME: Conditions(), SITE: Conditions(latency_s=LATENCY_S, bytes_per_s=MBIT * 125_000)},
        points={},
        faults=(),
        patience=Patience(DEFAULTS.stall_s, DEFAULTS.backoff_cap_s, DEFAULTS.keepalive_s),
    )


async def work(seed: int, root: Path, waiting: deque[Outage], found: list[Measured]) -> None:
    """Take outages, one after the other, until none is left."""
    run = Run(root, plan(seed))
    try:
        await run.begin()
        while waiting:
            measured = await strike(run, waiting.popleft())
            found.append(measured)
            tell(measured)
    finally:
        await run.close()


async def strike(run: Run, outage: Outage) -> Measured:
    """Wait for a transfer in that direction, fail its link, and look when bytes move again."""
    proxy = run.proxies[SITE]
    while True:
        arriving = await begun(run.root, outage.direction)
        await asyncio.sleep(outage.phase * TRANSFER_S)
        if arriving.exists():  # version 0, of one value, is there in no time
            break
    resent, looks = run.tap.up.resent, Looks()
    if outage.kind == "hole":
        proxy.hole()
    else:
        await proxy.down()
    await asyncio.sleep(outage.for_s)
    looks.begin()
    before = crossed(proxy, outage.direction)
    back_at = time.monotonic()
    await (proxy.heal() if outage.kind == "hole" else proxy.up())
    progress_s = None
    while (waited_s := time.monotonic() - back_at) < GIVE_UP_S:
        if crossed(proxy, outage.direction) - before >= PROGRESS_BYTES:
            progress_s = round(waited_s, 3)
            break
        await asyncio.sleep(LOOK_S)
    starved = looks.end()
    await asyncio.sleep(TRANSFER_S)  # what was sent twice has passed by then
    return Measured(outage, progress_s, run.tap.up.resent - resent, round(starved, 3))


def crossed(proxy: FlakyProxy, direction: Direction) -> int:
    """Bytes that went over the bad link in that direction so far."""
    return proxy.traffic.up if direction == "up" else proxy.traffic.down


async def begun(root: Path, direction: Direction) -> Path:
    """Return when a transfer in that direction that was not there before is on its way: the file that says so."""
    pattern = f"{COORDINATOR_NAME}/updates/*.part.manifest" if direction == "up" else f"{SITE}/states/*.part.manifest"
    there = set(root.glob(pattern))
    while not (new := set(root.glob(pattern)) - there):
        await asyncio.sleep(0.05)
    return new.pop()


def tell(measured: Measured) -> None:
    """One line for the terminal."""
    outage = measured.outage
    verdict = "ok" if measured.kept else "LATE" if measured.calm else "late, on a busy machine"
    sys.stdout.write(
        f"{time.strftime('%H:%M:%S')} {outage.kind:4s} {outage.direction:4s} {outage.for_s:5.0f} s: progress after "
        f"{measured.progress_s} s, resent {measured.resent_bytes / 1e6:.2f} MB, starved {measured.starved:.0%}  "
        f"{verdict}\n"
    )
    sys.stdout.flush()


async def measure(wanted: Iterable[Outage], runs: int, seed: int) -> list[Measured]:
    """Measure all of them, in so many runs side by side."""
    waiting, found = deque(wanted), list[Measured]()
    root = Path(tempfile.mkdtemp(prefix="mailboat-reconnect-"))
    try:
        async with asyncio.TaskGroup() as group:
            for number in range(min(runs, len(waiting))):
                folder = root / str(number)
                folder.mkdir()
                group.create_task(work(1000 * seed + number, folder, waiting, found))
    finally:
        shutil.rmtree(root)
    return found


def table(found: Iterable[Measured]) -> list[dict[str, Any]]:
    """One line for each kind, direction and length: how often, and the times of the calm ones."""
    groups: dict[tuple[str, str, float], list[Measured]] = {}
    for one in found:
        groups.setdefault((one.outage.kind, one.outage.direction, one.outage.for_s), []).append(one)
    lines = []
    for (kind, direction, for_s), measured in sorted(groups.items()):
        calm = sorted(GIVE_UP_S if one.progress_s is None else one.progress_s for one in measured if one.calm)
        lines.append(
            {
                "fault": kind,
                "direction": direction,
                "outage s": for_s,
                "measured": len(measured),
                "calm": len(calm),
                "median s": round(calm[len(calm) // 2], 2) if calm else "-",
                "worst s": round(calm[-1], 2) if calm else "-",
                "bound s": measured[0].outage.bound_s,
                "late": sum(one.calm and not one.kept for one in measured),
                "resent MB, worst": round(max(one.resent_bytes for one in measured) / 1e6, 2),
            }
        )
    return lines


def main() -> int:
    """Measure, print a line for each, write JSON; 1 when a bound was broken on a calm machine."""
    parser = argparse.ArgumentParser(prog="python -m bench.reconnect", description=__doc__.partition("\n")[0])
    parser.add_argument("--outages", default=OUTAGES, help="how long the link is away, in seconds")
    parser.add_argument("--phases", type=int, default=3, help="how often each outage of up to a minute is measured")
    parser.add_argument("--long-phases", type=int, default=1, help="the same for longer ones")
    parser.add_argument("--runs", type=int, default=8, help="side by side")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--again", type=int, default=2, help="how often to repeat what a busy machine spoilt")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    lengths_s = map(float, options.outages.split(","))
    wanted = outages(options.seed, lengths_s, options.phases, options.long_phases)
    found: list[Measured] = []
    for turn in range(1 + options.again):
        measured = asyncio.run(measure(wanted, options.runs, options.seed + 100 * turn))
        found += measured
        wanted = [one.outage for one in measured if not one.calm]
        if options.json is not None:
            save(options.json, found, options.seed)
        if not wanted:
            break
    return int(any(one.calm and not one.kept for one in found))


def save(path: Path, found: list[Measured], seed: int) -> None:
    """Settings, table and every single measurement."""
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = {
        "update_bytes": 4 * PARAMETERS,
        "slice_kib": SLICE_KIB,
        "mbit_s": MBIT,
        "latency_ms": LATENCY_S * 1000,
        "window_bytes": DEFAULTS.window * SLICE_KIB * 1024,
        "seed": seed,
        "progress_bytes": PROGRESS_BYTES,
        "starved_max": STARVED_MAX,
    }
    single = [dataclasses.asdict(one) for one in found]
    result = {"machine": machine(), "settings": settings, "table": table(found), "all": single}
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
