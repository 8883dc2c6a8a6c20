"""Reading `audit.jsonl` while a coordinator appends to it, mends it at its start, or makes it anew."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from shared.audit import Line
from shared.errors import CorruptError


def read_lines(path: Path) -> Iterator[Line]:
    """Yield the lines that are there now; one that is still being written is left out.

    Raises CorruptError when a line is not the one that belongs there.
    """
    for number, (_, line) in enumerate(_lines_from(path, 0), start=1):
        if line is None or line.get("seq") != number:
            raise CorruptError(
                f"{path}, line {number}, was changed", hint="the coordinator mends the file at its start"
            )
        yield line


def follow_lines(path: Path, wait: Callable[[], None]) -> Iterator[Line]:
    """Yield all lines and then each new one, for ever and once each; `wait` is called when there is none.

    The file may be missing, or shrink, or be another one all of a sudden: then it is read again from its beginning and
    the lines told before, known by their `seq`, are passed over.
    """
    told = end = inode = 0
    while True:
        try:
            now = path.stat()
        except FileNotFoundError:
            end = 0
            wait()
            continue
        if now.st_ino != inode or now.st_size < end:
            end, inode = 0, now.st_ino
        for end_of_line, line in _lines_from(path, end) if now.st_size > end else ():
            if line is None or line["seq"] > told + 1:
                end = 0  # rewritten under our eyes, or edited
                break
            end = end_of_line
            if line["seq"] > told:
                told = line["seq"]
                yield line
        wait()


def _lines_from(path: Path, start: int) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Yield (offset of the line's end, the line) from offset `start` on; None for what is not a row's line."""
    with path.open("rb") as file:
        file.seek(start)
        end = start
        for text in file:
            if not text.endswith(b"\n"):
                return
            end += len(text)
            yield end, _parsed(text)


def _parsed(text: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) and isinstance(value.get("seq"), int) else None
