"""Sealed worlds: the real guards over the false disks, and somebody at the broker who may not speak and does.

Keys are drawn anew by each process of ours, so two runs of a seed differ in their ciphertexts; in nothing else, as no
length depends on a key. The forger can read and publish whatever passes the broker and holds the kit of one site, with
the federation's key in it: what only the coordinator's signature keeps it from.
"""

from __future__ import annotations

import functools
import random
import shutil
import tempfile
from collections import deque
from multiprocessing import util
from pathlib import Path
from typing import Any

from broker.provision import BACKDATED_S
from shared.errors import RefusedError
from shared.messages import Message, decode, encode, encode_body
from shared.topics import Channel, topic
from shared.trust.envelope import Content, FederationKey, Header, pack
from shared.trust.grant import check_renewal, holder_of
from shared.trust.guard import CoordinatorsGuard, Guard, OpenGuard, SitesGuard
from shared.trust.kit import Kit, load_kit
from shared.trust.sealed import ANNOUNCE_S, CoordinatorGuard, SiteGuard
from tests.grants import GrantBench
from tests.kits import ALWAYS, Kits
from tests.sim.broker import DATA, Address, Broker
from tests.sim.weather import NAMES

COORDINATOR = "coordinator"
FEDERATION = "ward"
OVERHEARD = 60
"""Messages that the forger remembers."""

opened = functools.lru_cache(4096)(decode)
"""Messages are values: what was sent to several is parsed once."""


class PlainGuard(OpenGuard):
    """A federation without trust."""

    def open(self, data: bytes, channel: Channel, site: str | None, now: float) -> Message:
        """See Guard."""
        return opened(data)


@functools.lru_cache(1)
def kits() -> dict[str, Kit]:
    """The kits of all machines that a sealed world can have, made once a process; to be called over a real disk."""
    root = Path(tempfile.mkdtemp(prefix="mailboat-sim-kits-"))
    util.Finalize(None, shutil.rmtree, (root, True), exitpriority=0)
    bench = Kits(root, FEDERATION)
    for name in NAMES:
        bench.site(name)
    made = {name: load_kit(bench.folder(name), role="site", federation=FEDERATION, now=0) for name in NAMES}
    return {COORDINATOR: load_kit(bench.coordinator, role="coordinator", federation=FEDERATION, now=0), **made}


@functools.lru_cache(1)
def grants() -> dict[str, bytes]:
    """A newer grant for each site, that counts under any clock; made once a process, as `kits`."""
    bench = GrantBench(Kits.reopen(kits()[COORDINATOR].folder.parent, FEDERATION, *NAMES), issued=BACKDATED_S + 1)
    return {name: bench.grant(name, member=bench.member(name, not_after=ALWAYS)) for name in NAMES}


@functools.lru_cache(1024)
def renewal_rule(name: str, grant: bytes) -> str | None:
    """As `edge_client.renewal` decides for a site with its first membership: why not; None when it is taken."""
    kit = kits()[name].folder
    try:
        check_renewal(grant, holder_of(kit, FEDERATION), 1.0)
    except RefusedError as error:
        return error.rule
    return None


def coordinator_guard(sealed: bool, fingerprint: str, folder: Any, now: float) -> CoordinatorsGuard:
    """The guard of a coordinator that starts now, with its counters in `folder`."""
    if not sealed:
        return PlainGuard()
    return CoordinatorGuard(kits()[COORDINATOR], fingerprint=fingerprint, folder=folder, now=now)


def site_guard(name: str, sealed: bool, fingerprint: str, folder: Any) -> SitesGuard:
    """The same for a site."""
    return SiteGuard(kits()[name], fingerprint=fingerprint, folder=folder) if sealed else PlainGuard()


class Forger:
    """See the module's docstring."""

    def __init__(self, broker: Broker, rng: random.Random, fingerprint: str) -> None:
        self.broker = broker
        self.rng = rng
        self.fingerprint = fingerprint
        self.overheard: deque[tuple[Address, bytes]] = deque(maxlen=OVERHEARD)
        broker.overhears = self._overhears

    def _overhears(self, address: Address, data: bytes) -> None:
        if address[0] not in DATA:
            self.overheard.append((address, data))

    def strike(self, now: float, insider: Guard, announced: Message | None) -> str:
        """Publish something; returns what. `announced` is what the insider heard last from the coordinator."""
        how = self.rng.choice(("again", "altered", "elsewhere", "unsigned", "by another", "by another"))
        if self.overheard and how in {"again", "altered", "elsewhere"}:
            address, data = self.rng.choice(self.overheard)
            if how == "altered":
                at = self.rng.randrange(len(data))
                data = data[:at] + bytes([data[at] ^ 1 << self.rng.randrange(8)]) + data[at + 1 :]
            elif how == "elsewhere" and address[1] is not None:
                address = address[0], self.rng.choice(NAMES)
            self.broker.inject(address, data)
        elif announced is not None:
            ended = announced.model_copy(update={"final": True})
            keys = insider._states if isinstance(insider, SiteGuard) else ()
            data = encode(ended) if how == "unsigned" or not keys else self._signed(ended, keys[0].key, insider, now)
            self.broker.inject((Channel.ANNOUNCE, None), data)
        return how

    def _signed(self, message: Message, key: FederationKey, insider: Any, now: float) -> bytes:
        """In the coordinator's name, under the federation's key, with another member's signature."""
        header = Header(
            topic=topic(FEDERATION, Channel.ANNOUNCE, None),
            key_id=kits()[COORDINATOR].member.key_id,
            counter=int(now * 1e9) + 10**12,
            expiry=int(now) + ANNOUNCE_S,
            fingerprint=bytes.fromhex(self.fingerprint),
            encryption=key.encryption,
        )
        content = Content(encode_body(message), b"").to_bytes()
        return pack(header, key.encrypt(header, content), insider.kit.sign_key)
