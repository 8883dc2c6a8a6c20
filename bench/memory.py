"""The coordinator's peak memory over many concurrent uploads, against that over two.

    python -m bench.memory --uploads 2,64 --mb 50 --json docs/results/memory.json

A real broker and a real coordinator process; the sites speak the protocol and do nothing else: they pull no state,
train nothing, and send the same frames from memory, each under an update id of its own. Every update is accepted before
the coordinator is looked at (VmHWM in /proc), so all of them were on their way and on the disk: UPLOADS x MB of it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import platform
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from broker.launcher import run_broker
from shared.config import BrokerSection, FederationConfig, LinkSection
from shared.configfile import load_config
from shared.ids import new_session_id, new_update_id
from shared.link import Connected, Link, LinkDownError, LinkOptions, Packet
from shared.manifest import Manifest, UpdateFacts
from shared.messages import Announce, Hello, Message, Offer, Receipt, Want, Welcome, chunk_header, decode, encode
from shared.plan import SealedPlan
from shared.slices import FileSummary, make_transfer_frames
from shared.topics import Channel, parse, subscriptions, topic
from shared.transfer import Sender

NAME = "memory"
SLICE_KIB = 512
RETRY_S = 30.0
PATIENCE = LinkSection(stall_s=60.0, keepalive_s=300)
"""What is measured is memory: a busy machine must not cut the links of the bench."""
READY_S = 600.0


@dataclass(frozen=True, slots=True)
class Load:
    """What every site sends."""

    plan: SealedPlan
    frames: list[bytes]
    summary: FileSummary


def make_load(root: Path, megabytes: float, deadline_s: float) -> Load:
    """Write the coordinator's files below `root`, and make one update of about so many bytes."""
    values = round(megabytes * 1e6 / 4)
    (root / "federation.toml").write_text(
        f'[federation]\nname = "{NAME}"\nversions = 2\n[model]\nbase = "none"\n[codec]\nup = "f32"\ndown = "f32"\n'
        f'slice_kib = {SLICE_KIB}\n[aggregation]\nmode = "sync"\nquorum = 100000\ndeadline_s = {deadline_s}\n'
    )
    federation = load_config(root / "federation.toml", FederationConfig)
    shapes: dict[str, tuple[int, ...]] = {f"block.{number:02d}.weight": (values // 10,) for number in range(10)}
    plan = SealedPlan(
        architecture="Synthetic",
        depth=10,
        layers=tuple(range(10)),
        tensors=shapes,
        trained_parameters=10 * (values // 10),
        total_parameters=20 * (values // 10),
        config_sha256=federation.config_sha256,
        frozen_sha256="0" * 64,
        tokenizer_sha256="0" * 64,
        labels=federation.task.labels,
    )
    storage = root / "coordinator"
    storage.mkdir()
    (storage / "plan.json").write_text(plan.model_dump_json())
    save_file({name: np.ones(shape, np.float32) for name, shape in shapes.items()}, storage / "initial.safetensors")
    chance = np.random.default_rng(0)
    delta = {name: chance.normal(0, 1, shape).astype(np.float32) for name, shape in shapes.items()}
    writer = make_transfer_frames(delta, "f32", {}, SLICE_KIB * 1024)
    frames = [frame.data for frame in writer]
    return Load(plan, frames, writer.summary)


class ProtocolSite:
    """Offers one update and sends what is wanted, until it is accepted."""

    def __init__(self, name: str, url: str, load: Load) -> None:
        self.name = name
        self.load = load
        self.session = new_session_id()
        self.sender = Sender(len(load.frames))
        self.link = Link(
            LinkOptions(
                broker=BrokerSection(url=url),
                link=PATIENCE,
                client_id=f"{NAME}-{name}",
                subscriptions=tuple(subscriptions(NAME, "site", name)),
            )
        )
        self._announce: Announce | None = None
        self._welcome = False
        self._manifest: Manifest | None = None
        self._moved_at = 0.0

    async def run(self) -> None:
        """Return once the update is accepted."""
        async with self.link, asyncio.TaskGroup() as tasks:
            patience = tasks.create_task(self._again())
            async for event in self.link.events():
                if isinstance(event, Connected):
                    await self._say(self._hello())
                    self.sender.restart()
                    self._moved_at = 0.0
                elif isinstance(event, Packet):
                    address = parse(event.topic)
                    if address is None or address.channel not in {Channel.ANNOUNCE, Channel.DOWN_CTL}:
                        continue
                    message = decode(event.payload)
                    if isinstance(message, Receipt):
                        break
                    await self._take(message, tasks)
            patience.cancel()

    async def _take(self, message: Message, tasks: asyncio.TaskGroup) -> None:
        match message:
            case Announce():
                self._announce = message
            case Welcome():
                self._welcome = True
            case Want():
                self._moved_at = time.monotonic()
                self.sender.on_want(message.have, message.window)
                if indices := self.sender.take():
                    tasks.create_task(self._send(indices))
                return
            case _:
                return
        if self._announce is not None and self._welcome and self._manifest is None:
            self._manifest = self._update(self._announce)
            await self._offer()

    async def _again(self) -> None:
        """Offer again when nothing moved for long."""
        while True:
            await asyncio.sleep(RETRY_S / 4)
            if self._manifest is not None and time.monotonic() - self._moved_at > RETRY_S:
                self.sender.restart()
                await self._offer()

    async def _offer(self) -> None:
        assert self._manifest is not None
        self._moved_at = time.monotonic()
        await self._say(Offer(manifest=self._manifest))

    async def _send(self, indices: list[int]) -> None:
        assert self._manifest is not None
        destination = topic(NAME, Channel.UP_DATA, self.name)
        for index in indices:
            frame = self.load.frames[index]
            try:
                await self.link.publish(
                    destination, chunk_header(self._manifest.transfer_id, index, len(frame)) + frame
                )
            except LinkDownError:
                return

    async def _say(self, message: Message) -> None:
        with contextlib.suppress(LinkDownError):  # said again when it is back
            await self.link.publish(topic(NAME, Channel.UP_CTL, self.name), encode(message))

    def _hello(self) -> Hello:
        plan = self.load.plan
        return Hello(
            site=self.name,
            session=self.session,
            fingerprint=plan.fingerprint,
            config_sha256=plan.config_sha256,
            frozen_sha256=plan.frozen_sha256,
            software="bench",
            clock=time.time(),
        )

    def _update(self, announce: Announce) -> Manifest:
        return Manifest(
            transfer_id=new_update_id(self.name),
            federation=NAME,
            fingerprint=self.load.plan.fingerprint,
            codec="f32",
            **dataclasses.asdict(self.load.summary),
            created=time.time(),
            facts=UpdateFacts(
                site=self.name, base_version=0, base_sha256=announce.manifest.file_sha256, examples=1, metrics={}
            ),
        )


async def measure(uploads: int, megabytes: float) -> dict[str, Any]:
    """Peak memory of a fresh coordinator over so many concurrent uploads."""
    with tempfile.TemporaryDirectory(prefix="mailboat-memory-") as folder:
        root = Path(folder)
        load = make_load(root, megabytes, deadline_s=1e6)
        async with run_broker("mosquitto", root / "mosquitto") as broker:
            (root / "coordinator.toml").write_text(
                f'federation = "federation.toml"\nstorage = "coordinator"\n[broker]\nurl = "{broker.url}"\n'
                f"[link]\nstall_s = {PATIENCE.stall_s}\nkeepalive_s = {PATIENCE.keepalive_s}\n"
            )
            command = (sys.executable, "-m", "mailboat", "coordinator", "run", "-c", str(root / "coordinator.toml"))
            with (root / "coordinator.log").open("wb") as log:
                coordinator = await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log)
            try:
                await _serves(root / "coordinator.log")
                idle = peak_bytes(coordinator.pid)
                began = time.monotonic()
                async with asyncio.TaskGroup() as tasks:
                    for number in range(uploads):
                        tasks.create_task(ProtocolSite(f"site-{number:02d}", broker.url, load).run())
                seconds = time.monotonic() - began
                peak = peak_bytes(coordinator.pid)
            finally:
                if coordinator.returncode is None:
                    coordinator.send_signal(signal.SIGTERM)
                await coordinator.wait()
    return {
        "uploads": uploads,
        "wire_bytes_each": sum(map(len, load.frames)),
        "idle_bytes": idle,
        "peak_bytes": peak,
        "seconds": round(seconds, 1),
    }


async def _serves(log: Path) -> None:
    async with asyncio.timeout(READY_S):
        while "announced" not in log.read_text():
            await asyncio.sleep(0.1)


def peak_bytes(pid: int) -> int:
    """The most memory that a process has held so far (VmHWM)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    msg = "the system does not tell VmHWM"
    raise AssertionError(msg)


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
        machine = {
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.release()}",
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(
            json.dumps({"machine": machine, "mb": options.mb, "runs": found, "ratio": ratio}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
