"""Work in a thread that nobody leaves behind."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


async def in_thread(work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Do work in a thread, and, when cancelled, wait for its end.

    A thread cannot be stopped. One that went on would write files and rows after its owner had closed them, given up
    its lock and let the next one in.
    """
    call = partial(contextvars.copy_context().run, work, *args, **kwargs)
    doing = asyncio.get_running_loop().run_in_executor(None, call)
    try:
        return await asyncio.shield(doing)
    except asyncio.CancelledError:
        while not doing.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait([doing])
        doing.exception()  # whatever it is, nobody waits for it
        raise
