"""Events that are decided together, and where a batch ends."""

from __future__ import annotations

import asyncio

from coordinator import decisions as d
from coordinator.batching import EVENTS_AT_ONCE, decided
from coordinator.records import Finished, Record
from tests.unit.coordinator.test_records import SAMPLES

SHORT: d.Event = d.Tick()
MERGED: d.Event = d.LinkUp()


def handle(event: d.Event) -> d.Decision:
    """One event leads to a version, another to some other row."""
    record: Record = SAMPLES["committed"] if event is MERGED else Finished(1, 2.0)
    return d.Decision(records=[record])


def queue_of(*events: d.Event) -> asyncio.Queue[d.Event]:
    """Events that wait."""
    waiting: asyncio.Queue[d.Event] = asyncio.Queue()
    for event in events:
        waiting.put_nowait(event)
    return waiting


def test_who_waits_is_decided_in_order() -> None:
    """All that have come, the oldest first."""
    events = [d.Tick() for _ in range(5)]
    waiting = queue_of(*events[1:])
    found = decided(handle, events[0], waiting)
    assert all(one is two for (one, _), two in zip(found, events, strict=True))
    assert waiting.empty()


def test_a_version_ends_a_batch() -> None:
    """What comes behind it waits for the signature of its head."""
    waiting = queue_of(SHORT, MERGED, SHORT, SHORT)
    assert [event for event, _ in decided(handle, SHORT, waiting)] == [SHORT, SHORT, MERGED]
    assert waiting.qsize() == 2
    assert [event for event, _ in decided(handle, MERGED, waiting)] == [MERGED]


def test_a_crowd_is_taken_in_parts() -> None:
    """The first of them does not wait for all."""
    waiting = queue_of(*[SHORT] * EVENTS_AT_ONCE)
    assert len(decided(handle, SHORT, waiting)) == EVENTS_AT_ONCE
    assert waiting.qsize() == 1
