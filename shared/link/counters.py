"""Bytes on the wire, counted as MQTT packets.

Counted are PUBLISH packets, whole: fixed header, topic, packet id, properties and payload. Not counted are the packets
of 2 to 5 bytes that acknowledge and ping, CONNECT and SUBSCRIBE, and what lies below MQTT (TLS, TCP, IP). A packet
counts as sent when the operating system has taken it; a packet that was cut half-way counts with the half that went.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Counters:
    """Totals over all connections of one link; they only grow."""

    bytes_sent: int = 0
    bytes_received: int = 0
    packets_sent: int = 0
    packets_received: int = 0
    connects: int = 0
    unmatched: int = 0
    """Publications that the broker acknowledged with 'no matching subscribers' (MQTT 5 only)."""
    unreadable: int = 0
    """Packets whose topic is not UTF-8; they are dropped."""

    @property
    def reconnects(self) -> int:
        """Connections after the first."""
        return max(0, self.connects - 1)


def publish_packet_bytes(*, topic: int, payload: int, qos: int, properties: int) -> int:
    """Length of a PUBLISH packet from the lengths of its parts in bytes.

    `properties` includes their length prefix: 1 for none in MQTT 5, 0 in 3.1.1, which has no such field
    (MQTT 5.0, sections 2.1 and 3.3).
    """
    remaining = 2 + topic + (2 if qos else 0) + properties + payload
    return 1 + varint_bytes(remaining) + remaining


def varint_bytes(value: int) -> int:
    """Length of a variable byte integer (MQTT 5.0, section 1.5.5): seven bits a byte."""
    return max(1, (value.bit_length() + 6) // 7)
