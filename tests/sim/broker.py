"""A broker as brokers are: order on one topic, at least once to whoever is connected, and no memory to rely on.

Sessions are clean, as the link's are: nothing waits for who is away. What waits for who is slow is bounded, and the
rest is lost without a word. A last will is published when the broker notices, which may be long after the fact and
after the client is back. A restart forgets wills and connections, and brings back the retained messages of now, of some
moment in the past, or none.
"""

from __future__ import annotations

import random
import zlib
from collections import Counter, deque
from collections.abc import Callable
from typing import Protocol

from shared.messages import CHUNK_HEADER_BYTES
from shared.topics import Channel
from tests.sim.clock import Clock
from tests.sim.weather import Weather

Address = tuple[Channel, str | None]
DATA = (Channel.UP_DATA, Channel.DOWN_DATA, Channel.BULK)


class Client(Protocol):
    """One process's end of the link."""

    name: str
    latency_s: float

    def reads(self, address: Address) -> bool:
        """Whether it subscribes to a topic."""

    def packet(self, connection: Connection, address: Address, data: bytes) -> None:
        """Something arrived."""

    def link_lost(self, connection: Connection) -> None:
        """The connection ended."""


class Connection:
    """One connection, from both ends: `here` is what the client believes, `there` what the broker does."""

    __slots__ = ("client", "due", "here", "hole", "there", "waiting", "will")

    def __init__(self, client: Client, will: tuple[Address, bytes] | None) -> None:
        self.client = client
        self.will = will
        self.here = self.there = True
        self.hole = False
        self.due: dict[object, float] = {}
        self.waiting: deque[list[bytes]] = deque()


class Broker:
    """See the module's docstring; `weather` is looked at anew for each message."""

    def __init__(self, clock: Clock, rng: random.Random, weather: Weather) -> None:
        self.clock = clock
        self.rng = rng
        self.weather = weather
        self.up = True
        self.connections: list[Connection] = []
        self.retained: dict[Address, bytes] = {}
        self._snapshot: dict[Address, bytes] = {}
        self.ancient: dict[Address, bytes] = {}
        """What an earlier run left in the broker's files; it comes back when the rest is lost."""
        self.faults: Counter[str] = Counter()
        """What befell, how often."""
        self.overhears: Callable[[Address, bytes], None] | None = None
        """Told of all that is published, where somebody listens."""
        self.digest = 0
        """Of all that was ever published: equal for equal worlds."""

    # -- what clients do ---

    def connect(
        self, client: Client, will: tuple[Address, bytes] | None, hello: tuple[Address, bytes] | None
    ) -> Connection | None:
        """Open a connection, subscribed to all that the client reads; None when the broker is down."""
        if not self.up:
            return None
        for other in [each for each in self.connections if each.client is client]:
            self._forget(other)  # taken over: one client id, one connection
        connection = Connection(client, will)
        self.connections.append(connection)
        if hello is not None:
            self.publish(connection, *hello)
        for address, data in list(self.retained.items()):
            if client.reads(address):
                self._enqueue(connection, address, data)
        return connection

    def publish(
        self, connection: Connection, address: Address, data: bytes, acked: Callable[[], None] | None = None
    ) -> None:
        """Take a message from a client; `acked` is called if and when the client hears that the broker has it."""
        if connection.here:
            self.clock.at(self._due(connection, ("up", address)), self._arrived, connection, address, data, acked)

    # -- what befalls ---

    def cut(self, connection: Connection) -> None:
        """Both ends notice at once."""
        self._lose(connection)
        self._forget(connection)

    def dead(self, connection: Connection, client_s: float, broker_s: float) -> None:
        """Nothing passes any more; each end notices after its own while."""
        connection.hole = True
        self.clock.later(client_s, self._lose, connection)
        self.clock.later(broker_s, self._forget, connection)

    def restart(self, down_s: float) -> None:
        """Die, and come back with the retained messages of now, of an earlier moment, or none."""
        self.faults["broker restarted"] += 1
        self.up = False
        for connection in list(self.connections):
            connection.will = None
            self.cut(connection)
        self.retained = dict(self.rng.choice((self.retained, self._snapshot, self.ancient)))
        self.clock.later(down_s, self.back)

    def back(self) -> None:
        """Come up again."""
        self.up = True

    def remember(self) -> None:
        """Write the snapshot that a restart may bring back."""
        self._snapshot = dict(self.retained)

    def inject(self, address: Address, data: bytes) -> None:
        """Somebody publishes who is none of ours."""
        self._route(address, data)

    def forget_retained(self) -> None:
        """Let all retained messages go."""
        self.faults["retained messages forgotten"] += 1
        self.retained = {}

    # -- within ---

    def _due(self, connection: Connection, lane: tuple[str, Address]) -> float:
        """When a message that leaves now is there: never before an earlier one of its lane."""
        key = lane if self.weather.reorders else lane[0]
        delay = connection.client.latency_s + self.rng.random() * self.weather.jitter_s
        due = max(connection.due.get(key, 0.0), self.clock.now + delay)
        connection.due[key] = due
        return due

    def _arrived(self, connection: Connection, address: Address, data: bytes, acked: Callable[[], None] | None) -> None:
        if not connection.there or connection.hole:
            return
        if acked is not None:
            self.clock.later(connection.client.latency_s, self._acknowledge, connection, acked)
        self._route(address, data)

    @staticmethod
    def _acknowledge(connection: Connection, acked: Callable[[], None]) -> None:
        if connection.here and not connection.hole:
            acked()

    def _route(self, address: Address, data: bytes) -> None:
        if self.overhears is None:
            self.digest = zlib.crc32(data, self.digest)
        else:  # sealed: other keys each time, and so other bytes of the same length
            self.overhears(address, data)
            self.digest = zlib.crc32(b"%d" % len(data), self.digest)
        if address[0].retained:
            self.retained[address] = data
        for connection in self.connections:
            if connection.client.reads(address):
                self._enqueue(connection, address, data)

    def _enqueue(self, connection: Connection, address: Address, data: bytes) -> None:
        if self.rng.random() < self.weather.drop:
            self.faults["message lost"] += 1
            return
        if address[0] in DATA and self.rng.random() < self.weather.garble:
            self.faults["chunk garbled"] += 1
            at = self.rng.randrange(CHUNK_HEADER_BYTES, len(data))
            data = data[:at] + bytes([data[at] ^ 0x5A]) + data[at + 1 :]
        copies = 1
        if self.rng.random() < self.weather.double:
            self.faults["message doubled"] += 1
            copies = 2
        for _ in range(copies):
            if len(connection.waiting) >= self.weather.queue_max:
                self.faults["queue overflowed"] += 1
                if not self.weather.drops_oldest:
                    return
                connection.waiting.popleft().clear()
            slot = [data]
            connection.waiting.append(slot)
            self.clock.at(self._due(connection, ("down", address)), self._deliver, connection, address, slot)

    @staticmethod
    def _deliver(connection: Connection, address: Address, slot: list[bytes]) -> None:
        if not slot:
            return  # pushed out of the queue meanwhile
        waiting = connection.waiting
        if waiting[0] is slot:
            waiting.popleft()
        else:  # this very slot, not the first with the same bytes: the queue may hold a message twice
            del waiting[next(at for at, other in enumerate(waiting) if other is slot)]
        if connection.here and connection.there and not connection.hole:
            connection.client.packet(connection, address, slot[0])

    def _lose(self, connection: Connection) -> None:
        if connection.here:
            connection.here = False
            connection.client.link_lost(connection)

    def _forget(self, connection: Connection) -> None:
        if connection.there:
            connection.there = False
            self.connections.remove(connection)
            if connection.will is not None:
                self.clock.later(self.rng.random() * self.weather.jitter_s, self._route, *connection.will)
