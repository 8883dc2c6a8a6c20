"""Listens at the broker to what travels: which chunk of which transfer, how often, how many bytes.

An observer of its own with QoS 0: nobody waits for it, and what passes while it is away is not counted. So resent bytes
are those that reached the broker at least twice while it listened.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import aiomqtt

from shared.errors import RefusedError
from shared.messages import Message, Want, decode, parse_chunk
from shared.topics import Channel, parse, topic

RETRY_S = 0.1
_QUIET = logging.getLogger("tests.chaos.tap")
_QUIET.addHandler(logging.NullHandler())
_QUIET.propagate = False  # a broker that is killed is what these tests are about


@dataclass(slots=True)
class Traffic:
    """Bytes of chunks, headers included, in one direction."""

    packets: int = 0
    total: int = 0
    resent: int = 0
    """Of those, the bytes of chunks seen before."""


@dataclass(slots=True)
class Tap:
    """Use as `async with`."""

    port: int
    federation: str
    up: Traffic = field(default_factory=Traffic)
    down: Traffic = field(default_factory=Traffic)
    seen: Counter[str] = field(default_factory=Counter)
    """How many different chunks of each transfer came by."""
    last_up_at: float = 0.0
    """Unix seconds of the last update chunk."""
    held: list[tuple[float, float]] = field(default_factory=list)
    """Of each update chunk: unix seconds at which the coordinator first said to hold it, and at which it came by."""
    news: asyncio.Event = field(default_factory=asyncio.Event)
    _known: set[tuple[str, int, str]] = field(default_factory=set)
    _came: dict[tuple[str, int], float] = field(default_factory=dict)
    """Update chunks that the coordinator has not yet said to hold."""
    _listener: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._listener = asyncio.create_task(self._listen(), name="tap")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._listener is not None
        self._listener.cancel()
        await asyncio.wait([self._listener])

    async def _listen(self) -> None:
        while True:
            with contextlib.suppress(aiomqtt.MqttError):
                async with aiomqtt.Client("127.0.0.1", self.port, timeout=2.0, logger=_QUIET) as client:
                    for channel in (Channel.UP_DATA, Channel.DOWN_DATA):
                        await client.subscribe(topic(self.federation, channel, "+"), qos=0)
                    await client.subscribe(topic(self.federation, Channel.BULK), qos=0)
                    await client.subscribe(topic(self.federation, Channel.DOWN_CTL, "+"), qos=0)
                    async for message in client.messages:
                        if isinstance(message.payload, bytes):
                            self._count(str(message.topic), message.payload)
            await asyncio.sleep(RETRY_S)

    def _count(self, name: str, payload: bytes) -> None:
        address = parse(name)
        if address is None:
            return
        with contextlib.suppress(RefusedError):
            if address.channel is Channel.DOWN_CTL:
                self._answer(decode(payload))  # of a sealed federation only the numbers of chunks are known
                return
            chunk = parse_chunk(payload)
            up = address.channel is Channel.UP_DATA
            # States go to each site: the same chunk on another topic is no repetition.
            key = (chunk.transfer_id, chunk.index, name)
            traffic = self.up if up else self.down
            traffic.packets += 1
            traffic.total += len(payload)
            if key in self._known:
                traffic.resent += len(payload)
            else:
                self._known.add(key)
                if up:
                    self.seen[chunk.transfer_id] += 1
                    self._came[chunk.transfer_id, chunk.index] = time.time()
            if up:
                self.last_up_at = time.time()
                self.news.set()

    def _answer(self, message: Message) -> None:
        """Take down which chunks the coordinator says to hold for the first time."""
        if isinstance(message, Want):
            for transfer_id, index in list(self._came):
                held = transfer_id == message.transfer_id and message.have[index >> 3] >> (index & 7) & 1
                if held:
                    self.held.append((time.time(), self._came.pop((transfer_id, index))))
