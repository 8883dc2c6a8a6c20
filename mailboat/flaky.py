"""A bad network in a box: a seeded TCP proxy between a site and the broker.

    async with FlakyProxy("127.0.0.1", 1883, faults=demo_faults(seed, "site-1")) as proxy:
        connect(proxy.url)

It delays, slows, cuts, resets, refuses, and swallows bytes without a word (a half-open connection). What happens when
follows from the seed and the script alone. It stands at the level of TCP connections, not of IP packets: loss shows as
delay, as it does to any program.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self

READ_BYTES = 65_536
QUEUE_READS = 64
"""Reads that wait for their delay in each direction of a connection: at most 4 MiB."""
SLOW_BUFFER_S = 0.25
"""Kernel buffer on a link of limited rate, as time; the kernel doubles it. A larger one would hide the rate from the
sender, who would see it in lumps."""
SLOW_BUFFER_MIN_BYTES = 32_768

PLUGS = 2
"""Connections that fill the shortest queue there is."""
STEPS_PER_S = 20
"""How often a limited rate is doled out, so that it feels like a rate and not like bursts."""

FaultKind = Literal["cut", "reset", "hole", "down"]


@dataclass(frozen=True, slots=True)
class Conditions:
    """What the link is like all the time, in each direction."""

    latency_s: float = 0.0
    jitter_s: float = 0.0
    """Up to this much more latency, drawn anew for each read; bytes never overtake."""
    bytes_per_s: float | None = None
    deep: bool = False
    """It takes at once whatever comes and passes it on at that rate, as a proxy or a tunnel before a slow line does."""
    cut_after: tuple[int | None, ...] = ()
    """Bytes, both directions together, after which the first, second, ... connection is closed; None means never."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault of a script, `after_s` seconds after the one before has ended.

    `cut` closes all connections in order, `reset` with RST; `hole` makes them half-open for ever and leaves every new
    one without an answer for `for_s` seconds; `down` resets them and refuses new ones for `for_s` seconds.
    """

    after_s: float
    kind: FaultKind
    for_s: float = 0.0


def demo_faults(seed: int, name: str) -> Iterator[Fault]:
    """Without end: two to six seconds of calm, then half a second to four seconds without a link."""
    chance = random.Random(f"{seed}/{name}")
    while True:
        yield Fault(chance.uniform(2.0, 6.0), "down", chance.uniform(0.5, 4.0))


@dataclass(slots=True)
class Traffic:
    """Bytes that crossed the bad network so far, on all connections together, also those that a fault then lost."""

    up: int = 0
    """From those who connect."""
    down: int = 0
    """To them."""


class FlakyProxy:
    """Listens on a free port of the loopback address and forwards to one broker."""

    def __init__(
        self,
        host: str,
        port: int,
        *,
        seed: int = 0,
        conditions: Conditions | None = None,
        faults: Iterable[Fault] = (),
    ) -> None:
        self._target = (host, port)
        self._seed = seed
        self._conditions = conditions or Conditions()
        self._faults = faults
        self._reservation = _bound(0)
        self._server: asyncio.Server | None = None
        self._script: asyncio.Task[None] | None = None
        self._pipes: dict[asyncio.Task[None], _Pipe] = {}
        self._plugs: list[socket.socket] = []
        self.accepted = 0
        """Connections so far."""
        self.fault_count = 0
        """Faults of the script so far."""
        self.traffic = Traffic()

    @property
    def port(self) -> int:
        """Where the proxy listens, also while it is down."""
        return int(self._reservation.getsockname()[1])

    @property
    def url(self) -> str:
        """What a client connects to instead of the broker."""
        return f"mqtt://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        """Listen, and begin the script."""
        await self.up()
        self._script = asyncio.create_task(self._play(), name=f"flaky-{self.port}")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop listening and end every connection."""
        assert self._script is not None
        self._script.cancel()
        pipes = list(self._pipes)
        await self.down()
        self._reservation.close()
        await asyncio.wait([self._script, *pipes])

    # -- faults, also by hand ------------------------------------------------------------------------------------------

    def cut(self) -> None:
        """End every connection in order (FIN)."""
        for pipe in self._pipes.values():
            pipe.end(reset=False)

    def reset(self) -> None:
        """End every connection with RST."""
        for pipe in self._pipes.values():
            pipe.end(reset=True)

    def hole(self) -> None:
        """Take and forward nothing more on the connections there are, ever, and answer no new ones until `heal`.

        A queue of connections that is full makes the kernel ignore the next ones, as a cable that was pulled does.
        """
        for pipe in self._pipes.values():
            pipe.swallows = True
        if self._server is None or self._plugs:
            return
        self._server.close()
        self._server = None
        full = _bound(self.port)
        full.listen(0)
        self._plugs.append(full)
        for _ in range(PLUGS):
            plug = socket.socket()
            plug.setblocking(False)
            plug.connect_ex(("127.0.0.1", self.port))
            self._plugs.append(plug)

    async def heal(self) -> None:
        """Answer new connections again."""
        self._unplug()
        await self.up()

    def _unplug(self) -> None:
        for plug in self._plugs:
            plug.close()
        self._plugs.clear()

    async def down(self) -> None:
        """Reset every connection and refuse new ones until `up`."""
        if self._server is not None:
            self._server.close()
            self._server = None
        self._unplug()
        self.reset()

    async def up(self) -> None:
        """Listen again."""
        if self._server is None:
            listener = _bound(self.port)
            _narrow(listener, self._conditions.bytes_per_s)
            self._server = await asyncio.start_server(self._accept, sock=listener, limit=READ_BYTES)

    async def _play(self) -> None:
        for fault in self._faults:
            await asyncio.sleep(fault.after_s)
            self.fault_count += 1
            match fault.kind:
                case "cut":
                    self.cut()
                case "reset":
                    self.reset()
                case "hole":
                    self.hole()
                    await asyncio.sleep(fault.for_s)
                    await self.heal()
                case "down":
                    await self.down()
                    await asyncio.sleep(fault.for_s)
                    await self.up()

    # -- connections ---------------------------------------------------------------------------------------------------

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        limits = self._conditions.cut_after
        pipe = _Pipe(
            reader,
            writer,
            self._conditions,
            self.traffic,
            random.Random(f"{self._seed}/{self.accepted}"),
            limits[self.accepted] if self.accepted < len(limits) else None,
        )
        self.accepted += 1
        task = asyncio.create_task(pipe.run(*self._target))
        self._pipes[task] = pipe
        task.add_done_callback(self._pipes.pop)


class _Pipe:
    """One connection through the proxy."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        conditions: Conditions,
        traffic: Traffic,
        chance: random.Random,
        cut_after: int | None,
    ) -> None:
        self.swallows = False
        self._near = (reader, writer)
        self._writers = [writer]
        self._conditions = conditions
        self._traffic = traffic
        self._chance = chance
        self._left = cut_after
        self._ended = asyncio.Event()

    def end(self, *, reset: bool) -> None:
        """Close both sides, with RST or with FIN."""
        for writer in self._writers:
            if reset:
                _linger_never(writer)
                writer.transport.abort()
            else:
                writer.close()
        self._ended.set()

    async def run(self, host: str, port: int) -> None:
        """Forward both ways until either side, or a fault, ends it."""
        reader, writer = self._near
        try:
            far_reader, far_writer = await self._dial(host, port)
        except OSError:
            self.end(reset=True)
            return
        self._writers.append(far_writer)
        if self._ended.is_set():  # a fault came while we dialled
            self.end(reset=True)
            return
        ended = asyncio.create_task(self._ended.wait())
        directions = {
            asyncio.create_task(self._forward(reader, far_writer, self._count_up)),
            asyncio.create_task(self._forward(far_reader, writer, self._count_down)),
        }
        running: set[asyncio.Task[Any]] = set(directions)
        try:
            # In a hole neither side learns that the other has gone.
            while not ended.done() and (running == directions or (self.swallows and running)):
                _, running = await asyncio.wait({ended, *running}, return_when=asyncio.FIRST_COMPLETED)
                running -= {ended}
        finally:
            for task in (ended, *directions):
                task.cancel()
            await asyncio.wait([ended, *directions])
            if not self._ended.is_set():
                self.end(reset=False)

    async def _dial(self, host: str, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        far = socket.socket()
        try:
            far.setblocking(False)
            _narrow(far, self._conditions.bytes_per_s)
            await asyncio.get_running_loop().sock_connect(far, (host, port))
        except (OSError, asyncio.CancelledError):
            far.close()
            raise
        return await asyncio.open_connection(sock=far, limit=READ_BYTES)

    def _count_up(self, size: int) -> None:
        self._traffic.up += size

    def _count_down(self, size: int) -> None:
        self._traffic.down += size

    async def _forward(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, count: Callable[[int], None]
    ) -> None:
        """One direction: read, pace, count, delay, write."""
        waiting: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(0 if self._conditions.deep else QUEUE_READS)
        delivery = asyncio.create_task(self._deliver(waiting, writer))
        try:
            with contextlib.suppress(OSError):
                await self._collect(reader, waiting, count)
                await waiting.join()
        finally:
            delivery.cancel()
            await asyncio.wait([delivery])

    async def _collect(
        self, reader: asyncio.StreamReader, waiting: asyncio.Queue[tuple[float, bytes]], count: Callable[[int], None]
    ) -> None:
        loop, link = asyncio.get_running_loop(), self._conditions
        rate = link.bytes_per_s
        read_bytes = READ_BYTES if rate is None else min(READ_BYTES, max(1024, round(rate / STEPS_PER_S)))
        free_at = due = loop.time()
        while data := await self._read(reader, read_bytes):
            free_at = max(free_at, loop.time())
            if rate is not None:
                free_at += len(data) / rate
                await asyncio.sleep(0.0 if link.deep else free_at - loop.time())
            if not self.swallows:
                count(len(data))
            due = max(due, free_at + link.latency_s + self._chance.uniform(0.0, link.jitter_s))
            await waiting.put((due, data))

    async def _read(self, reader: asyncio.StreamReader, size: int) -> bytes:
        if self.swallows:
            # Nothing is taken any more: a cable that was pulled acknowledges no bytes, so a full queue stays full.
            await self._ended.wait()
            return b""
        return await reader.read(size)

    async def _deliver(self, waiting: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        writer.transport.set_write_buffer_limits(0)  # so that drain waits until the kernel has it
        while True:
            due, data = await waiting.get()
            if (pause := due - loop.time()) > 0:
                await asyncio.sleep(pause)
            if not self.swallows:
                allowed = data if self._left is None else data[: self._left]
                writer.write(allowed)
                with contextlib.suppress(OSError):
                    await writer.drain()
                if self._left is not None:
                    self._left -= len(allowed)
                    if self._left == 0:
                        self.end(reset=False)
            waiting.task_done()


def _bound(port: int) -> socket.socket:
    """A socket bound to the port; several may be, so that the port stays ours while nobody listens on it."""
    bound = socket.socket()
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    bound.bind(("127.0.0.1", port))
    return bound


def _narrow(sock: socket.socket, bytes_per_s: float | None) -> None:
    if bytes_per_s is not None:
        room = max(SLOW_BUFFER_MIN_BYTES, round(bytes_per_s * SLOW_BUFFER_S))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)


def _linger_never(writer: asyncio.StreamWriter) -> None:
    """Closing this socket sends RST."""
    raw = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):  # it may be closed
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
