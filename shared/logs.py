"""Logs: short lines on a terminal, one JSON object a line otherwise; always on standard error.

A process calls `configure` once, first thing, and binds its ids (`bind`); every line written afterwards carries them,
whichever part of the code writes it. Lines name ids, counts and rules; never what a note holds.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any, TextIO

import structlog


def configure(*, verbose: bool = False, as_json: bool | None = None, stream: TextIO | None = None) -> None:
    """Send all logs of this process to `stream` (standard error), from level info, or debug when `verbose`.

    `as_json` None decides by the stream: JSON unless it is a terminal.
    """
    file = stream or sys.stderr
    lines_for_people = file.isatty() if as_json is None else not as_json
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            _add_part,
            structlog.processors.TimeStamper(fmt="%H:%M:%S" if lines_for_people else "iso", utc=not lines_for_people),
            *(
                [_for_people(colours=file.isatty())]
                if lines_for_people
                else [_in_order, structlog.processors.JSONRenderer()]
            ),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG if verbose else logging.INFO),
        logger_factory=_Factory(file),
        cache_logger_on_first_use=True,
    )


def bind(**ids: str) -> None:
    """Add these ids to every line that this task, and what it starts, writes from now on."""
    structlog.contextvars.bind_contextvars(**ids)


class _Part(structlog.WriteLogger):
    """A writer that knows which part of the program it belongs to."""

    def __init__(self, file: TextIO, name: str) -> None:
        super().__init__(file)
        self.name = name


class _Factory:
    """Makes the writer behind `structlog.get_logger(name)`."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def __call__(self, name: str = "mailboat") -> _Part:
        return _Part(self._file, name)


def _add_part(logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    event["part"] = logger.name
    return event


def _in_order(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """When, how grave, where and what first; the rest as it was given."""
    first = {key: event.pop(key) for key in ("timestamp", "level", "part", "event")}
    return {**first, **event}


def _for_people(*, colours: bool) -> structlog.typing.Processor:
    """Lines such as `10:13:30  site  sealed  update=5a804654 loss=0.5545`; what every line repeats is left out.

    Digests and ids are cut to 8 digits, numbers to 4; warnings say so, and are yellow or red on a terminal.
    """
    colour_of = _COLOURS if colours else {}

    def render(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> str:
        when, level, part, what = (event.pop(key) for key in ("timestamp", "level", "part", "event"))
        said = what if level in {"info", "debug"} else f"{level}: {what}"
        facts = " ".join(f"{key}={_short(value)}" for key, value in event.items() if key not in bound())
        line = f"{when}  {part:<11s}  {said}  {facts}".rstrip()
        return f"{colour_of[level]}{line}{_PLAIN}" if level in colour_of else line

    return render


def beside(facts: Mapping[str, Any], foreign: Mapping[str, Any]) -> dict[str, Any]:
    """Both, to be logged in one line; `metric_` stands before a foreign name that the line has already.

    A trainer may give its metrics any name, and a name given twice would be an error.
    """
    taken = _OWN_NAMES | bound() | facts.keys()
    return {**facts, **{f"metric_{name}" if name in taken else name: value for name, value in foreign.items()}}


def bound() -> frozenset[str]:
    """The names of the ids that every line of this task carries."""
    return frozenset(structlog.contextvars.get_contextvars())


_OWN_NAMES = frozenset({"event", "timestamp", "level", "part"})
_COLOURS = {"debug": "\x1b[2m", "warning": "\x1b[33m", "error": "\x1b[31m", "critical": "\x1b[31m"}
_PLAIN = "\x1b[0m"
_LONG_ID = re.compile(r"[0-9a-f]{32}|[0-9a-f]{64}")


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = str(value)
    return text[:8] if _LONG_ID.fullmatch(text) else text
