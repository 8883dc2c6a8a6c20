"""The link as the two shells see it: messages and chunks instead of bytes, sealed as the federation demands.

What comes in is opened by the guard and handed to the desk, in order; what may not pass is logged with its rule, and
the desk is told. What goes out is sealed in the order in which it was posted.
"""

from __future__ import annotations

import asyncio
import time
from typing import Protocol

from structlog.typing import FilteringBoundLogger

from shared.bucket import Bucket
from shared.errors import RefusedError
from shared.faultpoint import passing
from shared.link import Connected, Disconnected, Link, LinkDownError, Packet
from shared.messages import Chunk, Message, UnknownMessageError, parse_chunk
from shared.threads import in_thread
from shared.topics import Channel, parse, topic
from shared.trust.guard import Changes, Guard, StaleKeyError
from shared.trust.replay import RepeatedError

WATCH_S = 1.0
"""How often memberships are looked at, and counters written down."""

WARNINGS = 20
"""Refused messages of one topic that are told at once."""

DATA = {Channel.UP_DATA, Channel.DOWN_DATA, Channel.BULK}


class Desk(Protocol):
    """Whoever reads the mail; `site` is the one that the topic names, None on the topics for all."""

    def link_up(self) -> None:
        """Connected; subscriptions stand."""

    def link_down(self) -> None:
        """Connection lost; what was not acknowledged may not have arrived."""

    def hears(self, site: str | None, size: int) -> bool:
        """Whether one more control message of `size` bytes on a topic of this site is looked at, or dropped unread."""

    def take_message(self, site: str | None, message: Message) -> None:
        """A control message that may be believed."""

    def take_chunk(self, site: str | None, chunk: Chunk) -> None:
        """A data packet; its frame is still sealed."""

    async def caught_up(self) -> None:
        """Return when more can be taken in."""

    def refused(self, site: str | None, error: RefusedError, size: int) -> None:
        """Something of `size` bytes that may not pass; it is logged already."""

    def trust_changed(self, changes: Changes) -> None:
        """Memberships changed or ran out, or a new federation key is in force."""


class Mailroom:
    """One link, one guard, one desk."""

    def __init__(self, link: Link, guard: Guard, federation: str, desk: Desk, log: FilteringBoundLogger) -> None:
        self._link = link
        self._guard = guard
        self._federation = federation
        self._desk = desk
        self._log = log
        self._told: dict[str, tuple[Bucket, int]] = {}

    async def read(self) -> None:
        """Hand over what comes in until the link is closed; raises what ends the link."""
        async for event in self._link.events():
            match event:
                case Connected():
                    self._log.info("connected", broker=event.broker, mqtt=event.protocol)
                    self._desk.link_up()
                case Disconnected():
                    self._log.warning("disconnected", reason=event.reason)
                    self._desk.link_down()
                case Packet():
                    self._sort(event)
                    await self._desk.caught_up()

    async def watch(self) -> None:
        """Notice new, changed and outlived memberships, until cancelled."""
        while True:
            await asyncio.sleep(WATCH_S)
            self._guard.save()
            changes = await in_thread(self._guard.refresh, time.time())
            if changes != Changes():
                self._desk.trust_changed(changes)

    async def post(self, message: Message, channel: Channel, site: str | None = None) -> None:
        """Seal and publish; a message that the link could not take is let go: whoever needs it asks again."""
        try:
            sealed = self._guard.seal(message, channel, site, time.time())
        except RefusedError as error:  # its receiver lost its membership a moment ago
            self._log.debug("did not send a message", kind=message.kind, rule=error.rule, reason=error.message)
            return
        passing(f"send-{message.kind}.before")
        try:
            await self._link.publish(topic(self._federation, channel, site), sealed, retain=channel.retained)
        except LinkDownError:
            return
        passing(f"send-{message.kind}.after")

    def _sort(self, packet: Packet) -> None:
        address = parse(packet.topic)
        if address is None:
            return
        size = len(packet.payload)
        try:
            if address.channel in DATA:
                self._desk.take_chunk(address.site, parse_chunk(packet.payload))
            elif size and self._desk.hears(address.site, size):  # an empty payload clears what was retained
                message = self._guard.open(packet.payload, address.channel, address.site, time.time())
                self._desk.take_message(address.site, message)
        except (UnknownMessageError, RepeatedError) as error:
            self._log.debug("skipped a message", topic=packet.topic, rule=error.rule)
        except StaleKeyError as error:
            self._log.debug("cannot read a message yet", topic=packet.topic, rule=error.rule)
            self._desk.refused(address.site, error, size)
        except RefusedError as error:
            self._warn(packet.topic, error)
            self._desk.refused(address.site, error, size)

    def _warn(self, topic: str, error: RefusedError) -> None:
        """Tell of a refused message; of a flood on one topic, a line a second and how many were left out."""
        now = time.monotonic()
        bucket, left_out = self._told.setdefault(topic, (Bucket(WARNINGS, 1.0), 0))
        if bucket.wait(1, now) > 0:
            self._told[topic] = bucket, left_out + 1
            return
        bucket.take(1, now)
        self._told[topic] = bucket, 0
        more = {"left_out": left_out} if left_out else {}
        self._log.warning("refused a message", topic=topic, rule=error.rule, reason=error.message, **more)
