"""Chunks from the disk onto the link: read one by one, published in order, a few in flight.

The order matters (a receiver's bitmap tells from it what was lost) and is kept: publications are started one after the
other, only their acknowledgements overlap. Memory held: `IN_FLIGHT` frames. A chunk that waits already is not queued
again, so that nobody makes the queue longer by asking without end.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

from shared.link import LinkDownError
from shared.threads import in_thread

IN_FLIGHT = 4
"""Frames handed to the link at a time: enough to overlap the broker's acknowledgements, small beside any window."""


class SettledError(Exception):
    """Raised by `read`: nobody wants this transfer any more, skip the chunk."""


@dataclass(frozen=True, slots=True)
class _Order:
    topic: str
    transfer_id: str
    index: int


class Pump:
    """Publishes what it is told to, in order.

    `read(transfer_id, index)` returns a data packet and is called in a thread; `publish(topic, payload)` returns when
    the broker has it; `sent(transfer_id, index)` is called on the loop after that, and for what waits already at once.
    """

    def __init__(
        self,
        read: Callable[[str, int], bytes],
        publish: Callable[[str, bytes], Awaitable[None]],
        sent: Callable[[str, int], None],
    ) -> None:
        self._read = read
        self._publish = publish
        self._sent = sent
        self._orders: OrderedDict[_Order, None] = OrderedDict()
        self._wake = asyncio.Event()
        self._slots = asyncio.Semaphore(IN_FLIGHT)

    def put(self, topic: str, transfer_id: str, indices: Iterable[int]) -> None:
        """Queue chunks of one transfer for one topic; those that wait already keep their place."""
        for index in indices:
            order = _Order(topic, transfer_id, index)
            if order in self._orders:
                self._sent(transfer_id, index)  # whoever counts has counted it twice
            self._orders[order] = None
        self._wake.set()

    def clear(self) -> None:
        """Forget what is queued: the link is down, and the next bitmap says what to send."""
        self._orders.clear()

    async def run(self) -> None:
        """Publish until cancelled; raises what reading or the broker's refusal raises."""
        async with asyncio.TaskGroup() as group:
            while True:
                while not self._orders:
                    self._wake.clear()
                    await self._wake.wait()
                await self._slots.acquire()
                if not self._orders:  # cleared while we waited
                    self._slots.release()
                    continue
                order, _ = self._orders.popitem(last=False)
                try:
                    packet = await in_thread(self._read, order.transfer_id, order.index)
                except SettledError:
                    self._slots.release()
                    continue
                group.create_task(self._deliver(order, packet))

    async def _deliver(self, order: _Order, packet: bytes) -> None:
        try:
            await self._publish(order.topic, packet)
        except LinkDownError:
            return  # whoever waits for it will ask again
        finally:
            self._slots.release()
        self._sent(order.transfer_id, order.index)
