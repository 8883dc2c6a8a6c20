"""A hostile member: a valid kit and certificate, over a real Mosquitto with TLS, and nothing else right.

Each thing that it does is refused under the rule that is named beside it. Meanwhile the coordinator's memory and disk
stay within bounds, and the other site's run comes to its end. How much slower that gets is measured by `bench.hostile`.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from pathlib import Path
from typing import TypeVar

import pytest

from broker.launcher import find_mosquitto
from coordinator.records import Rejected, VersionCommitted
from shared.config import FederationConfig, LinkSection, SiteConfig
from shared.configfile import load_config
from shared.ids import new_session_id, new_update_id
from shared.link import Connected, Link, LinkOptions, Packet
from shared.manifest import Manifest, UpdateFacts
from shared.messages import Hello, Message, Offer, Wait, Want, chunk_header
from shared.plan import load_plan
from shared.store import FrameStore
from shared.topics import Channel, topic
from shared.trust.choose import own_kit, site_guard
from shared.trust.guard import SitesGuard
from shared.trust.witness import witnessed
from tests.commands import Running, running
from tests.helpers import run_async
from tests.integration.test_tls import Federation, provisioned, serving
from tests.toys import toy_records, toy_site

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.timeout(200),
    pytest.mark.skipif(find_mosquitto() is None, reason="Mosquitto is not installed: apt-get install mosquitto"),
]
HOSTILE = "site-2"
YEARS_S = 3 * 365 * 86_400.0
SLICE = 64 * 1024
FILE_BYTES = 400_000
Told = TypeVar("Told", Wait, Want)
OFFERS = 400
"""More than [admission] lets one site make in an hour."""
GARBAGE_BYTES = 100 * 1024 * 1024
PACKET_BYTES = 512 * 1024
MEMORY_MIB = 64.0
"""More than what one site may cause before it is muted, twice over: 32 MiB, which come one packet after the other."""
DISK_MIB = 8.0


class Member:
    """A site's kit in the hands of somebody who follows no protocol."""

    def __init__(self, federation: Federation) -> None:
        self.root = federation.root
        self.config = load_config(self.root / f"{HOSTILE}.toml", SiteConfig)
        self.agreed = load_config(self.config.federation, FederationConfig)
        self.plan = load_plan(self.root / "coordinator" / "plan.json", self.agreed)
        self.kit = own_kit(self.agreed, self.config.trust, site=HOSTILE)
        self.guard = self.another_guard("hostile")
        down = topic("toy", Channel.DOWN_CTL, HOSTILE)
        self.link = Link(LinkOptions(federation.broker(HOSTILE), LinkSection(), HOSTILE, (down,)))
        self.connected = asyncio.Event()
        self.heard: list[Message] = []
        self.granted = ""
        """The last of its updates whose bytes the coordinator asked for."""

    def another_guard(self, storage: str) -> SitesGuard:
        """The same keys with counters of their own."""
        return site_guard(
            self.agreed,
            self.config.trust,
            site=HOSTILE,
            fingerprint=self.plan.fingerprint,
            storage=self.root / storage,
        )

    async def listen(self) -> None:
        """Until cancelled."""
        async for event in self.link.events():
            match event:
                case Connected():
                    self.connected.set()
                case Packet():
                    self.heard.append(self.guard.open(event.payload, Channel.DOWN_CTL, HOSTILE, time.time()))
                case _:
                    pass

    async def until(self, kind: type[Told], transfer_id: str | None = None) -> Told:
        """The first message of that kind, about that transfer."""
        while True:
            for message in self.heard:
                if isinstance(message, kind) and transfer_id in {None, message.transfer_id}:
                    return message
            await asyncio.sleep(0.02)

    def sealed(self, message: Message) -> bytes:
        """As it travels."""
        return self.guard.seal(message, Channel.UP_CTL, HOSTILE, time.time())

    async def say(self, *packets: bytes, channel: Channel = Channel.UP_CTL) -> None:
        """On its own topic, which the broker lets it."""
        for packet in packets:
            await self.link.publish(topic("toy", channel, HOSTILE), packet)

    def hello(self) -> Hello:
        """Sound."""
        return Hello(
            site=HOSTILE,
            session=new_session_id(),
            fingerprint=self.plan.fingerprint,
            config_sha256=self.plan.config_sha256,
            frozen_sha256=self.plan.frozen_sha256,
            software="hostile",
            clock=time.time(),
        )

    def update(self) -> Manifest:
        """Of an update that will never be sent, and not signed yet."""
        states = FrameStore(self.root / "coordinator" / "states")
        base = states.get(states.ids()[0])
        assert base is not None
        frames = -(-FILE_BYTES // SLICE)
        return Manifest(
            transfer_id=new_update_id(HOSTILE),
            federation="toy",
            fingerprint=self.plan.fingerprint,
            codec="f32",
            group=4,
            slice_size=SLICE,
            file_size=FILE_BYTES,
            file_digest=secrets.token_hex(32),
            frame_lengths=(SLICE // 2,) * frames,
            frame_hashes=bytes(32 * frames),
            created=0.0,
            facts=UpdateFacts(
                site=HOSTILE,
                base_version=base.manifest.state.version,
                base_digest=base.manifest.file_digest,
                examples=10,
                metrics={},
            ),
        )

    def signed(self) -> Manifest:
        """The same, with its signature."""
        assert self.kit is not None
        return witnessed(self.kit.sign_key, self.update(), None)

    # -- what it does ---

    async def clocks_years_off(self) -> None:
        """`from-the-future`, and `expired`."""
        for number, away in enumerate((YEARS_S, -YEARS_S)):
            guard = self.another_guard(f"hostile-{number}")
            await self.say(guard.seal(self.hello(), Channel.UP_CTL, HOSTILE, time.time() + away))

    async def stale_replays(self) -> None:
        """`replayed`: an older hello of its own, ten times."""
        first, second = self.sealed(self.hello()), self.sealed(self.hello())
        await self.say(first, second, *[first] * 10)

    async def tampered_manifests(self) -> None:
        """`no-witness`, and `bad-witness`: more examples than it has signed."""
        signed = self.signed()
        facts = signed.update.model_copy(update={"examples": 1_000_000})
        for manifest in (self.update(), signed.model_copy(update={"facts": facts})):
            await self.say(self.sealed(Offer(manifest=manifest)))

    async def offers_without_end(self) -> None:
        """`rate-updates`, which it is told."""
        offers = [self.signed() for _ in range(OFFERS)]
        await self.say(*(self.sealed(Offer(manifest=each)) for each in offers))
        wait = await self.until(Wait)
        assert wait.rule == "rate-updates"
        refused = [each.transfer_id for each in offers].index(wait.transfer_id)
        self.granted = (await self.until(Want, offers[refused - 1].transfer_id)).transfer_id

    async def flood(self, *, granted: bool) -> None:
        """100 MB of garbage on its topic: for places that it was granted (`bad-seal`), or for nothing at all."""
        for number in range(GARBAGE_BYTES // PACKET_BYTES):
            frame = secrets.token_bytes(PACKET_BYTES)
            packet = chunk_header(self.granted, number % 5, PACKET_BYTES) + frame if granted else frame
            await self.say(packet, channel=Channel.UP_DATA)


def memory_mib(pid: int) -> float:
    """The most that a process ever held."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))


def disk_mib(folder: Path) -> float:
    """What a folder takes of the disk."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file()) / 1024**2


@pytest.mark.parametrize("granted", [False, True], ids=["garbage", "chunks-of-its-own"])
def test_a_hostile_member_is_refused_bounded_and_harms_nobody(tmp_path: Path, free_port: int, granted: bool) -> None:
    """Wrong clocks, replays, tampered manifests, offers without end and 100 MB of garbage, one after the other."""
    federation = provisioned(tmp_path, free_port, quorum=1)
    member = Member(federation)
    coordinator: Running

    async def misbehave() -> float:
        async with member.link:
            listening = asyncio.create_task(member.listen())
            await member.connected.wait()
            await member.clocks_years_off()
            await member.stale_replays()
            await member.tampered_manifests()
            await member.offers_without_end()
            before = memory_mib(coordinator.process.pid)
            await member.flood(granted=granted)
            await asyncio.to_thread(coordinator.wait_for, "a site floods")
            grown = memory_mib(coordinator.process.pid) - before
            await toy_site(tmp_path / "site-1.toml")
            listening.cancel()
        return grown

    with serving(federation), running(tmp_path, "coordinator", "run", "-c", "coordinator.toml") as coordinator:
        coordinator.wait_for("announced")
        grown = run_async(misbehave(), timeout_s=120)
        assert coordinator.process.wait(30) == 0
        told = coordinator.text()
    assert grown < MEMORY_MIB
    assert disk_mib(tmp_path / "coordinator") < DISK_MIB
    rules = {json.loads(line).get("rule") for line in told.splitlines() if line.startswith("{")}
    assert rules >= {"from-the-future", "expired", "replayed"} | ({"bad-seal"} if granted else set())
    records = toy_records(tmp_path)
    assert {record.rule for record in records if isinstance(record, Rejected)} == {"no-witness", "bad-witness"}
    versions = [record for record in records if isinstance(record, VersionCommitted)]
    assert [{part.site for part in version.contributions} for version in versions] == [{"site-1"}] * 3
