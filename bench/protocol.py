"""Sites that speak the protocol and do nothing else, and the coordinator that they speak to; many fit in one process.

They pull no state and train nothing: each sends the same frames from memory under an update id of its own. Everything
else is real: the broker, the coordinator's process, the links.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import platform
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
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

NAME = "bench"
SLICE_KIB = 512
RETRY_S = 30.0
PATIENCE = LinkSection(stall_s=60.0, keepalive_s=300)
"""What is measured is work and memory: a busy machine must not cut the links of the bench."""
READY_S = 600.0


@dataclass(frozen=True, slots=True)
class Load:
    """What every site sends."""

    plan: SealedPlan
    frames: list[bytes]
    summary: FileSummary


def make_load(root: Path, megabytes: float, closing: str) -> Load:
    """Write the coordinator's files below `root`, and make one update of about so many bytes.

    `closing` says when the round closes: the body of `[aggregation]`.
    """
    values = round(megabytes * 1e6 / 4)
    (root / "federation.toml").write_text(
        f'[federation]\nname = "{NAME}"\nversions = 2\n[model]\nbase = "none"\n[codec]\nup = "f32"\ndown = "f32"\n'
        f"slice_kib = {SLICE_KIB}\n[aggregation]\n{closing}\n"
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
    """Offers one update once the `gate` is open, sends what is wanted until it is accepted, and leaves.

    One that `stays` leaves when it has heard of version 1 as well. `ready` is set when it is welcome and could offer;
    `receipted` and `announced` are the moments (monotonic seconds) at which it heard so, None before.
    """

    def __init__(self, name: str, url: str, load: Load, *, gate: asyncio.Event, stays: bool = False) -> None:
        self.name = name
        self.load = load
        self.gate = gate
        self.stays = stays
        self.ready = asyncio.Event()
        self.receipted: float | None = None
        self.announced: float | None = None
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
        """Return once the update is accepted; a site that stays, once version 1 is announced as well."""
        async with self.link, asyncio.TaskGroup() as tasks:
            bringing = tasks.create_task(self._bring())
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
                    await self._take(message, tasks)
                    if self.receipted is not None and (self.announced is not None or not self.stays):
                        break
            bringing.cancel()

    async def _take(self, message: Message, tasks: asyncio.TaskGroup) -> None:
        match message:
            case Receipt():
                self.receipted = self.receipted or time.monotonic()
                return
            case Announce() if message.manifest.state.version > 0:
                self.announced = self.announced or time.monotonic()
                return
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
        if self._announce is not None and self._welcome:
            self.ready.set()

    async def _bring(self) -> None:
        """Offer, and again when nothing moved for long."""
        await self.ready.wait()
        await self.gate.wait()
        assert self._announce is not None
        self._manifest = self._update(self._announce)
        await self._offer()
        while True:
            await asyncio.sleep(RETRY_S / 4)
            if time.monotonic() - self._moved_at > RETRY_S:
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
                site=self.name, base_version=0, base_digest=announce.manifest.file_digest, examples=1, metrics={}
            ),
        )


@asynccontextmanager
async def serving(root: Path) -> AsyncIterator[tuple[str, int, int]]:
    """Run a broker and a coordinator on the files of `make_load`; yield the broker's URL and both process ids.

    The broker's first, then the coordinator's, which has announced version 0.
    """
    async with run_broker("mosquitto", root / "mosquitto") as broker, coordinating(root, broker.url) as coordinator:
        yield broker.url, broker.pid, coordinator


@asynccontextmanager
async def coordinating(root: Path, url: str) -> AsyncIterator[int]:
    """Run a coordinator on the files of `make_load`, and yield its process id once it has announced version 0."""
    (root / "coordinator.toml").write_text(
        f'federation = "federation.toml"\nstorage = "coordinator"\n[broker]\nurl = "{url}"\n'
        f"[link]\nstall_s = {PATIENCE.stall_s}\nkeepalive_s = {PATIENCE.keepalive_s}\n"
    )
    command = (sys.executable, "-m", "mailboat", "coordinator", "run", "-c", str(root / "coordinator.toml"))
    with (root / "coordinator.log").open("wb") as log:
        coordinator = await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log)
    try:
        await _serves(root / "coordinator.log")
        yield coordinator.pid
    finally:
        if coordinator.returncode is None:
            coordinator.send_signal(signal.SIGTERM)
        await coordinator.wait()


async def _serves(log: Path) -> None:
    async with asyncio.timeout(READY_S):
        while "announced" not in log.read_text():
            await asyncio.sleep(0.02)


def peak_bytes(pid: int) -> int:
    """The most memory that a process has held so far."""
    return memory_bytes(pid, "VmHWM")


def memory_bytes(pid: int, what: str) -> int:
    """What the system tells of a process's memory, such as VmRSS, what it holds now."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1]) * 1024
    msg = f"the system does not tell {what}"
    raise AssertionError(msg)


def machine() -> dict[str, Any]:
    """What a result was measured on, and when."""
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "cores": os.cpu_count(),
        "processor": _processor(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
