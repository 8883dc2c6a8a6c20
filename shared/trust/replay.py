"""Counters against replay: one that a sender never uses twice, and the highest ones that a receiver has heard.

A sender's counter is max(last + 1, unix nanoseconds), so it needs no agreement with anybody and survives the loss of
its file. The file holds a ceiling that no counter in use exceeds; a process starts above it, so that a clock that was
set back while the process was away does not make its peer refuse it as replayed.

Neither file is synced: a receiver that was killed forgets at most the last `save`, one that lost power what the kernel
had not yet written (about half a minute), or all of it: a file that was renamed and not yet written is empty or torn
afterwards, and counts as missing. So does one for which the disk has no room, which is written when there is some.
Expiry bounds what can be replayed into that gap, and every message of the protocol means the same the second time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import msgpack
import structlog

from shared import durable
from shared.errors import NoRoomError, RefusedError

AHEAD_NS = 10_000_000_000
"""The ceiling is raised by so much, so the file is written every ten seconds at most."""

log = structlog.get_logger("trust")
_T = TypeVar("_T", int, dict[str, Any])


class RepeatedError(RefusedError):
    """A message that was taken already, delivered once more; nothing is wrong."""


class Counter:
    """A sender's counter; see the module's docstring."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._last = self._ceiling = _load(path, int) or 0

    def next(self, now: float) -> int:
        """Return a number above all that were returned before; `now` is unix seconds."""
        self._last = max(self._last + 1, int(now * 1e9))
        if self._last > self._ceiling:
            ceiling = self._last + AHEAD_NS
            if _store(self._path, ceiling):
                self._ceiling = ceiling
        return self._last


class Heard:
    """A receiver's memory: for each topic who spoke last and the highest counter; grows with sites alone."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._highest: dict[str, tuple[str, int]] = {
            topic: (key_id, counter) for topic, (key_id, counter) in (_load(path, dict) or {}).items()
        }
        self._saved = True

    def highest(self, topic: str, key_id: str) -> int:
        """Highest counter taken from this key on this topic; -1 when there was none."""
        speaker, counter = self._highest.get(topic, ("", -1))
        return counter if speaker == key_id else -1

    def check(self, topic: str, key_id: str, counter: int, *, retained: bool) -> None:
        """Raise RefusedError(rule='replayed') for a lower counter than the highest, RepeatedError for the same one.

        A retained topic gives its last message to every subscription, so there the same one is right.
        """
        highest = self.highest(topic, key_id)
        if counter < highest:
            raise RefusedError("a message older than one that was taken already", rule="replayed")
        if counter == highest and not retained:
            raise RepeatedError("a message that was taken already", rule="repeated")

    def take(self, topic: str, key_id: str, counter: int) -> None:
        """Remember that a message was taken."""
        if self._highest.get(topic) != (key_id, counter):
            self._highest[topic] = key_id, counter
            self._saved = False

    def save(self) -> None:
        """Write to the file what is new since the last time."""
        if not self._saved:
            self._saved = _store(self._path, self._highest)


def _store(path: Path, value: object) -> bool:
    """Replace a file; False when the disk is full, which stops no conversation: the next call tries again."""
    try:
        durable.write_scratch(path, [msgpack.packb(value)])
    except NoRoomError:
        return False
    return True


def _load(path: Path, kind: type[_T]) -> _T | None:
    if not path.exists():
        return None
    try:
        value = msgpack.unpackb(path.read_bytes(), strict_map_key=True)
    except (ValueError, msgpack.UnpackException):
        value = None
    if not isinstance(value, kind):
        log.warning("a file of counters is torn and counts as missing, as after a power loss", file=path.name)
        return None
    return value
