"""A site's ways to the announced state: by steps from what it holds, or whole and by steps from there."""

from __future__ import annotations

import pytest

from edge_client import decisions as d
from edge_client.pulling import way_from
from shared.manifest import Manifest
from shared.messages import Announce, Hello, Want
from tests.sessions import STALL_S, SessionBench, jobs, sent


def holding(version: int) -> SessionBench:
    """A site that is connected, holds the state of a version from an earlier life, and has not looked at it yet."""
    bench = SessionBench(held=SessionBench().state(version))
    bench.connect()
    return bench


def fetched(bench: SessionBench, step: Manifest) -> d.Decision:
    """A step comes in whole and is verified."""
    bench.opened(step, *range(step.frames))
    return bench.handle(d.StepReady(step.transfer_id))


def announcement(bench: SessionBench) -> Announce:
    """What the session heard last."""
    announced = bench.session.announced
    assert announced is not None
    return announced


@pytest.mark.parametrize(
    ("held", "way"),
    [
        (None, ["state 3", "step 4", "step 5"]),
        (0, ["state 3", "step 4", "step 5"]),
        (1, ["step 2", "step 3", "step 4", "step 5"]),
        (3, ["step 4", "step 5"]),
        (4, ["step 5"]),
        (5, ["state 5"]),
        (6, ["state 3", "step 4", "step 5"]),
    ],
)
def test_the_way_follows_from_what_is_held(held: int | None, way: list[str]) -> None:
    """By steps from any state that they pass, else whole first; what is held and announced is only looked at."""
    bench = SessionBench()
    bench.announce_steps(3, 2, 3, 4, 5)
    named = {bench.state(version).transfer_id: f"state {version}" for version in range(7)}
    named |= {bench.step(version).transfer_id: f"step {version}" for version in range(1, 7)}
    state = None if held is None else bench.state(held)
    assert [named[each.transfer_id] for each in way_from(state, announcement(bench))] == way


def test_a_state_of_the_same_version_and_another_digest_is_no_base() -> None:
    """As after a coordinator's restore from a backup: versions are told apart by what they are, not by number."""
    bench = SessionBench()
    bench.announce_steps(3, 4, 5)
    assert way_from(bench.state(4, salt="other"), announcement(bench))[0] == bench.state(3)


def test_a_site_in_step_fetches_one_step_and_adds_it_to_what_it_holds() -> None:
    """Then it trains on the state that came of it; no whole state travels."""
    bench = holding(3)
    assert bench.announce_steps(3, 4).jobs == [d.OpenSpool(bench.step(4))]
    bench.opened(bench.step(4))
    decision = bench.handle(d.ChunksStored(bench.step(4).transfer_id, (0, 1)))
    assert decision.jobs == [d.Finish(bench.step(4).transfer_id)]
    decision = bench.handle(d.StepReady(bench.step(4).transfer_id))
    assert decision.jobs == [d.StepOn(bench.state(3), (bench.step(4),))]
    assert bench.session.phase == "pulling"
    assert bench.pulled(bench.state(4)).jobs == [d.Train(bench.state(4))]


def test_a_site_that_is_behind_adds_all_its_steps_up_at_once() -> None:
    """One after the other over the link, then together: each rewrites the whole state."""
    bench = holding(1)
    bench.announce_steps(3, 2, 3, 4)
    assert fetched(bench, bench.step(2)).jobs == [d.OpenSpool(bench.step(3))]
    assert fetched(bench, bench.step(3)).jobs == [d.OpenSpool(bench.step(4))]
    steps = tuple(bench.step(version) for version in (2, 3, 4))
    assert fetched(bench, bench.step(4)).jobs == [d.StepOn(bench.state(1), steps)]


def test_a_new_site_takes_the_whole_state_and_the_steps_behind_it() -> None:
    """It does not train on the one that came only for them."""
    bench = SessionBench()
    bench.connect()
    assert bench.announce_steps(3, 3, 4).jobs == [d.OpenSpool(bench.state(3))]
    assert bench.pulled(bench.state(3)).jobs == [d.OpenSpool(bench.step(4))]
    assert fetched(bench, bench.step(4)).jobs == [d.StepOn(bench.state(3), (bench.step(4),))]
    assert bench.pulled(bench.state(4)).jobs == [d.Train(bench.state(4))]


def test_a_state_that_came_for_steps_is_trained_on_when_they_are_announced_no_more() -> None:
    """Else a site that is slower than versions come could fetch whole states for ever and train on none of them."""
    bench = SessionBench()
    bench.connect()
    bench.announce_steps(3, 4, 5)
    assert bench.pulled(bench.state(3)).jobs == [d.OpenSpool(bench.step(4))]
    bench.opened(bench.step(4))
    decision = bench.announce_steps(9, 9)
    step = bench.step(4).transfer_id
    assert decision.jobs == [d.CloseSpool(step), d.OpenSpool(bench.state(9)), d.Train(bench.state(3))]
    assert bench.session.states_in_use >= {bench.state(3).transfer_id}
    bench.handle(d.Trained(bench.update(3)))
    assert bench.pulled(bench.state(9)).jobs == [d.Train(bench.state(9))]


def test_a_whole_state_that_is_the_newest_is_trained_on_at_once() -> None:
    """Steps that are announced with it lead to it, and not on from it."""
    bench = SessionBench()
    bench.connect()
    bench.announce_steps(3, 2, 3)
    assert bench.pulled(bench.state(3)).jobs == [d.Train(bench.state(3))]


def test_what_is_announced_and_held_is_looked_at_before_it_is_trained_on() -> None:
    """After a restart; the manifest is the one that lies here, as the site may have made the state by steps."""
    bench = SessionBench(held=SessionBench().state(4, frames=7))
    bench.connect()
    held = bench.state(4, frames=7)
    assert bench.announce_steps(3, 4).jobs == [d.OpenSpool(held)]
    assert bench.opened(held, *range(7)).jobs == [d.Finish(held.transfer_id)]
    assert bench.pulled(held).jobs == [d.Train(held)]


def test_a_step_that_was_fetched_before_a_restart_is_not_fetched_again() -> None:
    """It lies in the store whole: opening its spool says so, and it is verified from there."""
    bench = holding(3)
    bench.announce_steps(3, 4, 5)
    step = bench.step(4)
    assert bench.opened(step, 0, 1) == d.Decision(jobs=[d.Finish(step.transfer_id)])


def test_a_newer_version_does_not_lengthen_the_way_that_was_begun() -> None:
    """A site whose link is slower than versions come trains now and then, and follows from there."""
    bench = holding(3)
    bench.announce_steps(3, 4, 5)
    fetched(bench, bench.step(4))
    assert bench.announce_steps(3, 4, 5, 6, 7).jobs == []
    steps = (bench.step(4), bench.step(5))
    assert fetched(bench, bench.step(5)).jobs == [d.StepOn(bench.state(3), steps)]
    assert bench.pulled(bench.state(5)).jobs == [d.OpenSpool(bench.step(6)), d.Train(bench.state(5))]
    fetched(bench, bench.step(6))
    steps = (bench.step(6), bench.step(7))
    assert fetched(bench, bench.step(7)).jobs == [d.StepOn(bench.state(5), steps)]


def test_a_step_under_way_that_leads_nowhere_any_more_is_given_up() -> None:
    """A coordinator that was restored goes on from an older version; below half of it is here."""
    bench = holding(3)
    bench.announce_steps(3, 4)
    bench.opened(bench.step(4))
    decision = bench.announce(bench.state(2))
    assert decision.jobs == [d.CloseSpool(bench.step(4).transfer_id), d.OpenSpool(bench.state(2))]


def test_a_state_that_no_steps_lead_on_from_is_replaced_by_a_whole_one() -> None:
    """The site was away for so long that the steps from its state are not announced any more."""
    bench = holding(1)
    assert bench.announce_steps(9, 8, 9).jobs == [d.OpenSpool(bench.state(9))]


def test_steps_that_make_no_state_are_fetched_again_or_the_state_whole() -> None:
    """Whatever was to blame is gone: a step alone is fetched again, a spoilt base is replaced."""
    for broken, then in ((SessionBench().step(4), "step"), (SessionBench().state(3), "state")):
        bench = holding(3)
        bench.announce_steps(2, 3, 4)
        fetched(bench, bench.step(4))
        wanted = {"step": bench.step(4), "state": bench.state(2)}[then]
        assert bench.handle(d.Unmade((broken.transfer_id,))).jobs == [d.OpenSpool(wanted)]


def test_a_spoilt_base_is_not_trained_on() -> None:
    """It was ready; its bytes are gone with it."""
    bench = holding(3)
    bench.announce(bench.state(3))
    bench.pulled(bench.state(3))
    bench.handle(d.Trained(bench.update(3)))
    bench.announce_steps(2, 3, 4)
    fetched(bench, bench.step(4))
    bench.handle(d.Unmade((bench.state(3).transfer_id,)))
    assert bench.session.pulls.ready is None
    assert bench.session.pulls.held is None


def test_nothing_else_is_begun_while_steps_are_added_up() -> None:
    """What was announced meanwhile is fetched from there."""
    bench = holding(3)
    bench.announce_steps(3, 4)
    fetched(bench, bench.step(4))
    assert bench.announce_steps(3, 4, 5).jobs == []
    assert bench.tick(10 * STALL_S).jobs == []
    assert bench.pulled(bench.state(4)).jobs == [d.OpenSpool(bench.step(5)), d.Train(bench.state(4))]


def test_a_stalled_step_is_asked_for_again() -> None:
    """The site's one timer holds for steps as for states."""
    bench = holding(3)
    bench.announce_steps(3, 4)
    bench.opened(bench.step(4), 0)
    (want,) = sent(bench.tick(STALL_S), Want)
    assert (want.transfer_id, want.have, want.restart) == (bench.step(4).transfer_id, b"\x01", True)


def test_what_a_way_needs_stays_on_the_disk() -> None:
    """Held, ready, in training, and all steps of the way, whether or not they are here."""
    bench = holding(3)
    bench.announce(bench.state(3))
    bench.pulled(bench.state(3))
    assert bench.session.states_in_use == {bench.state(3).transfer_id}
    bench.announce_steps(3, 4, 5)
    fetched(bench, bench.step(4))
    steps = {bench.step(version).transfer_id for version in (4, 5)}
    assert bench.session.states_in_use == {bench.state(3).transfer_id, *steps}
    fetched(bench, bench.step(5))
    bench.pulled(bench.state(5))
    assert bench.session.states_in_use == {bench.state(version).transfer_id for version in (3, 5)}


def test_hello_names_the_announced_state_though_it_does_not_travel() -> None:
    """The id that it would have; the coordinator compares it with its own."""
    bench = holding(3)
    bench.announce_steps(3, 4)
    (hello,) = sent(bench.handle(d.LinkUp()), Hello)
    assert hello.heard == bench.state(4).transfer_id


def test_a_site_leaves_with_the_last_state_and_not_before() -> None:
    """The final announcement names a state that it has yet to make."""
    bench = holding(3)
    assert jobs(bench.announce_steps(3, 4, final=True), d.Exit) == []
    assert jobs(fetched(bench, bench.step(4)), d.Exit) == []
    assert bench.pulled(bench.state(4)).jobs == [d.Exit()]
