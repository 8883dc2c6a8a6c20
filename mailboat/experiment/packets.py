"""The size on the wire of real messages and frames: whole PUBLISH packets of MQTT 5 with QoS 1."""

from __future__ import annotations

from shared.link.packets import publish_packet_bytes
from shared.manifest import Manifest
from shared.messages import CHUNK_HEADER_BYTES, Message, encode
from shared.topics import Channel, topic

_NO_PROPERTIES = 1


def message_bytes(federation: str, channel: Channel, site: str | None, message: Message) -> int:
    """Return the length of the packet that carries a control message."""
    return packet_bytes(federation, channel, site, len(encode(message)))


def chunk_bytes(federation: str, channel: Channel, site: str | None, manifest: Manifest, index: int) -> int:
    """Return the length of the packet that carries one frame of a transfer."""
    return packet_bytes(federation, channel, site, CHUNK_HEADER_BYTES + manifest.frame_lengths[index])


def packet_bytes(federation: str, channel: Channel, site: str | None, payload: int) -> int:
    """Return the length of a packet with a payload of so many bytes."""
    name = topic(federation, channel, site)
    return publish_packet_bytes(topic=len(name), payload=payload, qos=1, properties=_NO_PROPERTIES)
