"""The layout of a PUBLISH packet, the only one that is large enough to be worth reading by ourselves.

The MQTT library copies a payload six times between the socket and its callback; this takes one.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

_U16 = struct.Struct(">H")


class MalformedPublishError(ValueError):
    """The bytes are not those of a PUBLISH packet with QoS 0 or 1."""


@dataclass(frozen=True, slots=True)
class Publish:
    """A PUBLISH packet, read; `packet_id` is None with QoS 0."""

    topic: bytes
    payload: bytes
    retained: bool
    packet_id: int | None


def parse_publish(first: int, body: bytes | bytearray, *, modern: bool) -> Publish:
    """Read what follows the fixed header, whose first byte is `first`; `modern` for MQTT 5 (section 3.3 there).

    Properties are passed over: this project sends none, and none changes what a message means to it. Raises
    MalformedPublishError.
    """
    qos = first >> 1 & 3
    if qos > 1:
        raise MalformedPublishError("QoS 2 was never asked for")
    try:
        (length,) = _U16.unpack_from(body)
        at = 2 + length
        topic = bytes(body[2:at])
        packet_id: int | None = None
        if qos:
            (packet_id,) = _U16.unpack_from(body, at)
            at += 2
        if modern:
            at = _skip_properties(body, at)
    except (struct.error, IndexError):
        raise MalformedPublishError("the packet ends inside its header") from None
    if at > len(body):
        raise MalformedPublishError("the packet ends inside its header")
    with memoryview(body) as view:
        return Publish(topic, bytes(view[at:]), bool(first & 1), packet_id)


def _skip_properties(body: bytes | bytearray, at: int) -> int:
    length = 0
    for shift in (0, 7, 14, 21):
        byte = body[at]
        at += 1
        length |= (byte & 127) << shift
        if byte < 128:
            return at + length
    raise MalformedPublishError("the length of the properties is longer than four bytes")


def publish_packet_bytes(*, topic: int, payload: int, qos: int, properties: int) -> int:
    """Length of a PUBLISH packet from the lengths of its parts in bytes.

    `properties` includes their length prefix: 1 for none in MQTT 5, 0 in 3.1.1, which has no such field
    (MQTT 5.0, sections 2.1 and 3.3).
    """
    return packet_bytes(2 + topic + (2 if qos else 0) + properties + payload)


def packet_bytes(remaining: int) -> int:
    """Length of a packet from its remaining length: one byte of type, the length itself, and the rest."""
    return 1 + varint_bytes(remaining) + remaining


def varint_bytes(value: int) -> int:
    """Length of a variable byte integer (MQTT 5.0, section 1.5.5): seven bits a byte."""
    return max(1, (value.bit_length() + 6) // 7)
