from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from mailboat.flaky import Conditions, Fault, FlakyProxy, demo_faults
from tests.helpers import run_async

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def echo_server() -> AsyncIterator[int]:
    """A server that sends back what it gets; its port."""
    writers: set[asyncio.StreamWriter] = set()

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.add(writer)
        try:
            while data := await reader.read(65_536):
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for writer in writers:
            writer.transport.abort()


def through(
    body: Callable[[FlakyProxy], Awaitable[None]],
    *,
    conditions: Conditions | None = None,
    faults: tuple[Fault, ...] = (),
) -> None:
    """Run `body` with a proxy before an echo server."""

    async def run() -> None:
        async with echo_server() as port, FlakyProxy("127.0.0.1", port, conditions=conditions, faults=faults) as proxy:
            await body(proxy)

    run_async(run(), timeout_s=10)


async def connect(proxy: FlakyProxy) -> Streams:
    """A connection to the echo server through the proxy."""
    return await asyncio.open_connection("127.0.0.1", proxy.port)


async def echoed(streams: Streams, data: bytes) -> bytes:
    """What comes back for `data`."""
    streams[1].write(data)
    return await streams[0].readexactly(len(data))


async def nothing_comes(streams: Streams) -> bool:
    """Whether the peer stays silent, with neither bytes nor an end."""
    try:
        async with asyncio.timeout(0.2):
            await streams[0].read(1)
    except TimeoutError:
        return True
    return False


def test_bytes_pass_unchanged() -> None:
    """Without faults a connection through the proxy is as good as one without it."""

    async def body(proxy: FlakyProxy) -> None:
        streams = await connect(proxy)
        data = bytes(range(256)) * 4096
        assert await echoed(streams, data) == data
        streams[1].close()

    through(body)


def test_latency_counts_in_each_direction() -> None:
    """An echo takes at least twice the latency."""

    async def body(proxy: FlakyProxy) -> None:
        streams = await connect(proxy)
        began = asyncio.get_running_loop().time()
        await echoed(streams, b"ahoy")
        assert asyncio.get_running_loop().time() - began >= 0.1
        streams[1].close()

    through(body, conditions=Conditions(latency_s=0.05, jitter_s=0.01))


def test_rate_is_held() -> None:
    """100 KB at 400 KB/s take at least a quarter of a second."""

    async def body(proxy: FlakyProxy) -> None:
        streams = await connect(proxy)
        began = asyncio.get_running_loop().time()
        await echoed(streams, bytes(100_000))
        assert asyncio.get_running_loop().time() - began >= 0.25
        streams[1].close()

    through(body, conditions=Conditions(bytes_per_s=400_000))


def test_cut_after_bytes() -> None:
    """The connection ends after exactly the bytes of its place in the list, and the next one has its own."""

    async def body(proxy: FlakyProxy) -> None:
        first = await connect(proxy)
        first[1].write(bytes(600))
        assert len(await first[0].read()) == 400  # 600 went, 400 of the echo came back
        second = await connect(proxy)
        assert await echoed(second, bytes(5000)) == bytes(5000)
        for _, writer in (first, second):
            writer.close()

    through(body, conditions=Conditions(cut_after=(1000, None)))


def test_cut_is_an_orderly_end() -> None:
    """After `cut` the peer reads the end of the stream."""

    async def body(proxy: FlakyProxy) -> None:
        streams = await connect(proxy)
        await echoed(streams, b"ahoy")
        proxy.cut()
        assert await streams[0].read() == b""
        streams[1].close()

    through(body)


def test_reset_is_an_error() -> None:
    """After `reset` the peer's connection is reset."""

    async def body(proxy: FlakyProxy) -> None:
        streams = await connect(proxy)
        await echoed(streams, b"ahoy")
        proxy.reset()
        with pytest.raises(ConnectionResetError):
            await streams[0].read()
        streams[1].close()

    through(body)


def test_hole_is_silent_for_ever() -> None:
    """A connection that was there when the hole opened never speaks again; a new one is answered only after `heal`."""

    async def body(proxy: FlakyProxy) -> None:
        old = await connect(proxy)
        await echoed(old, b"ahoy")
        proxy.hole()
        old[1].write(b"lost")
        young = asyncio.create_task(connect(proxy))
        assert await nothing_comes(old)
        assert not young.done()
        await proxy.heal()
        assert await nothing_comes(old)
        fresh = await young
        assert await echoed(fresh, b"ahoy") == b"ahoy"
        for _, writer in (old, fresh):
            writer.close()

    through(body)


def test_down_refuses_and_keeps_the_port() -> None:
    """While down, connecting is refused; afterwards the same port serves again."""

    async def body(proxy: FlakyProxy) -> None:
        port = proxy.port
        await proxy.down()
        with pytest.raises(ConnectionRefusedError):
            await connect(proxy)
        await proxy.up()
        streams = await connect(proxy)
        assert (proxy.port, await echoed(streams, b"ahoy")) == (port, b"ahoy")
        streams[1].close()

    through(body)


def test_broker_away() -> None:
    """A client whose broker is away is reset, not left waiting."""

    async def run() -> None:
        async with echo_server() as port:
            pass
        async with FlakyProxy("127.0.0.1", port) as proxy:
            streams = await connect(proxy)
            with pytest.raises(ConnectionResetError):
                await streams[0].read()
            streams[1].close()

    run_async(run())


def test_script_plays() -> None:
    """The faults of the script happen in their order."""

    async def body(proxy: FlakyProxy) -> None:
        first = await connect(proxy)
        assert await first[0].read() == b""
        second = await connect(proxy)
        with pytest.raises(ConnectionResetError):
            await second[0].read()
        with pytest.raises(ConnectionRefusedError):
            await connect(proxy)
        assert proxy.fault_count == 2
        for _, writer in (first, second):
            writer.close()

    through(body, faults=(Fault(0.5, "cut"), Fault(1.0, "down", 60.0)))


def test_demo_faults_follow_the_seed() -> None:
    """One seed and name give one script, others another; each fault is half a second to four seconds long."""
    first, same, other = (
        list(itertools.islice(demo_faults(seed, name), 50)) for seed, name in [(7, "a"), (7, "a"), (7, "b")]
    )
    assert first == same
    assert first != other
    assert all(0.5 <= fault.for_s <= 4.0 and 2.0 <= fault.after_s <= 6.0 for fault in first)
