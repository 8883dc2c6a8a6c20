"""Sites that go in step: each chunk once for all of them, at the pace of the slowest, and nobody held up for long."""

from __future__ import annotations

import random
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.decisions import Serve
from coordinator.downlink import Downlink
from shared.transfer import Bitmap
from tests.unit.coordinator.downlinks import FRAMES, MERGE_S, A, make_downlink, tick, want

TEN = "abcdefghij"
"""Enough that one who hears them in vain is borne."""


def _together(sites: str, *, window: int = 4, present: str = "") -> Downlink:
    """These sites were sent their first window, all at once."""
    downlink = make_downlink(window)
    for site in sites:
        want(downlink, site, window=window, present=present or sites)
    tick(downlink, MERGE_S, present or sites)
    return downlink


def test_each_chunk_goes_once_to_all_of_them() -> None:
    """To the end of the transfer, and not in the first window only."""
    downlink = _together("xy")
    for held, following in ((2, (4, 5)), (4, (6, 7))):
        assert want(downlink, "x", *range(held), present="xy") == []
        assert want(downlink, "y", *range(held), present="xy") == [Serve(A, None, following)]
    assert want(downlink, "x", *range(6), present="xy") == []
    assert want(downlink, "x", *range(FRAMES), present="xy") == []
    assert want(downlink, "y", *range(FRAMES), present="xy") == []


def test_they_go_at_the_pace_of_the_slowest() -> None:
    """One that has room for four is sent the two that the other has room for, and two when that one goes on."""
    downlink = _together("xy")
    assert want(downlink, "x", 0, 1, 2, 3, present="xy") == []
    assert want(downlink, "y", 0, 1, present="xy") == [Serve(A, None, (4, 5))]
    assert want(downlink, "y", 0, 1, 2, 3, present="xy") == [Serve(A, None, (6, 7))]


def test_a_few_chunks_are_no_reason_to_move() -> None:
    """Half a window is: who acknowledges each chunk alone does not make everybody's steps small."""
    downlink = _together("xy")
    assert want(downlink, "x", 0, 1, 2, 3, present="xy") == []
    assert want(downlink, "y", 0, present="xy") == []
    assert want(downlink, "y", 0, 1, present="xy") == [Serve(A, None, (4, 5))]


def test_the_last_chunks_need_no_half_window() -> None:
    """Whoever has room for all that it still lacks is ready."""
    downlink = make_downlink(4)
    for site in "xy":
        want(downlink, site, 0, 1, 2, present="xy")
    assert want(downlink, "x", *range(4), present="xy") == []
    assert want(downlink, "y", *range(4), present="xy") == [Serve(A, None, (7,))]


def test_who_lets_the_others_wait_is_left_behind_and_may_catch_up() -> None:
    """Ten go on without the eleventh; what it missed it is sent alone, and then it is one of them again."""
    everybody = TEN + "k"
    downlink = _together(everybody, window=2)
    for site in TEN:
        assert want(downlink, site, 0, 1, window=2, present=everybody, now=1.0) == []
    assert tick(downlink, 1.0 + MERGE_S - 0.01, everybody) == []
    assert tick(downlink, 1.0 + MERGE_S, everybody) == [Serve(A, None, (2, 3))]
    assert want(downlink, "k", 0, 1, window=2, present=everybody, now=2.0) == [Serve(A, "k", (2, 3))]
    for site in TEN:
        assert want(downlink, site, 0, 1, 2, 3, window=2, present=everybody, now=3.0) == []
    assert want(downlink, "k", 0, 1, 2, 3, window=2, present=everybody, now=3.1) == [Serve(A, None, (4, 5))]


def test_where_one_is_missing_too_much_each_goes_alone() -> None:
    """One of two is silent: the other is sent what it lacks, and from then on whenever it wants."""
    downlink = _together("xy")
    assert want(downlink, "x", 0, 1, present="xy", now=1.0) == []
    assert tick(downlink, 1.0 + MERGE_S, "xy") == [Serve(A, "x", (4, 5))]
    assert want(downlink, "y", 0, 1, present="xy", now=2.0) == [Serve(A, "y", (4, 5))]
    assert want(downlink, "x", 0, 1, 2, present="xy", now=2.0) == [Serve(A, "x", (6,))]


@pytest.mark.parametrize("way", ["away", "through"])
def test_nobody_waits_for_one_that_pulls_no_more(way: str) -> None:
    """It left, or had the rest already; the next tick lets the others go."""
    downlink = _together("xy")
    want(downlink, "x", 0, 1, present="xy")
    if way == "away":
        downlink.site_gone("y")
    else:
        want(downlink, "y", *range(FRAMES), present="xy")
    assert tick(downlink, MERGE_S, "xy") == [Serve(A, "x", (4, 5))]


def test_what_one_link_lost_is_sent_again_to_that_one_at_once() -> None:
    """Nobody is waited for, and what goes to all comes after it."""
    downlink = _together("xy")
    assert want(downlink, "x", 1, 2, 3, present="xy") == [Serve(A, "x", (0,))]
    assert want(downlink, "y", 0, 1, present="xy") == [Serve(A, None, (4, 5))]


def test_a_newcomer_does_not_wait_and_holds_nobody_up() -> None:
    """It is sent what the others have had, alone; they go on without it."""
    everybody = TEN + "k"
    downlink = _together(TEN, present=everybody)
    jobs = [want(downlink, site, 0, 1, present=everybody) for site in TEN]
    assert jobs[-1] == [Serve(A, None, (4, 5))]
    assert want(downlink, "k", present=everybody) == [Serve(A, "k", (0, 1, 2, 3))]
    jobs = [want(downlink, site, 0, 1, 2, 3, present=everybody) for site in TEN]
    assert jobs == [[]] * 9 + [[Serve(A, None, (6, 7))]]


def test_one_that_came_with_most_of_it_goes_on_alone() -> None:
    """Further on than the others by more than a window, it does not wait until they are there."""
    everybody, downlink = TEN + "k", make_downlink(1)
    for site in TEN:
        want(downlink, site, window=1, present=everybody)
    want(downlink, "k", *range(5), window=1, present=everybody)
    assert want(downlink, "k", *range(6), window=1, present=everybody) == [Serve(A, "k", (6,))]
    for site in TEN[:-1]:
        assert want(downlink, site, 0, window=1, present=everybody) == []
    assert want(downlink, TEN[-1], 0, window=1, present=everybody) == [Serve(A, None, (1,))]


def test_a_restart_is_answered_at_once() -> None:
    """Whatever was in flight to it is sent again to it alone; then it is where the others are."""
    downlink = _together("xy")
    assert want(downlink, "x", 0, 1, present="xy") == []
    assert want(downlink, "y", restart=True, present="xy") == [Serve(A, "y", (0, 1, 2, 3))]
    assert want(downlink, "y", 0, 1, present="xy") == [Serve(A, None, (4, 5))]


class _Site:
    """Takes what comes, loses some of it, acknowledges every few chunks, and asks anew when nothing comes."""

    def __init__(self, rng: random.Random, window: int) -> None:
        self.window = window
        self.coming: deque[int] = deque()
        self.have = Bitmap(FRAMES)
        self.loss = rng.choice([0.0, 0.0, 0.2])
        self.share = rng.choice([0.1, 1.0, 1.0])
        """Of the turns in which it takes a chunk."""
        self._rng = rng
        self._fresh = 0
        self._quiet = 0

    def turn(self) -> bool | None:
        """One chunk, or none; whether to want, with or without a restart."""
        self._quiet += 1
        if self.coming and self._rng.random() < self.share:
            index, self._quiet = self.coming.popleft(), 0
            if self._rng.random() >= self.loss:
                self._fresh += self.have.add(index)
        if self.have.full or self._fresh >= max(1, self.window // 2):
            self._fresh = 0
            return False
        if self._quiet > 40:
            self._quiet = 0
            return True
        return None


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 1 << 30), st.integers(2, 12))
def test_everybody_gets_everything(seed: int, count: int) -> None:
    """Whatever is lost and whoever is slow: no site waits for ever, and none has more in flight than its window."""
    rng = random.Random(seed)
    window = rng.choice([1, 2, 4])
    downlink, now, present = make_downlink(window), 0.0, "".join(chr(97 + at) for at in range(count))
    sites = {name: _Site(rng, rng.choice([window, window, 1])) for name in present}

    def deliver(jobs: list[Serve]) -> None:
        for job in jobs:
            for name, site in sites.items():
                if job.site in {None, name}:
                    site.coming.extend(job.indices)

    for name, site in sites.items():
        deliver(want(downlink, name, window=site.window, present=present))
    for _ in range(4_000):
        now += 0.05
        deliver(tick(downlink, now, present))
        for name, site in sites.items():
            restart = site.turn() if name in downlink.active else None
            if restart is not None:
                if restart:
                    site.coming.clear()
                held = [index for index in range(FRAMES) if index in site.have]
                deliver(want(downlink, name, *held, window=site.window, present=present, restart=restart, now=now))
                pull = downlink._pulls.get(name)
                assert pull is None or pull.sender.in_flight <= site.window
        if not downlink.active:
            break
    assert not downlink.active
    assert all(site.have.full for site in sites.values())
    assert not downlink._convoys
