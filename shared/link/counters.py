"""Bytes on the wire, counted as MQTT packets.

Counted are PUBLISH packets, whole: fixed header, topic, packet id, properties and payload. Not counted are the packets
of 2 to 5 bytes that acknowledge and ping, CONNECT and SUBSCRIBE, and what lies below MQTT (TLS, TCP, IP). A packet
counts as sent when it is handed over; when a connection ends, what the operating system had not taken of it is taken
off again.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Counters:
    """Totals over all connections of one link."""

    bytes_sent: int = 0
    bytes_received: int = 0
    packets_sent: int = 0
    packets_received: int = 0
    connects: int = 0
    unmatched: int = 0
    """Publications that the broker acknowledged with 'no matching subscribers' (MQTT 5 only)."""

    @property
    def reconnects(self) -> int:
        """Connections after the first."""
        return max(0, self.connects - 1)
