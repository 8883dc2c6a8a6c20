"""What full-model federated averaging would have sent, measured: one transfer of every parameter, counted on the wire.

A FedAvg client (arXiv 1602.05629) downloads the whole model, trains, and uploads the whole model, as float32. Here the
exported model's weights are moved once, uncompressed, through the same broker and the same link as the run's own
transfers, and the bytes are counted where the run's are counted: whole PUBLISH packets, at the sender's and at the
receiver's link. Times the number of transfers that the run made, that is what full-model FedAvg would have taken for
the same rounds.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from shared.config import BrokerSection, LinkSection
from shared.errors import CorruptError, UnavailableError
from shared.link import Connected, Disconnected, Event, Link, LinkOptions, Packet
from shared.manifest import DEFAULT_SLICE_BYTES
from shared.messages import chunk_header, parse_chunk
from shared.tasks import first_error
from shared.topics import Channel, topic

IN_FLIGHT = 8
"""Chunks published and not yet acknowledged by the broker."""
STALL_S = 60.0
"""Give up when nothing has arrived for this long."""


@dataclass(frozen=True, slots=True)
class FullTransfer:
    """One transfer of the whole model, as counted."""

    file_bytes: int
    """The safetensors files: every parameter, float32."""
    sent_bytes: int
    """At the sender's link."""
    received_bytes: int
    """At the receiver's link."""


async def measure_full_transfer(model: Path, broker_url: str, federation: str, site: str) -> FullTransfer:
    """Publish the weights in the folder `model` in chunks as site `site` would, receive them as the coordinator would.

    Returns what was counted. The weights must fit into memory. UnavailableError when the connection breaks or nothing
    moves for a minute; CorruptError when other bytes arrive than were sent.
    """
    name = topic(federation, Channel.UP_DATA, site)
    data = await asyncio.to_thread(_weights, model)
    sender = Link(_options(broker_url, f"{federation}-full-out"))
    receiver = Link(_options(broker_url, f"{federation}-full-in", name))
    async with receiver, sender:
        inbound, outbound = receiver.events(), sender.events()
        await _connected(inbound)
        await _connected(outbound)
        with first_error():
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(_send(sender, data, name))
                arriving = tasks.create_task(_receive(inbound, name, len(data)))
    if arriving.result() != hashlib.sha256(data).digest():
        raise CorruptError("other bytes arrived than were sent", hint="look at the broker's log")
    return FullTransfer(len(data), sender.counters.bytes_sent, receiver.counters.bytes_received)


def _weights(model: Path) -> bytes:
    """All shards, one after the other; a small model has one."""
    return b"".join(shard.read_bytes() for shard in sorted(model.glob("*.safetensors")))


def _options(broker_url: str, client_id: str, *subscriptions: str) -> LinkOptions:
    return LinkOptions(
        broker=BrokerSection(url=broker_url),
        link=LinkSection(),
        client_id=client_id,
        subscriptions=subscriptions,
        give_up_s=STALL_S,
    )


async def _connected(events: AsyncIterator[Event]) -> None:
    while not isinstance(await anext(events), Connected):
        pass


async def _send(link: Link, data: bytes, name: str) -> None:
    """Publish the file in slices, each behind the header that any chunk of ours has."""
    transfer_id = hashlib.sha256(data).hexdigest()[:32]
    places = asyncio.Semaphore(IN_FLIGHT)

    async def publish(payload: bytes) -> None:
        try:
            await link.publish(name, payload)
        finally:
            places.release()

    async with asyncio.TaskGroup() as tasks:
        for index, start in enumerate(range(0, len(data), DEFAULT_SLICE_BYTES)):
            await places.acquire()
            raw = data[start : start + DEFAULT_SLICE_BYTES]
            tasks.create_task(publish(chunk_header(transfer_id, index, len(raw)) + raw))


async def _receive(events: AsyncIterator[Event], name: str, size: int) -> bytes:
    """Take the chunks under one topic until the file is whole, and return its SHA-256."""
    slices: dict[int, bytes] = {}
    while sum(map(len, slices.values())) < size:
        try:
            async with asyncio.timeout(STALL_S):
                event = await anext(events)
        except TimeoutError:
            raise UnavailableError(
                f"nothing has arrived for {STALL_S:.0f} s", hint="look at the broker's log"
            ) from None
        match event:
            case Packet(topic=topic_of) if topic_of != name:
                pass  # amqtt was seen to deliver a presence message that was never subscribed to
            case Packet():
                chunk = parse_chunk(event.payload)
                slices[chunk.index] = bytes(chunk.frame)
            case Disconnected():
                raise UnavailableError(f"the link broke during the measurement: {event.reason}", hint="run it again")
            case Connected():
                pass
    return hashlib.sha256(b"".join(slices[index] for index in sorted(slices))).digest()
