"""Group commit: what follows from events that wait behind one another is made durable by one sync.

Nothing is said or begun before that, so an event is decided by what the ones before it have led to, as ever, and a
crash loses them together, none of which anybody has heard of.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from coordinator import decisions as d
from coordinator.records import Record, VersionCommitted

EVENTS_AT_ONCE = 64
"""So that who waits for the first of them does not wait for a crowd."""


def decided(
    handle: Callable[[d.Event], d.Decision], event: d.Event, waiting: asyncio.Queue[d.Event]
) -> list[tuple[d.Event, d.Decision]]:
    """Return what `handle` makes of an event and of those that wait behind it, in order.

    A version is the last: no row may come between its own and the signature over its head.
    """
    found = [(event, handle(event))]
    while not (commits(found[-1][1].records) or len(found) == EVENTS_AT_ONCE or waiting.empty()):
        event = waiting.get_nowait()
        found.append((event, handle(event)))
    return found


def commits(records: Iterable[Record]) -> bool:
    """Whether there is a version among them."""
    return any(isinstance(record, VersionCommitted) for record in records)
