"""The heads of the coordinator's audit chain that this site was told, kept as its proof: `receipts/heads.jsonl`.

One JSON line each: version, row, hash and the coordinator's signature, in the order in which they came. A later head of
an earlier row, or another hash for the same row, is refused and not kept: the coordinator has changed its history, or
was put back from a backup, and what this site saw stays what it saw.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import structlog

from shared import durable
from shared.errors import NoRoomError, RefusedError
from shared.messages import Head
from shared.trust.witness import HEADS, head_line, parse_head

log = structlog.get_logger("site")


class Heads:
    """The file of one site; `last` is the newest head, None before the first."""

    def __init__(self, storage: Path) -> None:
        """CorruptError when the file is not what was written."""
        self._path = storage / "receipts" / HEADS
        self.last: Head | None = None
        durable.make_folder(self._path.parent)
        if self._path.exists():
            # A line that a crash cut short was never counted on; what follows it begins a new one.
            *lines, torn = self._path.read_bytes().split(b"\n")
            if torn:
                durable.replace_atomic(self._path, b"".join(line + b"\n" for line in lines))
            self.last = parse_head(lines[-1], str(self._path)) if lines else None

    def take(self, head: Head, check: Callable[[Head], None]) -> None:
        """Keep a head that `check` does not refuse; what is refused, and a full disk, are told in the log."""
        try:
            check(head)
            self.keep(head)
        except RefusedError as error:
            log.warning("the coordinator tells another history than before", rule=error.rule, reason=error.message)
        except NoRoomError as error:
            log.warning("did not keep a head of the audit chain", reason=error.message)

    def keep(self, head: Head) -> None:
        """Write a newer head down, durably; one that came before changes nothing.

        RefusedError with rule 'head-went-back' or 'head-differs' when it does not continue what this site has seen.
        """
        last = self.last
        if last is not None and head.seq == last.seq and head.head == last.head:
            return
        if last is not None and head.seq <= last.seq:
            rule = "head-differs" if head.seq == last.seq else "head-went-back"
            raise RefusedError(f"it signed row {last.seq} with hash {last.head} before, now row {head.seq}", rule=rule)
        durable.append(self._path, head_line(head))
        self.last = head
