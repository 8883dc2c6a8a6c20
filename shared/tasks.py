"""Task groups whose error is the error: what a person must read is the cause, not that a group of tasks had one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from shared.errors import MailboatError


@contextmanager
def first_error() -> Iterator[None]:
    """Raise, in the place of a group, the first MailboatError in it; a group without one passes, bugs and all."""
    try:
        yield
    except BaseExceptionGroup as group:
        found = group.subgroup(MailboatError)
        if found is None or group.subgroup(lambda error: not isinstance(error, MailboatError | BaseExceptionGroup)):
            raise
        raise _leaf(found) from None


def _leaf(group: BaseExceptionGroup[MailboatError]) -> MailboatError:
    first = group.exceptions[0]
    return _leaf(first) if isinstance(first, BaseExceptionGroup) else first
