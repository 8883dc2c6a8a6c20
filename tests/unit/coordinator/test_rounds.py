"""When a round closes, as a table of cases for each mode."""

from __future__ import annotations

import pytest

from coordinator import core
from coordinator import decisions as d
from coordinator.records import Accepted
from coordinator.rounds import RoundView, punctuality, updates_to_merge
from shared.config import AggregationSection, Mode
from shared.messages import Offer, Want
from tests.cores import CoordinatorBench, bits, jobs
from tests.factories import digest, make_federation, make_update, update_id_of

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
            file_digest=digest("f"),
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
    return updates_to_merge(_view(pending, present, answered, open_s, settled=settled), section)


def _view(pending: str, present: str, answered: str, open_s: float, *, settled: bool = True) -> RoundView:
    return RoundView(
        version=VERSION,
        pending=_accepted(pending),
        awaited=frozenset(present),
        answered=frozenset(answered),
        open_s=open_s,
        settled=settled,
    )


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


@pytest.mark.parametrize(
    ("pending", "answered", "open_s", "in_time", "late"),
    [
        ("a b", "", 1.0, "ab", ""),
        ("a b-", "", 59.9, "a", ""),
        ("a b-", "", 60.0, "a", "bc"),
        ("a b", "c", 60.0, "abc", ""),
    ],
)
def test_who_answered_in_time(pending: str, answered: str, open_s: float, in_time: str, late: str) -> None:
    """Of a, b and c, who are waited for; nobody is late before the deadline, and a late base is no answer."""
    view = _view(pending, "abc", answered, open_s)
    assert punctuality(view, AggregationSection(deadline_s=DEADLINE_S)) == (frozenset(in_time), frozenset(late))


def test_what_comes_with_each_chunk_looks_at_no_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """A round looks at all sites; so it is looked at when an update is decided, somebody leaves, or time has passed."""
    looked: list[RoundView] = []

    def look(view: RoundView, _section: AggregationSection) -> int:
        looked.append(view)
        return 0

    monkeypatch.setattr(core, "updates_to_merge", look)
    bench = CoordinatorBench()
    for site in ("north", "south"):
        bench.hello(site)
    _upload(bench, "north")
    assert len(looked) == 1
    update = make_update(bench.plan, "south", bench.state)
    bench.receive("south", Offer(manifest=update))
    bench.handle(d.SpoolOpened(update.transfer_id, bits(update.frames)))
    bench.handle(d.ChunksStored(update.transfer_id, (0,)))
    bench.receive("south", Want(transfer_id=bench.state.transfer_id, have=b"", window=1))
    assert len(looked) == 1
    bench.tick()
    assert len(looked) == 2
    bench.gone("south")
    assert [view.awaited for view in looked[1:]] == [{"north", "south"}, {"north"}]


def test_who_missed_a_deadline_holds_up_no_later_round_until_it_answers_in_time() -> None:
    """A site that stays and sends nothing costs one deadline, not one for each version."""
    aggregation = {"mode": "sync", "quorum": 1, "deadline_s": DEADLINE_S}
    bench = CoordinatorBench(make_federation(federation={"name": "ward", "versions": 9}, aggregation=aggregation))
    for site in ("north", "south"):
        bench.hello(site)
    bench.tick()
    _upload(bench, "north")
    merging = bench.tick(DEADLINE_S)  # south let it pass
    bench.merged(merging)
    bench.tick(1.0)
    bench.merged(_upload(bench, "north"))
    assert bench.core.ledger.version == 2
    assert _upload(bench, "south", "in time").jobs == []  # north is waited for
    bench.merged(_upload(bench, "north"))
    assert _upload(bench, "north").jobs == []  # south is waited for again
    assert jobs(_upload(bench, "south"), d.Merge)


def _upload(bench: CoordinatorBench, site: str, text: str = "") -> d.Decision:
    update_id = update_id_of(site, f"{bench.core.ledger.version} {text}")
    return bench.upload(site, make_update(bench.plan, site, bench.state, update_id=update_id))
