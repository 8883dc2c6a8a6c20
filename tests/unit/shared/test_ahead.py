from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from shared.ahead import ahead


def test_items_come_in_their_order_whatever_they_are() -> None:
    """None is an item, and an empty source gives none."""
    assert list(ahead([3, None, 1, None])) == [3, None, 1, None]
    assert list(ahead([])) == []


def test_the_next_item_is_made_meanwhile_and_no_more_than_that() -> None:
    """While the consumer holds an item the one behind it is made, in another thread, and a third is not begun."""
    begun = [threading.Event() for _ in range(4)]
    threads = set()

    def source() -> Iterator[int]:
        for number, event in enumerate(begun):
            threads.add(threading.get_ident())
            event.set()
            yield number

    items = ahead(source())
    assert next(items) == 0
    assert begun[1].wait(5)
    assert not begun[2].wait(0.05)
    assert list(items) == [1, 2, 3]
    assert threads.isdisjoint({threading.get_ident()})


def test_an_error_comes_in_the_place_of_its_item() -> None:
    """What was made before it is had first."""

    def source() -> Iterator[int]:
        yield 1
        raise KeyError("two")

    items = ahead(source())
    assert next(items) == 1
    with pytest.raises(KeyError, match="two"):
        next(items)


def test_who_stops_early_closes_the_source() -> None:
    """The item under way is made, the source's own clean-up runs, and no thread stays."""
    before = threading.active_count()
    closed = []

    def source() -> Iterator[int]:
        try:
            yield from range(10)
        finally:
            closed.append(True)

    named = source()
    items = ahead(named)
    assert next(items) == 0
    items.close()
    assert closed == [True]
    assert threading.active_count() <= before
