from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from mailboat.demo.processes import Child, Children, last_error
from shared.errors import ConfigError, UnavailableError
from tests.helpers import any_free_port, run_async


@pytest.mark.parametrize(
    ("log", "line"),
    [
        ("", ""),
        ("one\ntwo\n", "two"),
        ("error: the first\nnoise\n", "the first"),
        ("error: the first\nerror: the second\n hint: something\n", "the second"),
        ("\x1b[1;31merror: in red\x1b[0m\n", "in red"),
        (
            json.dumps({"event": "it broke", "level": "error"}) + "\n" + json.dumps({"event": "bye", "level": "info"}),
            "it broke",
        ),
        (json.dumps({"event": "bye", "level": "info"}), "bye"),
        ("{not json", "{not json"),
        ("Traceback (most recent call last):\n  File x\nValueError: what it was\n", "ValueError: what it was"),
    ],
)
def test_the_line_that_says_why(log: str, line: str) -> None:
    """The last error wins over what was said later; without one it is the last line."""
    assert last_error(log)[0] == line


def test_advice_is_kept_with_its_error() -> None:
    """What the process told to do is passed on, and only that of the last error."""
    assert last_error("error: a\n hint: x\nerror: b\n hint: y\n") == ("b", "y")
    assert last_error("error: a\n hint: x\nerror: b\n") == ("b", "")


async def failing(folder: Path, *arguments: str) -> Child:
    """A process that has ended."""
    async with Children(folder / "logs", folder) as children:
        child = await children.start("it", *arguments)
        await child.process.wait()
    return child


def test_a_process_that_refuses_says_why(tmp_path: Path) -> None:
    """Name, status, its last words and the log stand in the error; the family follows its status."""
    child = run_async(failing(tmp_path, "no-such-command"))
    error = child.failure()
    assert isinstance(error, ConfigError)
    assert error.message.startswith("it ended with status 2: ")
    assert str(child.log) in error.hint


def test_a_process_that_ends_well_is_no_failure(tmp_path: Path) -> None:
    """Status 0 is silence."""
    assert run_async(failing(tmp_path, "--version")).failure() is None


def test_what_was_killed_by_somebody_else_is_named(tmp_path: Path, free_port: int) -> None:
    """A process ended by a signal that we did not send is a failure; one that we ended is none."""

    async def killed(*, by_us: bool) -> Child:
        async with Children(tmp_path / "logs", tmp_path) as children:
            child = await children.start("broker", "broker", "run", "--port", str(free_port))
            if by_us:
                await children.kill("broker")
            else:
                os.kill(child.process.pid, signal.SIGKILL)
                await child.process.wait()
            return child

    assert run_async(killed(by_us=True)).failure() is None
    error = run_async(killed(by_us=False)).failure()
    assert isinstance(error, UnavailableError)
    assert "SIGKILL" in error.message


def test_leaving_the_block_ends_every_process(tmp_path: Path) -> None:
    """Nothing outlives the demonstration, and what it has ended is no failure."""

    async def run() -> list[Child]:
        async with Children(tmp_path / "logs", tmp_path) as children:
            ports = {name: str(any_free_port()) for name in ("a", "b")}
            return [await children.start(name, "broker", "run", "--port", port) for name, port in ports.items()]

    assert all(child.status is not None and child.failure() is None for child in run_async(run()))
