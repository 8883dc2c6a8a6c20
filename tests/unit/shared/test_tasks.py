"""A group's error is its cause: the one that a person can act on, unless there is a bug among them."""

from __future__ import annotations

import asyncio

import pytest

from shared.errors import ConfigError, UnavailableError
from shared.tasks import first_error
from tests.helpers import run_async


def test_nothing_wrong_is_nothing_raised() -> None:
    """The block's own value and exceptions that are no group are left alone."""
    with first_error():
        value = 1
    assert value == 1
    with pytest.raises(ZeroDivisionError), first_error():
        _ = 1 // 0


def test_the_one_error_of_a_group_is_raised_itself() -> None:
    """As it was, without the group around it as its context."""
    cause = ConfigError("wrong")
    with pytest.raises(ConfigError) as raised, first_error():
        raise ExceptionGroup("tasks", [cause])
    assert raised.value is cause
    assert raised.value.__suppress_context__


def test_the_first_of_several_is_raised_however_deep_it_lies() -> None:
    """Groups within groups are opened."""
    first = UnavailableError("disk")
    inner = ExceptionGroup("inner", [first, ConfigError("second")])
    with pytest.raises(UnavailableError) as raised, first_error():
        raise ExceptionGroup("outer", [inner, ConfigError("third")])
    assert raised.value is first


@pytest.mark.parametrize("others", [[], [ConfigError("wrong")]])
def test_a_bug_keeps_its_traceback(others: list[Exception]) -> None:
    """Something that is no error of ours is never hidden behind one that is."""
    with pytest.raises(ExceptionGroup) as raised, first_error():
        raise ExceptionGroup("tasks", [*others, ExceptionGroup("inner", [ZeroDivisionError()])])
    assert raised.group_contains(ZeroDivisionError)


def test_it_opens_the_groups_of_asyncio() -> None:
    """What a task group raises for its first failing task."""

    async def fail() -> None:
        raise UnavailableError("the disk is full")

    async def work() -> None:
        with first_error():
            async with asyncio.TaskGroup() as group:
                group.create_task(fail())
                group.create_task(asyncio.sleep(60))

    with pytest.raises(UnavailableError, match="the disk is full"):
        run_async(work())
