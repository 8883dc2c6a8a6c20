"""The link to the broker, and the only part of the project that speaks MQTT.

link.py       Link: connects, stays, reconnects; events out, publications in
client.py     one connection, over aiomqtt and paho
dial.py       TCP and TLS without threads
readahead.py  reads more at once than the library asks for
backoff.py    when to try again (pure)
vigil.py      whether a connection still lives (pure)
refusals.py   what reason codes mean (pure)
endpoints.py  URLs, credentials, certificates
tls.py        certificates that were renewed, read again
counters.py   bytes as MQTT packets (pure)
model.py      options, events, LinkDownError
"""

from __future__ import annotations

from shared.link.counters import Counters
from shared.link.link import Link
from shared.link.model import Connected, Disconnected, Event, LinkDownError, LinkOptions, Packet, Publication

__all__ = [
    "Connected",
    "Counters",
    "Disconnected",
    "Event",
    "Link",
    "LinkDownError",
    "LinkOptions",
    "Packet",
    "Publication",
]
