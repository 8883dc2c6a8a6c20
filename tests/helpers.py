"""The few things that tests of several packages use."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import socket
from collections.abc import Callable, Coroutine
from typing import TypeVar

T = TypeVar("T")

AS_MYSELF = "user root\n" if os.geteuid() == 0 else ""
"""What Mosquitto is told where it would give its rights away, and could not read our files any more."""

PORTS = range(20_000, 32_000)
"""Below those that the system hands out by itself, to whoever connects or listens anywhere: between a test that looks
for a free port and the broker that takes it, or while that broker is away, nobody is given one of these."""
_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
_turns = itertools.count(random.randrange(0, len(PORTS), _WORKERS) + _WORKER, _WORKERS)
"""Each worker has ports of its own, and takes none twice in a long while."""


def run_async(coroutine: Coroutine[object, object, T], *, timeout_s: float = 30.0) -> T:
    """The coroutine's result; TimeoutError when it takes longer than `timeout_s` seconds."""

    async def bounded() -> T:
        async with asyncio.timeout(timeout_s):
            return await coroutine

    return asyncio.run(bounded())


async def until(holds: Callable[[], bool]) -> None:
    """Return once it holds; what is looked at are files of other tasks and processes."""
    while not holds():  # noqa: ASYNC110 - files raise no events
        await asyncio.sleep(0.02)


def any_free_port() -> int:
    """A TCP port on 127.0.0.1 that nobody listens on, and that the system gives to nobody."""
    while True:
        port = PORTS[next(_turns) % len(PORTS)]
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
