"""Counters: a sender's never repeats, a receiver's memory survives its process."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared import durable
from shared.errors import NoRoomError, RefusedError
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
    """What was saved is known to the next process."""
    heard = Heard(tmp_path / "heard")
    heard.take("up", "k1", 10)
    heard.save()
    with pytest.raises(RefusedError):
        Heard(tmp_path / "heard").check("up", "k1", 9, retained=False)


@pytest.mark.parametrize("left", [b"", b"\xcf\x00\x01", b"\xc1", bytes(9)])
def test_a_file_that_a_power_loss_tore_counts_as_missing(tmp_path: Path, left: bytes) -> None:
    """Empty, cut off or zeros: the next process starts all the same, and its numbers go on rising."""
    last = Counter(tmp_path / "counter").next(1_000.0)
    heard = Heard(tmp_path / "heard")
    heard.take("up", "k1", 10)
    heard.save()
    for name in ("counter", "heard"):
        (tmp_path / name).write_bytes(left)
    assert Counter(tmp_path / "counter").next(1_000.1) > last
    Heard(tmp_path / "heard").check("up", "k1", 9, retained=False)


def test_a_full_disk_stops_no_conversation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counters rise and repetitions are told without it; what could not be written is written when there is room."""
    counter, heard = Counter(tmp_path / "counter"), Heard(tmp_path / "heard")

    def full(*_args: object, **_options: object) -> None:
        raise NoRoomError("full", hint="make room")

    with monkeypatch.context() as disk:
        disk.setattr(durable, "write_scratch", full)
        first = counter.next(1_000.0)
        heard.take("up", "k1", 10)
        heard.save()
    assert not (tmp_path / "counter").exists()
    assert counter.next(1_000.0) > first
    heard.save()
    assert Counter(tmp_path / "counter").next(900.0) > first
    with pytest.raises(RepeatedError):
        Heard(tmp_path / "heard").check("up", "k1", 10, retained=False)
