"""Guards of one federation with a clock of the test's own."""

from __future__ import annotations

from pathlib import Path

from shared.errors import RefusedError
from shared.manifest import Manifest
from shared.messages import Announce, Chunk, Hello, Message, Offer, Welcome, parse_chunk
from shared.topics import Channel
from shared.trust.guard import Guard
from shared.trust.kit import load_kit
from shared.trust.sealed import CoordinatorGuard, SiteGuard
from tests.factories import digest, make_federation, make_plan, make_state, make_update
from tests.kits import Kits

PLAN = make_plan(make_federation())
STATE = make_state(PLAN, 0)
SESSION = "0123456789abcdef"
START = 1_800_000_000.0


def hello(site: str = "north") -> Hello:
    """A hello of that site."""
    return Hello(
        site=site,
        session=SESSION,
        fingerprint=PLAN.fingerprint,
        config_sha256=PLAN.config_sha256,
        frozen_sha256=PLAN.frozen_sha256,
        software="mailboat",
        clock=START,
    )


WELCOME = Welcome(session=SESSION, boot=SESSION, clock=START)
ANNOUNCE = Announce(
    boot=SESSION,
    fingerprint=PLAN.fingerprint,
    config_sha256=PLAN.config_sha256,
    frozen_sha256=PLAN.frozen_sha256,
    manifest=STATE,
    final=False,
    target=3,
)
OFFER = Offer(manifest=make_update(PLAN, "north", STATE, update_id=digest("update")[:32]))


class World:
    """A coordinator, the sites north and south, and what travels between them."""

    def __init__(self, root: Path, federation: str = "ward") -> None:
        self.kits = Kits(root, federation)
        self.now = START
        for name in ("north", "south"):
            self.kits.site(name)
        self.coordinator = self.boot()
        self.north = self.site("north")
        self.south = self.site("south")

    def boot(self, fingerprint: str = PLAN.fingerprint) -> CoordinatorGuard:
        """Another process of the coordinator over the same folders."""
        kit = load_kit(self.kits.coordinator, role="coordinator", federation=self.kits.federation, now=self.now)
        folder = self.kits.root / "coordinator" / "trust"
        return CoordinatorGuard(kit, fingerprint=fingerprint, folder=folder, now=self.now)

    def site(self, name: str, fingerprint: str = PLAN.fingerprint) -> SiteGuard:
        """Another process of a site over the same folders."""
        kit = load_kit(self.kits.folder(name), role="site", federation=self.kits.federation, now=self.now)
        return SiteGuard(kit, fingerprint=fingerprint, folder=self.kits.root / name / "trust")

    def up(self, message: Message, site: str = "north") -> bytes:
        """The site's message as it travels."""
        guard = self.north if site == "north" else self.south
        return guard.seal(message, Channel.UP_CTL, site, self.now)

    def taken(self, data: bytes, site: str = "north", channel: Channel = Channel.UP_CTL) -> Message:
        """What the coordinator makes of it."""
        return self.coordinator.open(data, channel, site, self.now)

    def welcomed(self) -> None:
        """North has the federation key."""
        data = self.coordinator.seal(WELCOME, Channel.DOWN_CTL, "north", self.now)
        self.north.open(data, Channel.DOWN_CTL, "north", self.now)

    def rule(self, data: bytes, site: str = "north", channel: Channel = Channel.UP_CTL) -> str:
        """The rule under which the coordinator refuses it; fails when it does not."""
        return rule_of(self.coordinator, data, channel, site, self.now)


def rule_of(guard: Guard, data: bytes, channel: Channel, site: str | None, now: float) -> str:
    """The rule under which a guard refuses a message; AssertionError when it takes it."""
    try:
        message = guard.open(data, channel, site, now)
    except RefusedError as error:
        return error.rule
    raise AssertionError(f"took a {message.kind}")


def altered(data: bytes, bit: int) -> bytes:
    """The same bytes with one bit flipped."""
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def chunk_rule(guard: Guard, manifest: Manifest, packet: bytes) -> str:
    """The rule under which a guard refuses a data packet; AssertionError when it takes it."""
    try:
        chunk: Chunk = parse_chunk(packet)
        guard.open_chunk(manifest, chunk)
    except RefusedError as error:
        return error.rule
    raise AssertionError("took a chunk")
