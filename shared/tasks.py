"""Task groups whose error is the error, and threads that nobody leaves behind.

What a person must read is the cause, not that a group of tasks had one.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import ParamSpec, TypeVar

from shared.errors import MailboatError

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


@contextmanager
def first_error() -> Iterator[None]:
    """Raise, in the place of a group, the first MailboatError in it; a group without one passes, bugs and all."""
    try:
        yield
    except BaseExceptionGroup as group:
        found = group.subgroup(MailboatError)
        if found is None or group.subgroup(lambda error: not isinstance(error, MailboatError | BaseExceptionGroup)):
            raise
        raise _leaf(found) from None


def _leaf(group: BaseExceptionGroup[MailboatError]) -> MailboatError:
    first = group.exceptions[0]
    return _leaf(first) if isinstance(first, BaseExceptionGroup) else first
