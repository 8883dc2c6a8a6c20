"""What a machine is, whatever runs on it: a disk, clocks, a link, and a process that can die before any step."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from shared.errors import RefusedError, UnavailableError
from shared.messages import Message, UnknownMessageError
from shared.store import Stored
from shared.trust.guard import Guard
from shared.trust.replay import RepeatedError
from tests.sim.broker import Address, Broker, Connection
from tests.sim.clock import Clock
from tests.sim.disk import Disk, KilledError

TICK_S = 0.5
EPOCH_S = 1e9


class Machine:
    """A computer with one process of ours; the subclass says what the process does.

    `life` counts the process's starts: what an earlier life had in mind does not happen to the next one.
    """

    guard: Guard

    def __init__(
        self,
        name: str,
        clock: Clock,
        broker: Broker,
        rng: random.Random,
        *,
        latency_s: float,
        told: Callable[..., None],
    ) -> None:
        self.name = name
        self.clock = clock
        self.broker = broker
        self.rng = rng
        self.latency_s = latency_s
        self.told = told
        self.disk = Disk(rng, self.step)
        self.life = 0
        self.running = False
        self.up = False
        """Whether the process has got through its start."""
        self.gone = False
        """Whether the process ended for good, of its own will or ours."""
        self.fuse: int | None = None
        """Steps until the process dies."""
        self.dies_of_power = False
        self.stays_away = False
        """The next death is followed by a long absence."""
        self.frozen_until = 0.0
        self.unreachable_until = 0.0
        self.rot = 0.0
        """Chance of a transfer to be spoilt on the disk before it is looked at."""
        self.wall_offset_s = EPOCH_S
        self.connection: Connection | None = None

    # -- time ---

    @property
    def wall(self) -> float:
        """Unix seconds as this machine believes."""
        return self.clock.now + self.wall_offset_s

    def step(self) -> None:
        """The process does something that the outside could see; it may die before."""
        if self.fuse is not None:
            self.fuse -= 1
            if self.fuse < 0:
                raise KilledError

    def later(self, seconds: float, action: Callable[..., None], *args: Any) -> None:
        """Something that this life of the process will do."""
        self.clock.later(seconds, self._wake, self.life, action, args)

    def _wake(self, life: int, action: Callable[..., None], args: tuple[Any, ...]) -> None:
        if life == self.life and self.running:
            if self.clock.now < self.frozen_until:
                self.clock.at(self.frozen_until, self._wake, life, action, args)
            else:
                self.run(action, *args)

    def run(self, action: Callable[..., None], *args: Any) -> None:
        """Let the process do something; it may die of it, by our hand or by its disk's."""
        try:
            action(*args)
        except KilledError:
            if not self.dies_of_power:
                self.disk.faults["killed for long" if self.stays_away else "killed"] += 1
            self.die("killed")
        except (UnavailableError, OSError) as error:
            if isinstance(error, (FileNotFoundError, FileExistsError)):
                raise
            self.die(f"{type(error).__name__}: {error}")

    def rots(self, stored: Stored) -> bool:
        """Perhaps spoil a transfer; whether it was."""
        if not self.rot or self.rng.random() >= self.rot:
            return False
        self.told(self.name, "disk spoils", stored.manifest.transfer_id)
        self.disk.faults["transfer spoilt at rest"] += 1
        stored.path.inode().spoil(self.rng.randrange(stored.manifest.wire_bytes))  # type: ignore[attr-defined]
        return True

    def tick(self) -> None:
        """The process's heartbeat."""
        self.later(TICK_S, self.tick)
        self.guard.save()
        self.ticked()

    # -- life and death ---

    def start(self) -> None:
        """Start the process, unless it runs."""
        if self.running or self.gone:
            return
        self.life += 1
        self.running = self.disk.alive = True
        self.fuse = None
        self.told(self.name, "starts")
        self.later(0, self._begin)

    def _begin(self) -> None:
        self.boot()
        self.up = True
        self.later(self.rng.random() * TICK_S, self.tick)
        self._connect()

    def die(self, why: str) -> None:
        """End the process without another step, and start it again some time later."""
        if not self.running:
            return
        self.told(self.name, "dies", why)
        self.running = self.up = self.disk.alive = False
        if self.dies_of_power:
            self.disk.power_loss()
            self.frozen_until = 0.0
            self.dies_of_power = False
        self.ended()
        self._hang_up(suddenly=True)
        away_s = self.rng.uniform(15.0, 45.0) if self.stays_away else self.rng.uniform(0.5, 8.0)
        self.stays_away = False
        self.clock.later(away_s, self.start)

    def stop(self) -> None:
        """End the process in good order, as an update of its host does, and start it again some time later."""
        if not self.up or self.clock.now < self.frozen_until:
            return
        self.told(self.name, "stops")
        self.disk.faults["stopped in good order"] += 1
        self.part()
        self.running = self.up = self.disk.alive = False
        self.ended()
        self._hang_up(suddenly=False)
        self.clock.later(self.rng.uniform(0.5, 8.0), self.start)

    def leave(self) -> None:
        """End the process in good order, for good."""
        self.gone = True
        self.running = self.up = False
        self.ended()
        self._hang_up(suddenly=False)

    def _hang_up(self, *, suddenly: bool) -> None:
        connection, self.connection = self.connection, None
        if connection is None:
            return
        connection.here = False
        if suddenly and self.rng.random() < 0.5:
            self.clock.later(self.rng.uniform(0, 20), self.broker.cut, connection)  # the machine is off: no FIN
        else:
            self.broker.cut(connection)

    # -- link ---

    def _connect(self) -> None:
        if self.connection is not None:
            return
        if self.clock.now < self.unreachable_until:
            self.later(self.rng.uniform(0.2, 2.0), self._connect)
            return
        self.connection = self.broker.connect(self, self.will(), self.greeting())
        if self.connection is None:
            self.later(self.rng.uniform(0.2, 2.0), self._connect)
        else:
            self.link_up()

    def post(self, address: Address, message: Message) -> None:
        """Publish a control message, if there is a link."""
        self.step()
        if self.connection is not None:
            self.told(self.name, "says", address[1] or "all", message)
            self.broker.publish(self.connection, address, self.guard.seal(message, *address, self.wall))

    def opened(self, address: Address, data: bytes) -> Message | None:
        """As `Mailroom._sort`: a message that may be believed."""
        try:
            return self.guard.open(data, *address, self.wall)
        except (UnknownMessageError, RepeatedError):
            return None
        except RefusedError as error:
            self.told(self.name, "refuses a message", error.rule)
            self.refused(address[1], error)
            return None

    def packet(self, connection: Connection, address: Address, data: bytes) -> None:
        """See Client."""
        self.later(0, self._packet, connection, address, data)

    def _packet(self, connection: Connection, address: Address, data: bytes) -> None:
        if connection is self.connection:
            self.taken(address, data)

    def link_lost(self, connection: Connection) -> None:
        """See Client."""
        if self.running and connection is self.connection:
            self.later(0, self._link_lost, connection)

    def _link_lost(self, connection: Connection) -> None:
        if connection is self.connection:
            self.told(self.name, "link down")
            self.connection = None
            self.link_down()
            self.later(self.rng.uniform(0.05, 3.0), self._connect)

    # -- what the subclass does ---

    def reads(self, address: Address) -> bool:
        """See Client."""
        raise NotImplementedError

    def will(self) -> tuple[Address, bytes] | None:
        """What the broker shall say when it loses us."""
        raise NotImplementedError

    def greeting(self) -> tuple[Address, bytes] | None:
        """What is published on each connection, before anything else."""
        raise NotImplementedError

    def boot(self) -> None:
        """The process's start, from the disk alone."""
        raise NotImplementedError

    def part(self) -> None:
        """What a process does last that is asked to end."""
        raise NotImplementedError

    def ended(self) -> None:
        """The process is gone; let go of what it held."""
        raise NotImplementedError

    def ticked(self) -> None:
        """A heartbeat."""
        raise NotImplementedError

    def link_up(self) -> None:
        """Connected and subscribed."""
        raise NotImplementedError

    def link_down(self) -> None:
        """The link is gone."""
        raise NotImplementedError

    def refused(self, site: str | None, error: RefusedError) -> None:
        """A message that may not pass; see Desk."""
        raise NotImplementedError

    def taken(self, address: Address, data: bytes) -> None:
        """A packet came in."""
        raise NotImplementedError
