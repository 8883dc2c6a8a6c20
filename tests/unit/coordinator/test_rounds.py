"""When a round closes, as a table of cases for each mode."""

from __future__ import annotations

import pytest

from coordinator.records import Accepted
from coordinator.rounds import RoundView, updates_to_merge
from shared.config import AggregationSection, Mode
from tests.factories import digest

VERSION = 7
DEADLINE_S = 60.0


def _accepted(text: str) -> list[Accepted]:
    """`a b- b` is: one update of a, one of b that is a version late, one of b, in this order."""
    return [
        Accepted(
            update_id=digest(f"{place} {word}")[:32],
            site=word[0],
            base_version=VERSION - word.count("-"),
            examples=1,
            manifest_sha256=digest("m"),
            file_sha256=digest("f"),
            norm=1.0,
            at=0.0,
        )
        for place, word in enumerate(text.split())
    ]


def _count(
    mode: Mode,
    pending: str,
    present: str,
    *,
    answered: str = "",
    open_s: float = 1.0,
    settled: bool = True,
    quorum: int = 2,
) -> int:
    section = AggregationSection(mode=mode, quorum=quorum, buffer=3, deadline_s=DEADLINE_S)
    view = RoundView(
        version=VERSION,
        pending=_accepted(pending),
        present=frozenset(present),
        answered=frozenset(answered),
        open_s=open_s,
        settled=settled,
    )
    return updates_to_merge(view, section)


@pytest.mark.parametrize("mode", ["sync", "fedbuff", "fedasync"])
def test_nothing_pending_never_closes_a_round(mode: Mode) -> None:
    """Not even the deadline makes a version out of nothing."""
    assert _count(mode, "", "ab", open_s=10 * DEADLINE_S, quorum=1) == 0


@pytest.mark.parametrize(
    ("pending", "present", "open_s", "settled", "merged", "why"),
    [
        ("a b", "ab", 1, True, 2, "everybody is in"),
        ("a b", "abc", 1, True, 0, "c is present and still training"),
        ("a b", "abc", 60, True, 2, "the deadline stands in for c"),
        ("a b", "abc", 59.9, True, 0, "not before the deadline"),
        ("a", "a", 1, True, 0, "everybody is in, but no quorum"),
        ("a", "a", 600, True, 0, "the deadline does not replace the quorum"),
        ("a a", "a", 1, True, 0, "one site twice is no quorum of two"),
        ("a b", "", 1, True, 2, "both left after their updates"),
        ("a b", "a", 1, True, 2, "b left after its update"),
        ("a b", "ab", 1, False, 0, "just started: who is present is not known yet"),
        ("a b", "ab", 60, False, 2, "overdue, whoever may come"),
        ("a b-", "ab", 1, True, 0, "b's is late, and b trains on the current version now"),
        ("a b- b", "ab", 1, True, 3, "the late one goes along"),
        ("a b-", "a", 1, True, 2, "b's is late and b is away: it counts for the quorum"),
        ("a- b-", "ab", 60, True, 2, "two late ones at the deadline"),
    ],
)
def test_sync(pending: str, present: str, open_s: float, settled: bool, merged: int, why: str) -> None:
    """Quorum, and either all who are present or the deadline."""
    assert _count("sync", pending, present, open_s=open_s, settled=settled) == merged, why


@pytest.mark.parametrize(
    ("pending", "present", "open_s", "settled", "merged", "why"),
    [
        ("a b c", "abcd", 1, True, 3, "the buffer is full"),
        ("a b c d", "abcd", 1, True, 3, "the buffer's worth; the rest opens the next round"),
        ("a a- b", "abcd", 1, False, 3, "full is full, whoever is present"),
        ("a b", "abc", 1, True, 0, "c may fill it"),
        ("a b", "ab", 1, True, 2, "nobody present is going to fill it"),
        ("a b", "ab", 1, False, 0, "just started: others may come"),
        ("a b-", "ab", 1, True, 0, "b trains on the current version now"),
        ("a", "", 1, True, 0, "nobody is here; somebody may come before the deadline"),
        ("a", "", 60, True, 1, "the deadline closes what has anything at all"),
        ("a", "abc", 59.9, True, 0, "not before the deadline"),
    ],
)
def test_fedbuff(pending: str, present: str, open_s: float, settled: bool, merged: int, why: str) -> None:
    """K updates, or nobody left to fill the buffer, or the deadline."""
    assert _count("fedbuff", pending, present, open_s=open_s, settled=settled) == merged, why


@pytest.mark.parametrize(
    ("mode", "pending", "answered", "merged", "why"),
    [
        ("sync", "a b", "c", 2, "c's update was rejected: it has answered"),
        ("sync", "a b", "", 0, "c is still training"),
        ("sync", "a", "bc", 1, "a quorum has answered, though two of the answers were rejected"),
        ("sync", "a", "b", 0, "c is still training"),
        ("sync", "", "abc", 0, "nothing to merge"),
        ("fedbuff", "a b", "c", 2, "nobody is left to fill the buffer"),
        ("fedbuff", "", "abc", 0, "nothing to merge"),
    ],
)
def test_a_site_that_was_rejected_is_not_waited_for(
    mode: Mode, pending: str, answered: str, merged: int, why: str
) -> None:
    """It has answered, and nothing more need come from it before the next version."""
    assert _count(mode, pending, "abc", answered=answered) == merged, why


@pytest.mark.parametrize(("pending", "settled"), [("a", True), ("a b c d", True), ("a-", False)])
def test_fedasync(pending: str, settled: bool) -> None:
    """Each update makes a version, at once and one at a time."""
    assert _count("fedasync", pending, "abc", settled=settled, open_s=0.0) == 1


@pytest.mark.parametrize(("answered", "merged"), [("b", 1), ("", 0)])
def test_at_the_deadline_a_rejected_update_counts_as_an_answer(answered: str, merged: int) -> None:
    """A quorum of all sites is reached although one of them never sends an update that passes."""
    assert _count("sync", "a", "abc", answered=answered, open_s=DEADLINE_S) == merged
