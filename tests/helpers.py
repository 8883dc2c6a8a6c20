"""The few things that tests of several packages use."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import TypeVar

T = TypeVar("T")


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
