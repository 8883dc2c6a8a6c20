"""Who is not listened to for a while: a site that sends what nobody asked for, faster than any honest one does.

What nobody asked for is dropped before it is looked at, but by then the broker has carried it here, in the one queue
in which the others' chunks wait too. So the coordinator gives up its subscriptions for all sites, subscribes for each
other member alone, and the broker throws the flood away where it arrives. After MUTE_S it listens again; whoever goes
on at once is muted for twice as long, up to MUTE_MAX_S, and loses that reputation after as long without a flood.

Needs a roster: in a federation without trust anybody may speak under any name, and nobody is muted.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog

from coordinator.intake import Intake
from shared.bucket import Bucket
from shared.errors import RefusedError
from shared.link import Link
from shared.messages import Chunk
from shared.topics import subscriptions

BURST_BYTES = 32 * 1024 * 1024
"""Unwanted bytes that an honest site may cause at once: windows in flight when an upload or the process ended."""
RELAPSE_BYTES = 4 * 1024 * 1024
"""The same of one that was muted: what it had in flight the broker has thrown away."""
REFILL_BYTES_S = 256 * 1024
MESSAGE_COST_BYTES = 16 * 1024
"""What a small message costs besides its bytes: two thousand of them are a flood, too."""
MUTE_S = 60.0
MUTE_MAX_S = 3600.0
LOOK_S = 1.0

log = structlog.get_logger("coordinator")


@dataclass(slots=True)
class _Record:
    """What is held against one site; times are monotonic seconds."""

    allowance: Bucket = field(default_factory=lambda: Bucket(BURST_BYTES, REFILL_BYTES_S))
    until: float = 0.0
    term_s: float = 0.0
    """Of the last muting; 0 as long as there was none, or after it is forgiven."""


class Nuisance:
    """Decides who is muted, and for how long; grows with sites."""

    def __init__(self) -> None:
        self._records: dict[str, _Record] = {}

    def charge(self, site: str, size: int, now: float) -> float:
        """Note a message of `size` bytes that nobody asked for; returns for how long its site is muted now, or 0."""
        record = self._records.setdefault(site, _Record())
        if now < record.until:  # what the broker held when it was muted
            return 0.0
        if record.term_s and now >= record.until + record.term_s:  # forgiven
            record = self._records[site] = _Record()
        cost = size + MESSAGE_COST_BYTES
        if record.allowance.wait(cost, now) == 0:
            record.allowance.take(cost, now)
            return 0.0
        record.term_s = min(2 * record.term_s, MUTE_MAX_S) or MUTE_S
        record.until = now + record.term_s
        record.allowance = Bucket(RELAPSE_BYTES, REFILL_BYTES_S)
        return record.term_s

    def muted(self, now: float) -> frozenset[str]:
        """Who is not listened to at this moment."""
        return frozenset(site for site, record in self._records.items() if now < record.until)


def topics_heard(federation: str, members: frozenset[str] | None, muted: frozenset[str]) -> tuple[str, ...]:
    """Topics to subscribe to: of all sites at once, or, while somebody is muted, of each other member."""
    if members is None or not members & muted:
        return tuple(subscriptions(federation, "coordinator"))
    heard = sorted(members - muted)
    return tuple(topic for site in heard for topic in subscriptions(federation, "coordinator", site))


class Earshot:
    """Keeps a link's subscriptions as `Nuisance` wants them."""

    def __init__(
        self,
        link: Link,
        federation: str,
        members: Callable[[], frozenset[str] | None],
        intake: Intake,
        away: Callable[[str], None],
    ) -> None:
        """`members` are the names on the roster now, None without one; `away` is told who was muted."""
        self._link = link
        self._federation = federation
        self._members = members
        self._intake = intake
        self._away = away
        self._refused = ("", "")
        self._nuisance = Nuisance()
        self._changed = asyncio.Event()

    def hears(self, site: str, size: int) -> bool:
        """Whether one more control message of this site, of `size` bytes, is looked at."""
        now = time.monotonic()
        if site in self._nuisance.muted(now):  # what the broker still held
            return False
        heard = self._intake.hears(site, now)
        if not heard:
            self.unwanted(site, size)
        return heard

    def chunk_refused(self, site: str | None, chunk: Chunk, rule: str) -> None:
        """A chunk did not fit its upload, so nobody asked for it; of many alike one is told."""
        self.unwanted(site, len(chunk.frame))
        if (chunk.transfer_id, rule) != self._refused:
            self._refused = (chunk.transfer_id, rule)
            log.warning("refused a chunk", update=chunk.transfer_id, rule=rule)

    def unwanted(self, site: str | None, size: int) -> None:
        """A message of this site that nobody asked for, of `size` bytes, came in; says so when it was one too many."""
        if site is None or site not in (self._members() or ()):
            return
        if seconds := self._nuisance.charge(site, size, time.monotonic()):
            log.warning("a site floods; it is not listened to for a while", site=site, seconds=seconds)
            self._changed.set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            self._changed.clear()
            muted = self._nuisance.muted(time.monotonic())
            for site in muted:  # again and again: a hello of before may wait to be handled
                self._away(site)  # no round waits for whom we do not hear
            wanted = topics_heard(self._federation, self._members(), muted)
            try:
                await self._link.follow(wanted)
            except RefusedError as error:
                log.warning("the broker does not let us listen to single sites", reason=error.message)
                return
            try:
                async with asyncio.timeout(LOOK_S):
                    await self._changed.wait()
            except TimeoutError:
                pass
