"""A thread is waited for, also by who is told to stop."""

from __future__ import annotations

import asyncio
import gc
import threading

import pytest

from shared.errors import CorruptError
from shared.threads import in_thread


def test_a_thread_is_waited_for_when_its_work_is_cancelled() -> None:
    """Cancelled, and cancelled again while it waits, it ends after the thread, and as cancelled."""

    async def run() -> None:
        began, may_end, ended = threading.Event(), threading.Event(), threading.Event()

        def work() -> None:
            began.set()
            assert may_end.wait(60)
            ended.set()

        task = asyncio.create_task(in_thread(work))
        while not began.is_set():  # noqa: ASYNC110 - another thread's event
            await asyncio.sleep(0.001)
        for _ in range(3):
            task.cancel()
            await asyncio.sleep(0.01)
            assert not task.done()
        may_end.set()
        await asyncio.wait([task])
        assert ended.is_set()
        assert task.cancelled()

    asyncio.run(run())


def test_what_a_cancelled_thread_raises_is_no_news(caplog: pytest.LogCaptureFixture) -> None:
    """Nobody is told of it any more, not even by the event loop at its end; uncancelled it is raised."""

    async def run() -> None:
        began, may_end = threading.Event(), threading.Event()

        def work() -> None:
            began.set()
            assert may_end.wait(60)
            raise CorruptError("spoilt", hint="mend it")

        task = asyncio.create_task(in_thread(work))
        while not began.is_set():  # noqa: ASYNC110 - another thread's event
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.sleep(0)
        may_end.set()
        await asyncio.wait([task])
        assert task.cancelled()
        with pytest.raises(CorruptError, match="spoilt"):
            await in_thread(work)

    asyncio.run(run())
    gc.collect()
    assert not caplog.records
