"""Sites that go in step: each chunk once for all of them, at the pace of the slowest, and nobody held up for long."""

from __future__ import annotations

import random
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.decisions import Decision, Serve
from coordinator.downlink import Downlink
from shared.messages import Want
from shared.transfer import Bitmap
from tests.factories import make_state
from tests.unit.coordinator.downlinks import FRAMES, MERGE_S, PLAN, A, make_downlink, served, tick, want

MANY = 40
"""Chunks of a state of many windows."""


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


def test_when_one_lets_the_others_wait_each_goes_alone() -> None:
    """Eleven are ready and one is silent: what goes to everybody would queue up for a link that is slow already."""
    everybody = "abcdefghijkl"
    downlink = _together(everybody, window=2)
    for site in everybody[:-1]:
        assert want(downlink, site, 0, 1, window=2, present=everybody, now=1.0) == []
    assert tick(downlink, 1.0 + MERGE_S - 0.01, everybody) == []
    assert tick(downlink, 1.0 + MERGE_S, everybody) == [Serve(A, site, (2, 3)) for site in everybody[:-1]]
    assert want(downlink, "l", 0, 1, window=2, present=everybody, now=2.0) == [Serve(A, "l", (2, 3))]
    assert want(downlink, "a", 0, 1, 2, window=2, present=everybody, now=2.0) == [Serve(A, "a", (4,))]


@pytest.mark.parametrize("way", ["away", "through"])
def test_nobody_waits_for_one_that_pulls_no_more(way: str) -> None:
    """It left, or had the rest already. Whoever has it hears everything in vain; whoever left hears nothing."""
    downlink, here = _together("xyz"), "xyz" if way == "through" else "xy"
    want(downlink, "x", 0, 1, present="xyz")
    want(downlink, "y", 0, 1, present="xyz")
    if way == "away":
        downlink.site_gone("z")
    else:
        want(downlink, "z", *range(FRAMES), present="xyz")
    alone = [Serve(A, "x", (4, 5)), Serve(A, "y", (4, 5))]
    assert tick(downlink, MERGE_S, here) == ([Serve(A, None, (4, 5))] if way == "away" else alone)


def test_what_one_link_lost_is_sent_again_to_that_one_at_once() -> None:
    """Nobody is waited for, and what goes to all comes after it."""
    downlink = _together("xy")
    assert want(downlink, "x", 1, 2, 3, present="xy") == [Serve(A, "x", (0,))]
    assert want(downlink, "y", 0, 1, present="xy") == [Serve(A, None, (4, 5))]


def test_a_newcomer_joins_or_ends_it() -> None:
    """Where all that the others have had fits its window it is one of them; else each goes alone, it at once."""
    downlink = _together("xy")
    assert want(downlink, "x", 0, 1, present="xy") == []
    assert want(downlink, "z", present="xyz") == [Serve(A, "z", (0, 1, 2, 3))]
    assert want(downlink, "y", 0, 1, present="xyz") == []
    assert want(downlink, "z", 0, 1, present="xyz") == [Serve(A, None, (4, 5))]

    downlink = _together("xy")
    want(downlink, "x", 0, 1, present="xy")
    want(downlink, "y", 0, 1, present="xy")
    assert want(downlink, "x", *range(4), present="xyz") == [Serve(A, "x", (6, 7))]  # z is here, and hears it in vain
    assert want(downlink, "y", *range(4), present="xyz") == [Serve(A, "y", (6, 7))]

    downlink = _together("xy")
    want(downlink, "x", 0, 1, present="xy")
    want(downlink, "y", 0, 1, present="xy")
    want(downlink, "x", *range(4), present="xy")
    assert want(downlink, "z", present="xyz") == [Serve(A, "z", (0, 1, 2, 3)), Serve(A, "x", (6, 7))]


def test_one_that_came_with_most_of_it_ends_it() -> None:
    """Further on than the others by more than a window, it would hear in vain what they lack."""
    downlink = make_downlink(1)
    want(downlink, "x", window=1, present="xyz")
    want(downlink, "y", window=1, present="xyz")
    assert want(downlink, "z", *range(5), window=1, present="xyz") == [
        Serve(A, "x", (0,)),
        Serve(A, "y", (0,)),
        Serve(A, "z", (5,)),
    ]
    assert want(downlink, "z", *range(6), window=1, present="xyz") == [Serve(A, "z", (6,))]
    assert want(downlink, "x", 0, window=1, present="xyz") == [Serve(A, "x", (1,))]


def test_one_that_holds_parts_of_what_follows_ends_it() -> None:
    """Ten would be sent on the topic for all what it holds, in front of which nothing counts for it."""
    everybody, downlink = "abcdefghijk", make_downlink(2)
    for site in everybody[:-1]:
        want(downlink, site, window=2, present=everybody)
    assert want(downlink, "k", 4, 6, window=2, present=everybody) == [Serve(A, None, (0, 1))]
    assert want(downlink, "k", 0, 1, 4, 6, window=2, present=everybody) == [Serve(A, "k", (2, 3))]
    assert want(downlink, "a", 0, 1, window=2, present=everybody) == [Serve(A, "a", (2, 3))]


def test_the_same_may_be_pulled_together_again() -> None:
    """Nothing of a convoy that came to its end is left for the next one."""
    downlink = _together("xy")
    for site in "xy":
        want(downlink, site, *range(FRAMES), present="xy")
    for site in "xy":
        again = want(downlink, site, present="xy", now=9.0)
    assert again == [Serve(A, None, (0, 1, 2, 3))]


def test_a_restart_is_answered_at_once() -> None:
    """Whatever was in flight to it is sent again to it alone; then it is where the others are."""
    downlink = _together("xy")
    assert want(downlink, "x", 0, 1, present="xy") == []
    assert want(downlink, "y", restart=True, present="xy") == [Serve(A, "y", (0, 1, 2, 3))]
    assert want(downlink, "y", 0, 1, present="xy") == [Serve(A, None, (4, 5))]


class _Site:
    """Takes what comes, loses some of it, acknowledges every few chunks, and asks anew when nothing comes."""

    def __init__(self, rng: random.Random, window: int, loss: float) -> None:
        self.window = window
        self.coming: deque[int] = deque()
        self.have = Bitmap(MANY)
        self.came = 0
        self._loss = loss
        self._share = rng.choice([0.1, 1.0, 1.0])
        """Of the turns in which it takes a chunk."""
        self._rng = rng
        self._fresh = 0
        self._quiet = 0

    def turn(self) -> bool | None:
        """One chunk, or none; whether to want, with or without a restart."""
        self._quiet += 1
        if self.coming and self._rng.random() < self._share:
            index, self._quiet = self.coming.popleft(), 0
            self.came += 1
            if self._rng.random() >= self._loss:
                self._fresh += self.have.add(index)
        if self.have.full or self._fresh >= max(1, self.window // 2):
            self._fresh = 0
            return False
        if self._quiet > 100:
            self._quiet = 0
            return True
        return None


class _World:
    """Sites that pull one state of many chunks, each in its own way."""

    def __init__(self, rng: random.Random, count: int, loss: float, *, leaves: bool) -> None:
        self.window = rng.choice([1, 2, 4])
        self.downlink = make_downlink(self.window)
        self.sites = {chr(97 + at): _Site(rng, self.window, loss) for at in range(count)}
        self.restarted = False
        self._state = make_state(PLAN, 0, frames=MANY)
        self._begins = {name: rng.choice([0, 0, 0, 0, 5, 60]) for name in self.sites}
        self._ends = dict.fromkeys(list(self.sites)[: leaves and count // 3], 90)
        self._now = 0.0

    def turn(self, turn: int) -> bool:
        """A twentieth of a second; whether nobody pulls any more."""
        self._now += 0.05
        present = frozenset(name for name in self.sites if self._begins[name] <= turn < self._ends.get(name, 1 << 30))
        out = Decision()
        self.downlink.tick(present, self._now, out)
        self._deliver(out, present)
        for name in self.downlink.active - present:
            self.downlink.site_gone(name)
        for name in sorted(present):
            if turn == self._begins[name]:
                self._want(name, present, restart=True)
            elif name in self.downlink.active:
                self._go_on(name, present)
            assert len(self.sites[name].coming) <= 2 * self.window, "its own, and the first one of all others"
        return turn > max(self._begins.values()) and not self.downlink.active

    def stayed(self) -> list[_Site]:
        """Those who did not leave."""
        return [site for name, site in self.sites.items() if name not in self._ends]

    def _go_on(self, name: str, present: frozenset[str]) -> None:
        restart = self.sites[name].turn()
        if restart:
            self.restarted = True
            self.sites[name].coming.clear()
        if restart is not None:
            self._want(name, present, restart=restart)

    def _want(self, name: str, present: frozenset[str], *, restart: bool) -> None:
        out, have = Decision(), self.sites[name].have.to_bytes()
        message = Want(transfer_id=self._state.transfer_id, have=have, window=self.window, restart=restart)
        self.downlink.want(name, message, self._state, present, self._now, out)
        self._deliver(out, present)

    def _deliver(self, out: Decision, present: frozenset[str]) -> None:
        for job in served(out):
            for name in present:
                if job.site in {None, name}:
                    self.sites[name].coming.extend(job.indices)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 1 << 30), st.integers(2, 12), st.sampled_from([0.0, 0.2]), st.booleans())
def test_everybody_gets_everything(seed: int, count: int, loss: float, leaves: bool) -> None:
    """Whatever is lost, whoever is slow, comes later or leaves: no site waits for ever.

    No more is on its way to one than windows admit; where nothing is lost and nobody asks anew, each chunk comes once.
    """
    world = _World(random.Random(seed), count, loss, leaves=leaves)
    for turn in range(6_000):
        if world.turn(turn):
            break
    assert not world.downlink.active
    assert all(site.have.full for site in world.stayed())
    assert not world.downlink._convoys
    if not loss and not world.restarted:
        assert max((site.came for site in world.stayed()), default=MANY) <= MANY + world.window
