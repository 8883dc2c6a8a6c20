"""Counters: a sender's never repeats, a receiver's memory survives its process."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.errors import CorruptError, RefusedError
from shared.trust.replay import Counter, Heard, RepeatedError


def test_a_counter_rises_whatever_the_clock_does(tmp_path: Path) -> None:
    """Clocks that stand still or jump back, restarts of the process: every number is above the one before."""
    taken = []
    for clock in (5_000.0, 5_000.0, 4_000.0, 5_000.001):
        counter = Counter(tmp_path / "counter")
        taken += [counter.next(clock) for _ in range(3)]
    assert taken == sorted(set(taken))


def test_a_lost_file_costs_nothing_while_the_clock_is_right(tmp_path: Path) -> None:
    """The time itself is a lower bound."""
    first = Counter(tmp_path / "a").next(1_000.0)
    assert Counter(tmp_path / "b").next(1_001.0) > first


def test_the_counters_file_is_not_written_with_each_message(tmp_path: Path) -> None:
    """Ten seconds of messages need one write."""
    counter = Counter(tmp_path / "counter")
    counter.next(1_000.0)
    written = (tmp_path / "counter").stat().st_ino
    for tenth in range(99):
        counter.next(1_000.0 + tenth / 10)
    assert (tmp_path / "counter").stat().st_ino == written


def test_lower_is_replayed_and_equal_is_repeated(tmp_path: Path) -> None:
    """On a retained topic the last message may come again; other topics and other keys count on their own."""
    heard = Heard(tmp_path / "heard")
    heard.take("up", "k1", 10)
    with pytest.raises(RefusedError) as refused:
        heard.check("up", "k1", 9, retained=False)
    assert refused.value.rule == "replayed"
    with pytest.raises(RepeatedError):
        heard.check("up", "k1", 10, retained=False)
    heard.check("up", "k1", 10, retained=True)
    heard.check("up", "k1", 11, retained=False)
    heard.check("other", "k1", 1, retained=False)
    heard.check("up", "k2", 1, retained=False)


def test_the_memory_survives_the_process(tmp_path: Path) -> None:
    """What was saved is known to the next process; a file that is not ours is an error."""
    heard = Heard(tmp_path / "heard")
    heard.take("up", "k1", 10)
    heard.save()
    with pytest.raises(RefusedError):
        Heard(tmp_path / "heard").check("up", "k1", 9, retained=False)
    (tmp_path / "heard").write_bytes(b"\xc1")
    with pytest.raises(CorruptError):
        Heard(tmp_path / "heard")
