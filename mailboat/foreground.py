"""Running one asyncio job in the foreground until it is done or somebody stops it.

Ctrl-C and SIGTERM cancel the job once; it closes its connections and files and the process ends. Ctrl-C ends it with
status 130, as shells expect; SIGTERM, which is how service managers and docker stop what they started, with 0. A second
Ctrl-C does not wait.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any

from mailboat.console import say


def run(job: Coroutine[Any, Any, None]) -> None:
    """Run `job` to its end; KeyboardInterrupt when Ctrl-C ended it, a plain return when SIGTERM did."""
    asyncio.run(_until_told(job))


async def _until_told(job: Coroutine[Any, Any, None]) -> None:
    task = asyncio.current_task()
    assert task is not None
    told = False

    def stop() -> None:
        nonlocal told
        if not told:  # a second SIGTERM must not cut the clean-up short
            told = True
            task.cancel()

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop)
    try:
        await job
    except asyncio.CancelledError:
        if not told:
            raise
        say("stopped")
