"""Commit points by name, for tests that kill a process exactly there; inert in every other process.

`MAILBOAT_DIE_AT=<point>:<n>` in the environment, read once when the process starts, makes the n-th passage of that
point (from 1) end the process by SIGKILL: nothing is flushed, no clean-up runs. Without it `passing` compares one
variable with None and returns.

A pair `<step>.before`, `<step>.after` stands around each step that makes something durable, makes it final, or tells
it to the other side; `<step>.middle` stands where a step is two, and a crash between them has to be told apart.
"""

from __future__ import annotations

import os
import signal
import threading

from shared.errors import ConfigError

VARIABLE = "MAILBOAT_DIE_AT"

BOTH = (
    "spool-open.middle",
    "spool-open.after",
    "chunks-sync.before",
    "chunks-sync.after",
    "transfer-whole.before",
    "transfer-whole.after",
    "seal.before",
    "seal.middle",
    "seal.after",
    "delete.before",
    "delete.middle",
    "delete.after",
    "send-want.before",
    "send-want.after",
)
"""Steps of `shared`, which coordinator and sites take alike."""

COORDINATOR = (
    *(
        f"journal-{kind}.{side}"
        for kind in ("accepted", "rejected", "committed", "finished")
        for side in ("before", "after")
    ),
    "audit.after",
    "master.before",
    "master.after",
    "prune.after",
    "send-welcome.after",
    "send-announce.before",
    "send-announce.after",
    "send-receipt.before",
    "send-receipt.after",
)

SITE = (
    "train.after",
    "settle.before",
    "settle.middle",
    "settle.after",
    "send-hello.after",
    "send-offer.before",
    "send-offer.after",
)


class _Fuse:
    """Counts the passages of one point, from any thread, and dies at the last."""

    def __init__(self, point: str, passages: int) -> None:
        self.point = point
        self._left = passages
        self._lock = threading.Lock()

    def burn(self) -> None:
        """One passage."""
        with self._lock:
            self._left -= 1
            if self._left == 0:
                os.kill(os.getpid(), signal.SIGKILL)


def parse(text: str | None) -> _Fuse | None:
    """The fuse that a value of the variable asks for; ConfigError when it names no point, or no passage of it."""
    if not text:
        return None
    point, _, passages = text.rpartition(":")
    if point not in {*BOTH, *COORDINATOR, *SITE} or not passages.isdecimal() or int(passages) < 1:
        raise ConfigError(f"{VARIABLE}={text} names no commit point and passage", hint="unset it: it is for tests")
    return _Fuse(point, int(passages))


_fuse = parse(os.environ.get(VARIABLE))


def passing(point: str) -> None:
    """Stand at a commit point; see the module's docstring."""
    if _fuse is not None and _fuse.point == point:
        _fuse.burn()
