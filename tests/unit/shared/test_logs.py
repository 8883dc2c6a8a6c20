from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator

import pytest
import structlog

from shared import logs


@pytest.fixture(autouse=True)
def unconfigured() -> Iterator[None]:
    """Each test begins and ends with the library's own settings and no bound ids."""
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()
    yield
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


class Terminal(io.StringIO):
    """A stream that says of itself that somebody looks at it."""

    def isatty(self) -> bool:
        """Always."""
        return True


def test_json_lines_with_bound_ids() -> None:
    """Away from a terminal each line is a JSON object with level, part, time, the bound ids and the event's fields."""
    stream = io.StringIO()
    logs.configure(stream=stream)
    logs.bind(site="site-1")
    structlog.get_logger("link").warning("no connection", broker="h:1")
    line = json.loads(stream.getvalue())
    assert line.pop("timestamp").endswith("Z")
    expected = {"event": "no connection", "level": "warning", "part": "link", "site": "site-1", "broker": "h:1"}
    assert line == expected


def test_a_terminal_gets_short_lines_for_people() -> None:
    """On a terminal bound ids are left out, long ids and numbers cut, warnings named and coloured."""
    stream = Terminal()
    logs.configure(stream=stream)
    logs.bind(site="north")
    log = structlog.get_logger("site")
    log.info("sealed", update="ab" * 16, loss=0.123456, version=3)
    log.warning("disconnected", reason="reset by peer")
    sealed, disconnected = stream.getvalue().splitlines()
    assert re.fullmatch(r"\d\d:\d\d:\d\d  site         sealed  update=abababab loss=0.1235 version=3", sealed)
    assert re.fullmatch(r"\x1b\[33m.*  warning: disconnected  reason=reset by peer\x1b\[0m", disconnected)


def test_a_trainer_may_give_its_metrics_any_name() -> None:
    """A metric under a name that the line has already is told apart from it, whatever that name is."""
    stream = io.StringIO()
    logs.configure(stream=stream)
    logs.bind(site="north")
    names = ("version", "update", "bytes", "event", "level", "part", "timestamp", "site", "loss")
    told = logs.beside({"update": "ab", "version": 3, "bytes": 7}, dict.fromkeys(names, 0.5))
    structlog.get_logger("site").info("sealed", **told)
    line = json.loads(stream.getvalue())
    assert (line["event"], line["update"], line["version"], line["bytes"]) == ("sealed", "ab", 3, 7)
    assert (line["level"], line["part"], line["site"], line["loss"]) == ("info", "site", "north", 0.5)
    assert all(line[f"metric_{name}"] == 0.5 for name in names if name != "loss")


def test_the_form_can_be_asked_for() -> None:
    """`as_json` overrules what the stream is, in either direction."""
    terminal, pipe = Terminal(), io.StringIO()
    logs.configure(stream=terminal, as_json=True)
    structlog.get_logger("link").info("connected")
    assert json.loads(terminal.getvalue())["event"] == "connected"
    structlog.reset_defaults()
    logs.configure(stream=pipe, as_json=False)
    structlog.get_logger("link").warning("disconnected")
    assert pipe.getvalue().endswith("link         warning: disconnected\n")


@pytest.mark.parametrize(("verbose", "lines"), [(False, 1), (True, 2)])
def test_level(verbose: bool, lines: int) -> None:
    """Debug lines appear only when asked for."""
    stream = io.StringIO()
    logs.configure(verbose=verbose, stream=stream)
    log = structlog.get_logger("link")
    log.debug("attempt")
    log.info("connected")
    assert len(stream.getvalue().splitlines()) == lines
