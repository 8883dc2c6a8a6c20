from __future__ import annotations

import asyncio
import os
import signal
import socket

import pytest

from mailboat import foreground
from mailboat.reach import until_done
from shared.config import BrokerSection
from shared.errors import ConfigError, UnavailableError

NOBODY = BrokerSection(url="mqtt://127.0.0.1:9")


class Job:
    """A job that runs until it is cancelled or has had `seconds`; remembers how it ended."""

    def __init__(self, seconds: float = 60.0) -> None:
        self.seconds = seconds
        self.ended = ""

    async def __call__(self) -> None:
        """Run."""
        try:
            await asyncio.sleep(self.seconds)
        except asyncio.CancelledError:
            self.ended = "cancelled"
            raise
        self.ended = "done"


def test_a_job_that_ends_ends_all(capsys: pytest.CaptureFixture[str]) -> None:
    """When the job is done nobody goes on looking for the broker."""
    job = Job(0.01)
    asyncio.run(until_done(job(), NOBODY, give_up_s=None))
    assert job.ended == "done"


def test_what_the_job_raises_is_raised() -> None:
    """The job's own error comes out as it is, whatever the broker does."""

    async def failing() -> None:
        raise ConfigError("wrong")

    with pytest.raises(ConfigError, match="wrong"):
        asyncio.run(until_done(failing(), NOBODY, give_up_s=None))


def test_giving_up_cancels_the_job(capsys: pytest.CaptureFixture[str]) -> None:
    """After the limit the job is cancelled, not abandoned, and the error names the broker."""
    job = Job()
    with pytest.raises(UnavailableError, match=r"broker not reachable at 127.0.0.1:9 within 0.1 s"):
        asyncio.run(until_done(job(), NOBODY, give_up_s=0.1))
    assert job.ended == "cancelled"
    assert capsys.readouterr().err.count("broker not reachable at 127.0.0.1:9, retrying\n") == 1


def test_a_broker_that_was_reached_is_not_given_up_on(capsys: pytest.CaptureFixture[str]) -> None:
    """The limit is for the first contact: with somebody listening, the job has all the time it needs."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"mqtt://127.0.0.1:9,127.0.0.1:{server.getsockname()[1]}"
        job = Job(0.5)
        asyncio.run(until_done(job(), BrokerSection(url=url), give_up_s=0.2))
    assert job.ended == "done"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("times", [1, 2])
def test_sigterm_ends_the_job_in_order(times: int, capsys: pytest.CaptureFixture[str]) -> None:
    """SIGTERM cancels the job, lets it clean up, and is no error; a second one does not cut the clean-up short."""
    steps: list[str] = []

    async def job() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(60)
        finally:
            for _ in range(times - 1):
                os.kill(os.getpid(), signal.SIGTERM)
                await asyncio.sleep(0.01)
            steps.append("cleaned up")

    foreground.run(job())
    assert steps == ["cleaned up"]
    assert capsys.readouterr().err == "stopped\n"


def test_ctrl_c_ends_the_job_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGINT cancels the job, lets it clean up, and comes out as KeyboardInterrupt."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    steps: list[str] = []

    async def job() -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0)
            steps.append("cleaned up")

    try:
        with pytest.raises(KeyboardInterrupt):
            foreground.run(job())
    finally:
        signal.signal(signal.SIGINT, before)
    assert steps == ["cleaned up"]
