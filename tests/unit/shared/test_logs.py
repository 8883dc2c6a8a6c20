from __future__ import annotations

import io
import json
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


def test_terminal_gets_text() -> None:
    """On a terminal a line is text for people."""
    stream = Terminal()
    logs.configure(stream=stream)
    structlog.get_logger("link").info("connected")
    assert "connected" in stream.getvalue()
    with pytest.raises(json.JSONDecodeError):
        json.loads(stream.getvalue())


@pytest.mark.parametrize(("verbose", "lines"), [(False, 1), (True, 2)])
def test_level(verbose: bool, lines: int) -> None:
    """Debug lines appear only when asked for."""
    stream = io.StringIO()
    logs.configure(verbose=verbose, stream=stream)
    log = structlog.get_logger("link")
    log.debug("attempt")
    log.info("connected")
    assert len(stream.getvalue().splitlines()) == lines
