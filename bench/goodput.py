"""How long one large transfer takes over a slow link that breaks again and again, beside the ideal.

    python -m bench.goodput --mb 100 --mbit 4 --cut-every 60 --outage 5

A real Mosquitto, a coordinator and a site with the default settings; only the site's link is bad (a seeded TCP proxy).
The transfer is noise, which no codec makes smaller. Ideal: its bytes at the link's rate. The ratio printed is
(ideal + outages) / time taken, and what crossed the link beyond the transfer itself is counted at the proxy.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from safetensors.numpy import load_file, save_file

from broker.launcher import run_broker
from edge_client.training import Standing
from mailboat.flaky import Conditions, Fault, FaultKind, FlakyProxy
from shared import logs
from shared.link.endpoints import parse_endpoints
from shared.manifest import manifest_from_bytes
from shared.tensorfile import F32Array
from tests.toys import ToyTrained, toy_coordinator, toy_site, write_toy

POLL_S = 0.02
NOISE_BITS = 24
"""Of 32: sign and mantissa are drawn, the exponent is the same everywhere and compresses away."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is sent over which link; bytes and seconds."""

    direction: Literal["up", "down"] = "up"
    payload_bytes: int
    bytes_per_s: float
    latency_s: float = 0.025
    cut_every_s: float
    fault: FaultKind = "down"
    outage_s: float
    cut_after: tuple[int | None, ...] = ()
    """Bytes after which the first, second, ... connection is closed, besides the outages."""
    slice_kib: int = 512
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What was seen, from the moment the transfer could begin to the moment it was durable at the other end."""

    wire_bytes: int
    crossed_bytes: int
    """In the direction of the transfer, everything: resent chunks, half chunks, control messages, MQTT's headers."""
    window_bytes: int
    """One credit window."""
    cuts: int
    outage_s: float
    ideal_s: float
    taken_s: float

    @property
    def ratio(self) -> float:
        """1 is the ideal."""
        return (self.ideal_s + self.outage_s) / self.taken_s

    @property
    def extra_per_cut(self) -> float:
        """Bytes that crossed the link beyond the transfer, for each cut."""
        return (self.crossed_bytes - self.wire_bytes) / max(1, self.cuts)


class NoiseTrainer:
    """Its delta is noise."""

    standing = Standing()

    def __init__(self, seed: int) -> None:
        self.seed = seed

    async def train(
        self, state: Path, base_version: int, delta: Path, *, on_progress: Callable[[float, float], None]
    ) -> ToyTrained:
        """Write noise in the shapes of the state."""
        on_progress(1.0, 0.0)
        shapes = {name: values.shape for name, values in load_file(state).items()}
        await asyncio.to_thread(save_file, noise(shapes, self.seed), delta)
        return ToyTrained(10, {"loss": float(base_version)})


def noise(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, F32Array]:
    """Values between 1 and 2, of either sign."""
    chance = np.random.default_rng(seed)
    return {
        name: (1 + chance.random(shape, np.float32)) * chance.choice(np.array([-1, 1], np.float32), shape)
        for name, shape in shapes.items()
    }


class Outages:
    """A script of one fault after the other that remembers when each began."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.begun_at: list[float] = []

    def __iter__(self) -> Iterator[Fault]:
        while True:
            self.begun_at.append(time.monotonic() + self._settings.cut_every_s)
            yield Fault(self._settings.cut_every_s, self._settings.fault, self._settings.outage_s)

    def within(self, begin: float, end: float) -> int:
        """How many began in that span."""
        return sum(begin <= at < end for at in self.begun_at)


async def measure(settings: Settings, root: Path) -> Result:
    """Run one federation of one site and one version below `root`, and watch the transfer from the outside."""
    parameters = settings.payload_bytes * 8 // NOISE_BITS
    outages = Outages(settings)
    conditions = Conditions(
        latency_s=settings.latency_s, bytes_per_s=settings.bytes_per_s, cut_after=settings.cut_after
    )
    async with run_broker("mosquitto", root / "broker") as broker:
        (endpoint,) = parse_endpoints(broker.url)
        async with FlakyProxy(
            endpoint.host, endpoint.port, seed=settings.seed, conditions=conditions, faults=outages
        ) as proxy:
            write_toy(
                root,
                broker.url,
                sites=1,
                versions=1,
                parameters=parameters,
                slice_kib=settings.slice_kib,
                link="",
                urls={"site-1": proxy.url},
            )
            if settings.direction == "down":
                initial = root / "coordinator" / "initial.safetensors"
                shapes = {name: values.shape for name, values in load_file(initial).items()}
                save_file(noise(shapes, settings.seed), initial)
            trainer = NoiseTrainer(settings.seed) if settings.direction == "up" else None
            async with asyncio.TaskGroup() as group:
                group.create_task(toy_coordinator(root / "coordinator.toml"))
                group.create_task(toy_site(root / "site-1.toml", trainer=trainer))
                return await _watch(settings, root / "site-1", proxy, outages)


async def _watch(settings: Settings, site: Path, proxy: FlakyProxy, outages: Outages) -> Result:
    up = settings.direction == "up"
    manifest = await _appears(site, "outbox/*.manifest" if up else "states/*.part.manifest")
    wire_bytes = manifest_from_bytes(manifest.read_bytes()).wire_bytes
    begin, crossed = time.monotonic(), _crossed(settings, proxy)
    await _appears(site, "receipts/*.json" if up else f"states/{manifest.name.partition('.')[0]}.manifest")
    end, crossed = time.monotonic(), _crossed(settings, proxy) - crossed
    cuts = outages.within(begin, end) + len(settings.cut_after)
    return Result(
        wire_bytes=wire_bytes,
        crossed_bytes=crossed,
        window_bytes=16 * settings.slice_kib * 1024,
        cuts=cuts,
        outage_s=outages.within(begin, end) * settings.outage_s,
        ideal_s=wire_bytes / settings.bytes_per_s,
        taken_s=end - begin,
    )


def _crossed(settings: Settings, proxy: FlakyProxy) -> int:
    return proxy.traffic.up if settings.direction == "up" else proxy.traffic.down


async def _appears(folder: Path, pattern: str) -> Path:
    """The first file of that name, as soon as it is there."""
    while True:
        for found in folder.glob(pattern):
            return found
        await asyncio.sleep(POLL_S)


def main(arguments: list[str] | None = None) -> int:
    """Measure once, print one line, and write JSON beside it when asked."""
    parser = argparse.ArgumentParser(prog="python -m bench.goodput", description=__doc__.partition("\n")[0])
    parser.add_argument("--direction", choices=("up", "down"), default="up")
    parser.add_argument("--mb", type=float, default=100.0, help="size of the transfer in megabytes")
    parser.add_argument("--mbit", type=float, default=4.0, help="rate of the site's link, each way")
    parser.add_argument("--latency-ms", type=float, default=25.0, help="one way")
    parser.add_argument("--cut-every", type=float, default=60.0, help="seconds")
    parser.add_argument("--outage", type=float, default=5.0, help="seconds")
    parser.add_argument("--fault", choices=("cut", "reset", "hole", "down"), default="down")
    parser.add_argument("--slice-kib", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write settings and result to this file")
    args = parser.parse_args(arguments)
    settings = Settings(
        direction=args.direction,
        payload_bytes=round(args.mb * 1e6),
        bytes_per_s=args.mbit * 125_000,
        latency_s=args.latency_ms / 1000,
        cut_every_s=args.cut_every,
        fault=args.fault,
        outage_s=args.outage,
        slice_kib=args.slice_kib,
        seed=args.seed,
    )
    logs.configure()
    with tempfile.TemporaryDirectory(prefix="mailboat-goodput-") as folder:
        result = asyncio.run(measure(settings, Path(folder)))
    told = {**dataclasses.asdict(result), "ratio": result.ratio, "extra_per_cut": result.extra_per_cut}
    if args.json is not None:
        args.json.write_text(json.dumps({"settings": dataclasses.asdict(settings), "result": told}, indent=1) + "\n")
    sys.stdout.write(
        f"goodput {result.ratio:.3f} of the ideal: {result.wire_bytes / 1e6:.1f} MB {settings.direction} in "
        f"{result.taken_s:.1f} s (link alone {result.ideal_s:.1f} s, {result.cuts} outages {result.outage_s:.1f} s), "
        f"{result.extra_per_cut / 1e3:.0f} kB extra for each cut (a window is {result.window_bytes / 1e3:.0f} kB)\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
