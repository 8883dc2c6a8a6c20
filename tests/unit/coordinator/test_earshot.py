"""Who is muted, for how long, and what is subscribed to meanwhile."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import pytest

from coordinator import earshot as earshot_module
from coordinator.earshot import (
    BURST_BYTES,
    MESSAGE_COST_BYTES,
    MUTE_MAX_S,
    MUTE_S,
    REFILL_BYTES_S,
    RELAPSE_BYTES,
    Earshot,
    Nuisance,
    topics_heard,
)
from coordinator.intake import Intake
from shared.config import AdmissionSection
from shared.messages import Chunk
from shared.topics import subscriptions
from tests.helpers import run_async

CHUNK = 1024 * 1024
EVERYBODY = tuple(subscriptions("ward", "coordinator"))
MEMBERS = frozenset({"north", "south", "west"})
NOW = 1000.0


def _flood(nuisance: Nuisance, site: str, now: float, size: int = CHUNK) -> tuple[int, float]:
    """Charge until muted; returns how many messages that took, and for how long it is."""
    for count in range(1, 100_000):
        if seconds := nuisance.charge(site, size, now):
            return count, seconds
    raise AssertionError("never muted")


def test_a_burst_is_borne_and_one_more_is_not() -> None:
    """As many bytes as the bound says; the next message mutes its site, and nobody else."""
    nuisance = Nuisance()
    count, seconds = _flood(nuisance, "north", 5.0)
    assert count == BURST_BYTES // (CHUNK + MESSAGE_COST_BYTES) + 1
    assert seconds == MUTE_S
    assert nuisance.charge("south", CHUNK, 5.0) == 0.0
    assert nuisance.muted(5.0) == {"north"}


def test_many_small_messages_are_a_flood_too() -> None:
    """An empty message has its price."""
    count, _seconds = _flood(Nuisance(), "north", 5.0, size=0)
    assert count == BURST_BYTES // MESSAGE_COST_BYTES + 1


def test_what_comes_slowly_is_never_one() -> None:
    """Unwanted bytes at the rate of the refill, for an hour."""
    nuisance = Nuisance()
    every_s = (CHUNK + MESSAGE_COST_BYTES) / REFILL_BYTES_S
    assert not any(nuisance.charge("north", CHUNK, number * every_s) for number in range(int(3600 / every_s)))


def test_what_the_broker_still_held_does_not_count() -> None:
    """Messages that come in while muted change nothing, however many."""
    nuisance = Nuisance()
    _flood(nuisance, "north", 0.0)
    assert not any(nuisance.charge("north", CHUNK, 1.0) for _ in range(1000))
    assert nuisance.muted(MUTE_S - 0.1) == {"north"}
    assert nuisance.muted(MUTE_S) == frozenset()


def test_who_goes_on_is_muted_for_longer_up_to_a_bound_and_forgiven_in_time() -> None:
    """Each time sooner than the first and for twice as long; after as long without a flood, all as the first time."""
    nuisance, now, terms, counts = Nuisance(), 0.0, [], []
    for _ in range(8):
        count, seconds = _flood(nuisance, "north", now)
        counts.append(count)
        terms.append(seconds)
        now += seconds
    assert terms == [min(MUTE_S * 2**power, MUTE_MAX_S) for power in range(8)]
    assert counts[1:] == [RELAPSE_BYTES // (CHUNK + MESSAGE_COST_BYTES) + 1] * 7
    assert _flood(nuisance, "north", now + terms[-1]) == (counts[0], MUTE_S)


@pytest.mark.parametrize(
    ("members", "muted"),
    [(None, {"north"}), (MEMBERS, set()), (MEMBERS, {"nobody"})],
    ids=["without a roster", "nobody muted", "no member muted"],
)
def test_everybody_is_heard(members: frozenset[str] | None, muted: set[str]) -> None:
    """One subscription for all sites of each channel."""
    assert topics_heard("ward", members, frozenset(muted)) == EVERYBODY


def test_the_others_are_heard_one_by_one() -> None:
    """Each channel of each other member, and nothing of the muted one."""
    heard = topics_heard("ward", MEMBERS, frozenset({"south"}))
    assert heard == tuple(topic for site in ("north", "west") for topic in subscriptions("ward", "coordinator", site))


@pytest.fixture
def no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the machine, no allowance is refilled meanwhile."""
    monkeypatch.setattr(earshot_module, "time", SimpleNamespace(monotonic=lambda: NOW))


class _Link:
    """Notes what is subscribed to."""

    def __init__(self) -> None:
        self.topics: tuple[str, ...] = ()
        self.changed = asyncio.Event()

    async def follow(self, topics: tuple[str, ...]) -> None:
        """As `Link.follow`."""
        if topics != self.topics:
            self.topics = topics
            self.changed.set()


def test_a_muted_member_is_not_heard_and_away(no_time: None) -> None:
    """What the broker still held of it is dropped, and the core is told that it is gone, so that no round waits."""

    async def run() -> None:
        link: Any = _Link()
        away: list[str] = []
        earshot = Earshot(link, "ward", lambda: MEMBERS, Intake(AdmissionSection()), away.append)
        running = asyncio.create_task(earshot.run())
        await link.changed.wait()
        assert (link.topics, away, earshot.hears("north", 100)) == (EVERYBODY, [], True)
        link.changed.clear()
        for _ in range(BURST_BYTES // CHUNK + 1):
            earshot.unwanted("north", CHUNK)
        await asyncio.wait_for(link.changed.wait(), 5)
        assert link.topics == topics_heard("ward", MEMBERS, frozenset({"north"}))
        assert set(away) == {"north"}
        assert not earshot.hears("north", 100)
        assert earshot.hears("south", 100)
        running.cancel()

    run_async(run())


def test_what_is_dropped_unread_has_its_size(no_time: None) -> None:
    """Beyond the rate of control messages each one counts with all of its bytes, as chunks do."""
    link: Any = _Link()
    earshot = Earshot(link, "ward", lambda: MEMBERS, Intake(AdmissionSection(messages_per_s=1.0)), lambda _site: None)
    counts = 0
    while not earshot._nuisance.muted(NOW):
        counts += not earshot.hears("north", CHUNK)
    assert counts == BURST_BYTES // (CHUNK + MESSAGE_COST_BYTES) + 1


def test_an_upload_that_was_granted_is_no_cover_for_a_flood(no_time: None) -> None:
    """Chunks that are refused count as others that nobody asked for, although their places were."""
    link: Any = _Link()
    earshot = Earshot(link, "ward", lambda: MEMBERS, Intake(AdmissionSection()), lambda _site: None)
    chunk = Chunk("ab" * 16, 0, memoryview(bytes(CHUNK)))
    for _ in range(BURST_BYTES // (CHUNK + MESSAGE_COST_BYTES) + 1):
        assert earshot._nuisance.muted(NOW) == frozenset()
        earshot.chunk_refused("north", chunk, "bad-seal")
    assert earshot._nuisance.muted(NOW) == {"north"}


def test_a_stranger_is_not_muted() -> None:
    """Who is not on the roster has no subscription that could be given up."""
    link: Any = _Link()
    earshot = Earshot(link, "ward", lambda: None, Intake(AdmissionSection()), lambda _site: None)
    for _ in range(2 * BURST_BYTES // CHUNK):
        earshot.unwanted("north", CHUNK)
    assert earshot._nuisance.muted(time.monotonic()) == frozenset()
