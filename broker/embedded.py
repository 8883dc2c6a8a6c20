"""The embedded broker, amqtt, as a process of its own: `python -m broker.embedded HOST PORT`.

For demonstrations on one machine: MQTT 3.1.1 only, sessions in memory, queues without a bound. Mailboat's own credits
keep those queues short, but nothing else does.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from typing import Any

from amqtt.broker import Broker
from amqtt.errors import BrokerError

from broker.config import CONNECTIONS_MAX, EMBEDDED_READY, require_loopback


def configuration(host: str, port: int) -> dict[str, Any]:
    """What amqtt is told: one loopback listener, no passwords, no $SYS messages."""
    require_loopback(host)
    return {
        "listeners": {"default": {"type": "tcp", "bind": f"{host}:{port}", "max_connections": CONNECTIONS_MAX}},
        "timeout_disconnect_delay": 0,
        "plugins": {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}},
    }


async def serve(host: str, port: int) -> None:
    """Start the broker, say so on one line, and serve until the process is ended."""
    broker = Broker(configuration(host, port))
    await broker.start()
    sys.stderr.write(f"{EMBEDDED_READY}\n")
    sys.stderr.flush()
    await asyncio.get_running_loop().create_future()


def main() -> None:
    """Run until ended by a signal; exit status 1 and one line when the port cannot be had."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("transitions").setLevel(logging.ERROR)  # its state machine narrates every step
    try:
        asyncio.run(serve(sys.argv[1], int(sys.argv[2])))
    except BrokerError as error:
        sys.exit(f"{error}: {error.__cause__ or error.__context__}")


if __name__ == "__main__":
    main()
