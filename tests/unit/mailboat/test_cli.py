from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from mailboat import cli, console
from shared.errors import ConfigError, CorruptError, MailboatError, RefusedError, UnavailableError


def mailboat(*words: str) -> int:
    """The exit status of a command line, run in this process."""
    return console.run(lambda: cli.app(list(words), prog_name="mailboat"))


def raising(error: BaseException) -> Callable[[], object]:
    """A command that fails so."""

    def command() -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ConfigError("a is wrong", hint="mend a"), 2),
        (RefusedError("b is refused", rule="b", hint="ask b"), 3),
        (CorruptError("c is corrupt", hint="look at c"), 3),
        (UnavailableError("d is away", hint="start d"), 4),
    ],
)
def test_an_error_is_one_line_and_a_hint(error: MailboatError, status: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Each family of errors becomes its message, its hint and its exit status, on standard error alone."""
    assert console.run(raising(error)) == status
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == f"error: {error.message}\n hint: {error.hint}\n"


def test_long_messages_stay_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """A message is not broken at the window's edge, and square brackets in it are text."""
    message = "a path " + "/very" * 60 + " [red] and [/nothing]"
    console.run(raising(ConfigError(message)))
    assert capsys.readouterr().err == f"error: {message}\n"


def test_a_bug_keeps_its_traceback() -> None:
    """What is not an error of ours is not caught."""
    with pytest.raises(ZeroDivisionError):
        console.run(raising(ZeroDivisionError()))


def test_ctrl_c_says_stopped(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A command interrupted by Ctrl-C says so in a word and ends with status 130."""
    app = typer.Typer()
    app.command()(raising(KeyboardInterrupt()))
    assert console.run(lambda: app([])) == 130
    assert capsys.readouterr().err == "stopped\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["status", "--nonsense"], "No such option"),
        (["data", "make"], "Missing option '--out'"),
        (["broker", "run", "--port", "70000"], "65535"),
        (["broker", "run", "--kind", "rabbit"], "rabbit"),
    ],
)
def test_wrong_usage_ends_with_2(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A command line that cannot be understood names what is wrong in it and where help is."""
    assert mailboat(*words) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "--help" in said


def commands() -> list[list[str]]:
    """Every command line that exists, without its options."""
    found: list[list[str]] = []
    group = typer.main.get_command(cli.app)
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        inner = getattr(command, "commands", None)
        found += [[name]] if inner is None else [[name, sub] for sub in inner]
    return found


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_explains_itself(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Each command has a sentence about itself, and each of its options too."""
    assert mailboat(*words, "--help") == 0
    text = capsys.readouterr().out
    assert re.search(r"Usage: mailboat .*\n\n  [A-Z][^.]+\.", text)
    options = text.partition("Options:\n")[2]
    described = [line for line in options.splitlines() if line.startswith("  -")]
    assert described
    for line, following in zip(options.splitlines(), [*options.splitlines()[1:], ""], strict=True):
        if line.startswith("  -"):
            assert re.search(r"\S  +[A-Z]", line.strip()) or re.match(r"^ {10,}\S", following), line


def test_the_list_of_commands_needs_none_of_the_parts() -> None:
    """`mailboat --help` imports nothing that takes long: no torch, no asyncio, no pydantic, no rich."""
    script = (
        "import sys; from mailboat import cli, console; status = console.run(lambda: cli.app(['--help']));"
        "print(sorted({'asyncio', 'numpy', 'pydantic', 'rich', 'structlog', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    """`mailboat --version` prints name and number."""
    assert mailboat("--version") == 0
    assert re.fullmatch(r"mailboat \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "full", "out/model"), "error: out/model: the disk is full"),
        (OSError(errno.EDQUOT, "quota"), "error: what this command writes: the disk quota is used up"),
    ],
)
def test_a_disk_without_room_is_one_line(error: OSError, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Where a command did not say what it was writing, the file is named if the system named it."""
    assert console.run(raising(error)) == UnavailableError.exit_code
    assert capsys.readouterr().err.splitlines()[0] == line


def test_any_other_error_of_the_system_is_a_bug_and_keeps_its_traceback() -> None:
    """It is not swallowed."""
    with pytest.raises(OSError, match="what is this"):
        console.run(raising(OSError(errno.EXDEV, "what is this")))


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    """When the other end of the pipe closes early, nothing is printed about it."""
    script = (
        "import sys; from mailboat import console;"
        "sys.exit(console.run(lambda: [sys.stdout.write('x' * 100) for _ in range(100_000)]))"
    )
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run([sys.executable, "-c", script], check=False, stdout=writer, stderr=subprocess.PIPE)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (console.READER_GONE, b"")
