"""Saying that the broker cannot be reached, for as long as it cannot, beside the job that goes on trying."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Coroutine
from typing import Any

from mailboat.console import say
from shared.config import BrokerSection
from shared.errors import UnavailableError
from shared.link.endpoints import Endpoint, parse_endpoints

PROBE_S = 0.5
"""Pause between two tries to reach the broker before the first contact."""
PROBE_PATIENCE_S = 3.0
REPEAT_S = 5.0
"""How often the same bad news is told."""


async def until_done(job: Coroutine[Any, Any, None], broker: BrokerSection, *, give_up_s: float | None) -> None:
    """Run `job`, and until the broker is reached the first time, say every few seconds that it is not.

    Raises what `job` raises, and UnavailableError when the broker is not reached within `give_up_s` seconds.
    """
    working = asyncio.ensure_future(job)
    watching = asyncio.create_task(_watch(parse_endpoints(broker.url), give_up_s))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            watching.result()
        await working
    finally:
        for task in (watching, working):
            task.cancel()
        await asyncio.wait({working, watching})


async def _watch(endpoints: tuple[Endpoint, ...], give_up_s: float | None) -> None:
    """Return once any endpoint takes a TCP connection."""
    began = time.monotonic()
    said = None
    while not await reachable(endpoints):
        waited = time.monotonic() - began
        places = ", ".join(str(endpoint) for endpoint in endpoints)
        if said is None or time.monotonic() - said >= REPEAT_S:
            said = time.monotonic()
            say(f"broker not reachable at {places}, retrying", style="yellow")
        if give_up_s is not None and waited >= give_up_s:
            raise UnavailableError(
                f"broker not reachable at {places} within {give_up_s:g} s",
                hint="check that it runs, that broker.url names it, and that a firewall lets this machine out",
            )
        await asyncio.sleep(PROBE_S)


async def reachable(endpoints: tuple[Endpoint, ...]) -> bool:
    """Whether any of the endpoints takes a TCP connection now."""
    for endpoint in endpoints:
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(PROBE_PATIENCE_S):
                _, writer = await asyncio.open_connection(endpoint.host, endpoint.port)
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
            return True
    return False
