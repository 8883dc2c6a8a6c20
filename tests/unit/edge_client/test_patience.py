"""The one timer of a site: due after a stall, then ever later, until something moves."""

from __future__ import annotations

from edge_client.patience import Patience


def test_each_wait_is_twice_the_one_before_up_to_the_cap() -> None:
    """5 s, then 10, then 15 for ever: a dead peer is asked ever less often."""
    patience = Patience(5.0, 15.0)
    patience.moved(100.0)
    asked: list[float] = []
    now = 100.0
    while len(asked) < 5:
        now += 0.25
        if patience.spent(now):
            asked.append(now)
    assert asked == [105.0, 115.0, 130.0, 145.0, 160.0]


def test_progress_starts_the_wait_anew() -> None:
    """Also the doubling is forgotten as soon as something moves."""
    patience = Patience(5.0, 15.0)
    patience.moved(0.0)
    assert patience.spent(5.0)
    assert patience.spent(15.0)
    patience.moved(20.0)
    assert not patience.spent(24.9)
    assert patience.spent(25.0)
    assert not patience.spent(34.9)
    assert patience.spent(35.0)


def test_it_asks_once_per_wait() -> None:
    """What was due is asked for once, not at every tick."""
    patience = Patience(5.0, 15.0)
    patience.moved(0.0)
    assert patience.spent(5.0)
    assert not patience.spent(5.0)


def test_told_to_come_back_later() -> None:
    """The peer's own time counts, shorter or longer than the stall."""
    patience = Patience(5.0, 15.0)
    patience.moved(0.0)
    patience.wait(0.0, 60.0)
    assert not patience.spent(59.9)
    assert patience.spent(60.0)
    patience.wait(60.0, 1.0)
    assert patience.spent(61.0)


def test_a_timer_that_was_never_started_is_due() -> None:
    """Nothing has moved yet; the first question is asked at once, the next after a stall."""
    patience = Patience(5.0, 15.0)
    assert patience.spent(0.0)
    assert not patience.spent(4.9)
    assert patience.spent(5.0)
