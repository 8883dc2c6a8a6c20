"""States on their way out: merged requests, windows, restarts, and pulls that nobody waits for any more."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.decisions import Decision, Serve
from coordinator.downlink import LOST_WINDOWS
from shared.messages import Want
from tests.unit.coordinator.downlinks import (
    FRAMES,
    IDLE_S,
    MERGE_S,
    STATES,
    A,
    B,
    make_downlink,
    served,
    tick,
    want,
)


def test_a_fresh_pull_waits_a_moment_for_others_and_then_goes_once_to_all() -> None:
    """Two sites that hear of a version at the same time cost the coordinator one upload of it."""
    downlink = make_downlink()
    assert want(downlink, "x", now=0.0) == []
    assert want(downlink, "y", now=0.2) == []
    assert tick(downlink, 0.29, present="xy") == []
    assert tick(downlink, 0.3, present="xy") == [Serve(A, None, (0, 1, 2, 3))]
    assert tick(downlink, 0.4, present="xy") == []


def test_what_some_do_not_need_is_not_sent_past_them_all() -> None:
    """Two of three sites pull: each gets its chunks by itself, and the third one's slow link stays free."""
    downlink = make_downlink()
    want(downlink, "x")
    want(downlink, "y")
    assert tick(downlink, MERGE_S) == [Serve(A, "x", (0, 1, 2, 3)), Serve(A, "y", (0, 1, 2, 3))]


def test_nobody_has_more_in_flight_than_the_coordinator_says() -> None:
    """A window of thousands is cut to ours, however often it is asked for anew."""
    downlink = make_downlink()
    for restart in (False, True, True):
        assert want(downlink, "x", window=4096, restart=restart, present="x") == [Serve(A, "x", (0, 1, 2, 3, 4, 5))]


@pytest.mark.parametrize("states", [[B], [A, B]])
def test_who_asks_for_the_same_without_end_is_served_slowly(states: list[str]) -> None:
    """Each chunk once, all of them again and what a bad link loses at once; then a window for each stall.

    Another site is served as ever, and a newer state begins new books.
    """
    downlink = make_downlink()
    sent = 0
    for number in range(1000):
        jobs = want(downlink, "x", state=states[number % len(states)], window=6, restart=True, present="x")
        sent += sum(len(job.indices) for job in jobs)
    first, window = FRAMES * len(states), 6
    assert 2 * FRAMES + LOST_WINDOWS * window - window <= sent <= first + FRAMES + LOST_WINDOWS * window + window
    assert want(downlink, "y", state=B, present="y", now=1.0)
    later = [want(downlink, "x", state=B, window=6, restart=True, present="x", now=5.0 * n) for n in range(1, 4)]
    assert [sum(len(job.indices) for job in jobs) for jobs in later] == [6, 6, 6]


def test_a_version_that_is_had_whole_and_as_a_step_is_sent_both_ways() -> None:
    """A site that changes its way to a version is sent the other transfer, of another size, at full speed."""
    downlink = make_downlink()
    step = STATES[B].model_copy(
        update={"transfer_id": "c" * 32, "frame_lengths": (5,), "frame_hashes": bytes(32), "slice_size": 1 << 16}
    )
    for state, frames in ((step, 1), (STATES[B], FRAMES)):
        out = Decision()
        want = Want(transfer_id=state.transfer_id, have=b"", window=FRAMES)
        downlink.want("x", want, state, frozenset("x"), 0.0, out)
        assert served(out) == [Serve(state.transfer_id, "x", tuple(range(min(frames, downlink.window))))]


@pytest.mark.parametrize(("bystanders", "topics"), [("k", {None}), ("kl", set("abcdefghij"))])
def test_one_bystander_among_many_is_borne(bystanders: str, topics: set[str | None]) -> None:
    """The bulk topic serves ten at the price of one that hears it in vain, not of two."""
    downlink, present = make_downlink(), "abcdefghij" + bystanders
    for site in "abcdefghij":
        want(downlink, site, present=present)
    assert {job.site for job in tick(downlink, MERGE_S, present=present)} == topics


def test_the_wait_is_counted_from_the_first_pull() -> None:
    """A stream of newcomers does not put the first one off for ever."""
    downlink = make_downlink()
    for tenth in range(3):
        want(downlink, "xyz"[tenth], present="xyzw", now=tenth / 10)
    assert len(tick(downlink, 0.3, present="xyzw")) == 3


def test_nobody_else_to_wait_for() -> None:
    """When every site present pulls already, chunks go out at once."""
    downlink = make_downlink()
    assert want(downlink, "x", present="xy") == []
    assert want(downlink, "y", present="xy") == [Serve(A, None, (0, 1, 2, 3))]
    alone = make_downlink()
    assert want(alone, "x", present="x") == [Serve(A, "x", (0, 1, 2, 3))]


def test_a_site_that_wants_less_at_a_time_is_served_alone() -> None:
    """Windows of 4 where ours is 6: nobody waits for anybody, and nothing waits for its moment."""
    downlink = make_downlink()
    for site in "xyz":
        want(downlink, site)
    assert want(downlink, "y", 0, 1) == [Serve(A, "y", (4, 5))]
    assert want(downlink, "x", 0) == [Serve(A, "x", (4,))]
    assert tick(downlink, MERGE_S) == []


def test_a_site_that_goes_on_waits_with_newcomers() -> None:
    """While a fresh pull waits for others to join, what is wanted goes out with it, on the topic for all."""
    downlink = make_downlink()
    assert want(downlink, "x", present="x") == [Serve(A, "x", (0, 1, 2, 3))]
    assert want(downlink, "y", 0, 1, 2, 3, present="xy" + "z") == []
    assert want(downlink, "x", 0, 1, 2, 3, present="xyz") == []
    assert tick(downlink, MERGE_S, present="xy") == [Serve(A, None, (4, 5, 6, 7))]


def test_what_one_site_lacks_alone_goes_to_that_site() -> None:
    """Common chunks go on the bulk topic, the rest directly, each in its place; nobody is sent what it holds."""
    downlink = make_downlink()
    want(downlink, "x", 0, present="xy")
    sent = want(downlink, "y", 2, present="xy")
    assert sent == [Serve(A, "y", (0,)), Serve(A, None, (1,)), Serve(A, "x", (2,)), Serve(A, None, (3, 4))]


def test_pulls_of_two_states_are_not_mixed() -> None:
    """Chunk 0 of one state is not chunk 0 of another."""
    downlink = make_downlink()
    want(downlink, "x", state=A, present="xy")
    sent = want(downlink, "y", state=B, present="xy")
    assert sent == [Serve(A, "x", (0, 1, 2, 3)), Serve(B, "y", (0, 1, 2, 3))]


def test_the_window_is_kept_until_chunks_are_acknowledged() -> None:
    """A site that says nothing new gets nothing new; each acknowledgement lets as many chunks follow."""
    downlink = make_downlink()
    want(downlink, "x", present="x")
    assert want(downlink, "x", present="x") == []
    assert want(downlink, "x", 0, 1, present="x") == [Serve(A, "x", (4, 5))]


def test_a_running_pull_does_not_wait_for_company() -> None:
    """Only its first request waits; after that each acknowledgement is answered at once, whoever else is present."""
    downlink = make_downlink()
    want(downlink, "x")
    tick(downlink, MERGE_S)
    assert want(downlink, "x", 0, now=1.0) == [Serve(A, "x", (4,))]


def test_those_who_pull_before_they_count_as_present_are_counted_as_hearers() -> None:
    """A want may overtake its site's hello: two such pulls beside one bystander go to each alone."""
    downlink = make_downlink()
    want(downlink, "x", present="z")
    want(downlink, "y", present="z")
    assert [job.site for job in tick(downlink, MERGE_S, present="z")] == ["x", "y"]


def test_a_bulk_chunk_counts_as_sent_for_each_who_asked() -> None:
    """What went once to all is in flight to each of them and not sent to each again."""
    downlink = make_downlink()
    want(downlink, "x", present="xy")
    want(downlink, "y", present="xy")
    assert want(downlink, "x", 0, present="xy") == [Serve(A, "x", (4,))]
    assert want(downlink, "y", 0, 1, present="xy") == [Serve(A, "y", (4, 5))]


def test_a_restart_sends_again_whatever_is_missing() -> None:
    """A site that says that nothing is in flight gets its missing chunks anew."""
    downlink = make_downlink()
    want(downlink, "x", present="x")
    assert want(downlink, "x", 1, restart=True, present="x") == [Serve(A, "x", (0, 2, 3, 4))]


def test_another_state_replaces_the_pull() -> None:
    """A site pulls one state at a time; the newer wish counts."""
    downlink = make_downlink()
    want(downlink, "x", present="x")
    assert want(downlink, "x", state=B, present="x") == [Serve(B, "x", (0, 1, 2, 3))]
    assert downlink.active == {"x"}


def test_an_acknowledgement_meanwhile_does_not_cut_the_wait_short() -> None:
    """While a fresh pull waits for company, a running one goes on with the same flush."""
    downlink = make_downlink()
    want(downlink, "x", present="x")
    assert want(downlink, "y", present="xyz", now=1.0) == []
    assert want(downlink, "x", 0, 1, 2, 3, present="xyz", now=1.1) == []
    assert tick(downlink, 1.3) == [Serve(A, "y", (0, 1, 2, 3)), Serve(A, "x", (4, 5, 6, 7))]


def test_a_full_bitmap_ends_a_pull() -> None:
    """A site that has everything is no longer waited for or sent to."""
    downlink = make_downlink()
    want(downlink, "x", present="x")
    assert want(downlink, "x", *range(FRAMES), present="x") == []
    assert downlink.active == frozenset()


def test_a_quiet_pull_is_forgotten_and_a_lively_one_is_not() -> None:
    """A site that wanted nothing for longer than idle_s is not sent to; it will want again."""
    downlink = make_downlink()
    want(downlink, "x", now=0.0, present="xy")
    want(downlink, "y", now=10.0, present="xy")
    tick(downlink, IDLE_S)
    assert downlink.active == {"x", "y"}
    tick(downlink, IDLE_S + 0.1)
    assert downlink.active == {"y"}
    want(downlink, "y", 0, now=20.0, present="xy")
    tick(downlink, 20.0 + IDLE_S)
    assert downlink.active == {"y"}


def test_a_site_that_left_is_not_sent_to() -> None:
    """What waits for the flush goes to those who are still here."""
    downlink = make_downlink()
    want(downlink, "x")
    want(downlink, "y")
    downlink.site_gone("x")
    downlink.site_gone("never seen")
    assert tick(downlink, MERGE_S) == [Serve(A, "y", (0, 1, 2, 3))]


def test_a_dropped_link_forgets_everything() -> None:
    """Nothing is in flight any more and nothing is planned; every site wants again by itself."""
    downlink = make_downlink()
    want(downlink, "x")
    downlink.reset()
    assert downlink.active == frozenset()
    assert want(downlink, "x", now=9.0) == []
    assert tick(downlink, 9.0 + MERGE_S - 0.1) == []
    assert tick(downlink, 9.0 + MERGE_S) == [Serve(A, "x", (0, 1, 2, 3))]


def test_a_window_of_nothing_sends_nothing() -> None:
    """A site may say that it wants to wait."""
    assert want(make_downlink(), "x", window=0, present="x") == []


@settings(max_examples=50)
@given(
    st.lists(
        st.tuples(st.sampled_from("xyz"), st.booleans(), st.integers(0, 255), st.sampled_from([0.0, 0.2, 0.4])),
        max_size=30,
    )
)
def test_in_flight_to_a_site_never_exceeds_its_window(moves: list[tuple[str, bool, int, float]]) -> None:
    """Whoever asks for what and whenever: unacknowledged chunks of each site stay within its window of 3."""
    downlink, now = make_downlink(), 0.0
    flying: Counter[str] = Counter()
    for site, restart, mask, pause in moves:
        now += pause
        before = {name: pull.sender.in_flight for name, pull in downlink._pulls.items()}
        held = [index for index in range(FRAMES) if mask >> index & 1]
        sent = want(downlink, site, *held, window=3, restart=restart, now=now) + tick(downlink, now)
        for name, pull in downlink._pulls.items():
            flying[name] = pull.sender.in_flight
            assert flying[name] <= 3
            assert flying[name] <= before.get(name, 0) + sum(len(job.indices) for job in sent)
        for job in sent:
            assert job.indices
            assert len(set(job.indices)) == len(job.indices)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("xyz"), st.sets(st.integers(0, FRAMES - 1), max_size=FRAMES - 1)), max_size=6)
)
def test_chunks_leave_in_the_order_in_which_a_site_counts_them(wants: list[tuple[str, set[int]]]) -> None:
    """Whatever goes to all and whatever to one: what a site hears of one flush ascends, as its sender took it."""
    downlink = make_downlink()
    for site, held in wants:
        sent = want(downlink, site, *sorted(held), window=FRAMES, present="xyz")
        for hearer in "xyz":
            heard = [index for job in sent if job.site in {None, hearer} for index in job.indices]
            assert heard == sorted(heard)
