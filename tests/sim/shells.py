"""What both shells have between link, disk and decisions, in virtual time: the pump and the spooler's thread."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from shared.manifest import Manifest
from shared.messages import Chunk
from shared.spooler import Spooler
from shared.store import FrameStore
from tests.sim.broker import Address
from tests.sim.machine import Machine

CHUNK_S = 0.02
"""A chunk onto the link, at best."""


class VirtualPump:
    """`shared.pump.Pump` in virtual time: chunks in order, one after the other, forgotten when the link drops."""

    def __init__(
        self, machine: Machine, read: Callable[[str, int], bytes | None], sent: Callable[[str], None] | None
    ) -> None:
        self._machine = machine
        self._read = read
        self._sent = sent
        self._orders: dict[tuple[Address, str, int], None] = {}
        self._busy = False

    def put(self, address: Address, transfer_id: str, indices: Iterable[int]) -> None:
        """Queue chunks; those that wait already keep their place."""
        for index in indices:
            if (address, transfer_id, index) in self._orders and self._sent is not None:
                self._machine.later(0, self._sent, transfer_id)
            self._orders[address, transfer_id, index] = None
        self._go_on()

    def clear(self) -> None:
        """The link is down."""
        self._orders.clear()

    def _go_on(self) -> None:
        if not self._busy and self._orders:
            self._busy = True
            self._machine.later(CHUNK_S, self._next)

    def _next(self) -> None:
        self._busy = False
        if self._orders:
            address, transfer_id, index = order = next(iter(self._orders))
            del self._orders[order]
            packet = self._read(transfer_id, index)
            machine, sent = self._machine, self._sent
            if packet is not None and machine.connection is not None:
                acked = None if sent is None else (lambda: machine.later(0, sent, transfer_id))
                machine.broker.publish(machine.connection, address, packet, acked)
        self._go_on()


class VirtualSpooler:
    """The real `Spooler`'s work, one thing after the other, each some time after it was asked for."""

    def __init__(
        self,
        machine: Machine,
        store: FrameStore,
        stored: Callable[[str, tuple[int, ...]], None],
        refused: Callable[[str], None],
        **bounds: Any,
    ) -> None:
        self.spooler = Spooler(
            store,
            open_chunk=machine.guard.open_chunk,
            stored=stored,
            refused=lambda _chunk, rule: refused(rule),
            **bounds,
        )
        self._machine = machine
        self._stored = stored
        self._refused = refused
        self._free_at = 0.0
        self.arrived: list[Chunk] = []
        self.most_arrived = 0

    def soon(self, work: Callable[..., None], *args: Any) -> None:
        """Do something in the thread, after all that was asked for before."""
        machine = self._machine
        self._free_at = max(self._free_at, machine.clock.now) + machine.rng.uniform(0.001, 0.05)
        machine.later(self._free_at - machine.clock.now, work, *args)

    def put(self, chunk: Chunk) -> None:
        """A chunk arrived."""
        self.arrived.append(chunk)
        self.most_arrived = max(self.most_arrived, len(self.arrived))
        if len(self.arrived) == 1:
            self.soon(self._write)

    def _write(self) -> None:
        batch, self.arrived = self.arrived, []
        written, refused = self.spooler._write(batch)
        for _, rule in refused:
            self._refused(rule)
        for transfer_id, indices in written.items():
            self._stored(transfer_id, tuple(indices))

    def open(self, manifest: Manifest) -> bytes:
        """See Spooler.open; in the thread."""
        return self.spooler._open_now(manifest)

    def close(self, transfer_id: str, *, delete: bool = False) -> None:
        """See Spooler.close."""
        self.soon(self.spooler._close, transfer_id, delete)
