"""Chunks onto the link: in order, a few at a time, and without a word when nobody wants them any more."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from shared.errors import CorruptError
from shared.link import LinkDownError
from shared.messages import chunk_header, parse_chunk
from shared.pump import IN_FLIGHT, Pump, SettledError
from shared.store import FrameStore
from tests.helpers import run_async
from tests.unit.shared.transfers import ID, manifest_builder, tensors_of, writer_of

TOPIC = "somewhere"


def _packet(transfer_id: str, index: int, frame: bytes) -> bytes:
    return chunk_header(transfer_id, index, len(frame)) + frame


class Wire:
    """A link that acknowledges when it is told to, and a store of frames that are their own index."""

    def __init__(self) -> None:
        self.published: list[int] = []
        self.acknowledged: list[int] = []
        self.read: list[int] = []
        self.gone: set[int] = set()
        self.down = False
        self.free = asyncio.Event()
        self.free.set()
        self.news = asyncio.Event()
        self.pump = Pump(self._read, self._publish, self._sent)

    def _read(self, transfer_id: str, index: int) -> bytes:
        assert threading.current_thread() is not threading.main_thread(), "a disk is not waited for on the loop"
        self.read.append(index)
        if index in self.gone:
            raise SettledError
        return _packet(transfer_id, index, f"{transfer_id[:2]} {index}".encode())

    async def _publish(self, topic: str, payload: bytes) -> None:
        assert topic == TOPIC
        chunk = parse_chunk(payload)
        assert bytes(chunk.frame) == f"{chunk.transfer_id[:2]} {chunk.index}".encode()
        self.published.append(chunk.index)
        self.news.set()
        await self.free.wait()
        if self.down:
            raise LinkDownError("the link is down")

    def _sent(self, _transfer_id: str, index: int) -> None:
        self.acknowledged.append(index)
        self.news.set()

    async def until(self, published: int, acknowledged: int = 0) -> None:
        """Wait until so many chunks went out and so many were acknowledged."""
        while len(self.published) < published or len(self.acknowledged) < acknowledged:
            self.news.clear()
            await self.news.wait()


@asynccontextmanager
async def _running(wire: Wire) -> AsyncIterator[Wire]:
    running = asyncio.create_task(wire.pump.run())
    try:
        yield wire
    finally:
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running


def test_chunks_go_out_in_the_order_in_which_they_were_ordered() -> None:
    """The receiver's bitmap tells from the order what was lost, so it must be kept."""

    async def work() -> None:
        async with _running(Wire()) as wire:
            wire.pump.put(TOPIC, ID, [3, 1, 4])
            wire.pump.put(TOPIC, ID, range(10, 40))
            await wire.until(33, 33)
            assert wire.published == [3, 1, 4, *range(10, 40)]
            assert wire.acknowledged == wire.published

    run_async(work())


def test_who_asks_without_end_makes_no_queue_longer() -> None:
    """What waits already keeps its place, and goes out once; what went out is sent again when it is asked for again."""

    async def work() -> None:
        async with _running(Wire()) as wire:
            wire.free.clear()
            wire.pump.put(TOPIC, ID, range(20))
            await wire.until(IN_FLIGHT)
            for _ in range(1000):
                wire.pump.put(TOPIC, ID, range(20))
            wire.free.set()
            await wire.until(20 + IN_FLIGHT, 1001 * 20)
            assert wire.published == [*range(20), *range(IN_FLIGHT)]
            assert len(wire.acknowledged) == 1001 * 20  # each that was asked for is accounted for

    run_async(work())


def test_only_a_few_wait_for_their_acknowledgement() -> None:
    """Memory is bounded: the next frame is read when an earlier one was taken."""

    async def work() -> None:
        async with _running(Wire()) as wire:
            wire.free.clear()
            wire.pump.put(TOPIC, ID, range(20))
            await wire.until(IN_FLIGHT)
            for _ in range(20):
                await asyncio.sleep(0)
            assert len(wire.read) == len(wire.published) == IN_FLIGHT
            assert wire.acknowledged == []
            wire.free.set()
            await wire.until(20, 20)

    run_async(work())


def test_a_cleared_queue_is_forgotten() -> None:
    """The link is down; the next bitmap says what to send. What is ordered afterwards goes out."""

    async def work() -> None:
        async with _running(Wire()) as wire:
            wire.free.clear()
            wire.pump.put(TOPIC, ID, range(20))
            await wire.until(IN_FLIGHT)
            wire.pump.clear()
            wire.free.set()
            await wire.until(IN_FLIGHT, IN_FLIGHT)
            wire.pump.put(TOPIC, ID, [99])
            await wire.until(IN_FLIGHT + 1, IN_FLIGHT + 1)
            assert wire.published == [*range(IN_FLIGHT), 99]

    run_async(work())


def test_a_chunk_that_the_link_dropped_is_not_reported_as_sent() -> None:
    """Its slot is free again, and the pump goes on when the link is back."""

    async def work() -> None:
        async with _running(Wire()) as wire:
            wire.down = True
            wire.pump.put(TOPIC, ID, range(2 * IN_FLIGHT))
            await wire.until(2 * IN_FLIGHT)
            wire.down = False
            wire.pump.put(TOPIC, ID, range(50, 50 + 2 * IN_FLIGHT))
            await wire.until(4 * IN_FLIGHT, 2 * IN_FLIGHT)
            assert wire.acknowledged == list(range(50, 50 + 2 * IN_FLIGHT))

    run_async(work())


def test_chunks_of_a_settled_transfer_are_skipped() -> None:
    """Its receipt came while they were queued; more of them than there are slots hold nothing up."""

    async def work() -> None:
        async with _running(Wire()) as wire:
            wire.gone = set(range(3 * IN_FLIGHT))
            wire.pump.put(TOPIC, ID, range(3 * IN_FLIGHT + 1))
            await wire.until(1, 1)
            assert wire.published == [3 * IN_FLIGHT]

    run_async(work())


def test_what_reading_raises_ends_the_pump(tmp_path: Path) -> None:
    """A frame that is not what was written is never sent."""
    stored = FrameStore(tmp_path).seal(writer_of(tensors_of()), manifest_builder())
    data = bytearray(stored.path.read_bytes())
    data[stored.offsets[1]] ^= 1
    stored.path.write_bytes(data)
    published: list[int] = []

    async def publish(_topic: str, payload: bytes) -> None:
        chunk = parse_chunk(payload)
        assert bytes(chunk.frame) == stored.read_frame(chunk.index)
        published.append(chunk.index)

    async def work() -> None:
        pump = Pump(
            lambda name, index: _packet(name, index, stored.read_frame(index)), publish, lambda _id, _index: None
        )
        pump.put(TOPIC, ID, [0, 1, 2])
        with pytest.raises(ExceptionGroup) as group:
            await pump.run()
        assert group.group_contains(CorruptError)
        assert published in ([0], [])

    run_async(work())
