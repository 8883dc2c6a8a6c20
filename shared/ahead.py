"""One step of a pipeline in a thread of its own."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TypeVar

T = TypeVar("T")


def ahead(items: Iterable[T]) -> Generator[T, None, None]:
    """Yield `items` in their order, the next of which is made in a thread while the consumer works on this one.

    Hashing, compressing, arithmetic on arrays and the disk leave the interpreter's lock alone, so that two cores share
    the work. An error comes out in the place of the item that it prevented. At most one item waits. Who stops early
    closes the generator: that returns when the item under way is made, and closes the source as well.
    """
    with closing(_wrapped(items)) as source, ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, source, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, source, None)
            yield item[0]


def _wrapped(items: Iterable[T]) -> Generator[tuple[T], None, None]:
    """In tuples, so that the end can be told from any item."""
    try:
        for item in items:
            yield (item,)
    finally:
        if isinstance(items, Generator):
            items.close()
