"""Versions that travel as steps, at the coordinator: what is recorded, announced, served, summed up and merged from."""

from __future__ import annotations

from typing import Any

import pytest

from coordinator import decisions as d
from coordinator import snapshots
from coordinator.announcing import ANNOUNCEMENT_BYTES, STEPS_BYTES, announced, check_announceable
from coordinator.ledger import Ledger
from coordinator.merging import MergePlan, MergeResult, committed
from coordinator.records import Anchored, Opened, VersionCommitted
from shared.errors import ConfigError
from shared.manifest import MAX_FRAMES, Manifest
from shared.messages import MAX_CONTROL_BYTES, Announce, Offer, Receipt, Want, encode
from tests.cores import CoordinatorBench, bits, jobs, said
from tests.factories import SLICE, digest, make_federation, make_plan, make_state, make_step, make_update

FEDERATION = make_federation(
    federation={"name": "ward", "versions": 9}, codec={"down": "int8", "steps": 3}, aggregation={"mode": "fedasync"}
)
PLAN = make_plan(FEDERATION)


def ids(*manifests: Manifest) -> tuple[str, ...]:
    """Their transfer ids."""
    return tuple(manifest.transfer_id for manifest in manifests)


def run_to(version: int, *, steps: int = 3, frames: int = 2, whole_frames: int = 5) -> Ledger:
    """A ledger whose newest version is this one; every so many versions can be had whole, with more bytes."""
    ledger = Ledger()
    first = make_state(PLAN, 0, frames=whole_frames)
    ledger.apply(Opened(PLAN.fingerprint, PLAN.config_sha256, PLAN.frozen_sha256, first.to_bytes(), digest("m")))
    for each in range(1, version + 1):
        anchor = None if each % steps else make_state(PLAN, each, frames=whole_frames)
        result = MergeResult(make_step(PLAN, each, frames=frames), digest("m"), None, (), anchor)
        plan = MergePlan(each, each - 1, (), "fedasync", "mean", 0.6, ())
        for record in committed(plan, result, FEDERATION.aggregation, 1.0):
            ledger.apply(record)
    return ledger


# -- what a state is made of ---


def test_a_state_is_made_of_the_last_whole_one_and_the_steps_since() -> None:
    """With a whole state at versions 0, 3 and 6."""
    ledger = run_to(7)
    whole = [make_state(PLAN, version) for version in range(8)]
    step = [make_step(PLAN, version) for version in range(1, 8)]
    assert ledger.parts(0) == ids(whole[0])
    assert ledger.parts(2) == ids(whole[0], step[0], step[1])
    assert ledger.parts(3) == ids(whole[3])
    assert ledger.parts(7) == ids(whole[6], step[6])
    assert ledger.newest.digest == whole[7].file_digest
    assert set(ledger.transfers) == {*ids(whole[0], whole[3], whole[6], *step)}


def test_a_step_from_another_state_is_a_mistake() -> None:
    """As is an anchor that is another state than the step to its version makes."""
    ledger = run_to(2)
    for false in (make_step(PLAN, 3, salt="other"), make_step(PLAN, 2)):
        with pytest.raises(AssertionError):
            ledger.publish(3, false)
    with pytest.raises(AssertionError):
        ledger.anchor(2, make_state(PLAN, 2, salt="other"))


def test_a_snapshot_keeps_steps_and_anchors() -> None:
    """A restart from it knows all that a replay of the rows knows."""
    for version in (0, 2, 3, 7):
        ledger = run_to(version)
        assert vars(snapshots.from_bytes(snapshots.to_bytes(ledger))) == vars(ledger)


# -- what is announced ---


def test_the_steps_since_the_whole_state_are_always_announced() -> None:
    """Without them nobody could get from there to the newest one, however much they weigh."""
    whole, steps = announced(run_to(5, frames=9))
    assert (whole.version, [step.version for step in steps]) == (3, [4, 5])


def test_steps_before_it_are_announced_while_they_weigh_less_than_it_does() -> None:
    """Whoever holds version 5 or 6 takes one or two steps of 2 frames; the whole state has 5, three steps 6."""
    whole, steps = announced(run_to(7))
    assert (whole.version, [step.version for step in steps]) == (6, [5, 6, 7])
    whole, steps = announced(run_to(6))
    assert (whole.version, [step.version for step in steps]) == (6, [5, 6])
    whole, steps = announced(run_to(6, whole_frames=13))
    assert (whole.version, [step.version for step in steps]) == (6, [1, 2, 3, 4, 5, 6])


def test_nor_do_they_make_announcements_long() -> None:
    """Light steps that lead to the whole state take 4 KiB at most, or as much as that state's own manifest."""
    for whole_frames, room in ((100, STEPS_BYTES), (250, len(make_state(PLAN, 30, frames=250).to_bytes()))):
        whole, steps = announced(run_to(30, frames=1, whole_frames=whole_frames))
        taken = [len(step.to_bytes()) for step in steps]
        assert whole.version == 30
        assert room - taken[0] < sum(taken) <= room


def test_a_version_that_travels_whole_is_announced_as_ever() -> None:
    """No steps, and no other bytes than before there were any."""
    bench = CoordinatorBench()
    announce = bench.core.announcement()
    assert (announce.manifest, announce.steps) == (bench.state, ())


def test_the_longest_announcement_fits_a_message() -> None:
    """What the coordinator admits when it opens a run can be announced at every version; what cannot, it refuses."""
    frames, steps = 5600, 4
    whole = make_state(PLAN, 0, frames=frames)
    check_announceable(whole, frames * SLICE, steps)
    ledger = run_to(3, steps=steps, frames=frames, whole_frames=frames)
    told, ways = announced(ledger)
    fields = {"boot": "0" * 16, "final": False, "target": 9, "manifest": told, "steps": ways}
    digests = {name: digest("x") for name in ("fingerprint", "config_sha256", "frozen_sha256")}
    assert len(ways) == 3
    assert len(encode(Announce(**fields, **digests))) < MAX_CONTROL_BYTES  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"codec\.steps = 5: announcements would take"):
        check_announceable(whole, frames * SLICE, 5)
    check_announceable(make_state(PLAN, 0, frames=MAX_FRAMES), MAX_FRAMES * SLICE, 0)
    assert ANNOUNCEMENT_BYTES < MAX_CONTROL_BYTES


# -- the core ---


def bench_at(version: int) -> CoordinatorBench:
    """A core whose run has come to a version, by updates of one site."""
    bench = CoordinatorBench(FEDERATION)
    bench.hello("north")
    for _ in range(version):
        bench.merged(bench.upload("north", make_update(bench.plan, "north", bench.state)))
    return bench


def test_a_version_is_recorded_with_its_anchor_and_announced_with_the_ways_to_it() -> None:
    """Version 3 of 9: two rows in one decision, then the announcement, then the receipt."""
    bench = bench_at(2)
    decision = bench.merged(bench.upload("north", make_update(bench.plan, "north", bench.state)))
    committed, anchored = decision.records
    assert isinstance(committed, VersionCommitted)
    assert committed.state == make_step(bench.plan, 3).to_bytes()
    assert anchored == Anchored(3, make_state(bench.plan, 3).to_bytes(), committed.at)
    (announce,) = said(decision, Announce)
    assert (announce.manifest, announce.steps[-1]) == (make_state(bench.plan, 3), make_step(bench.plan, 3))
    assert announce.state_id == bench.state.transfer_id
    assert [type(send.message) for send in decision.sends] == [Announce, Receipt]


def test_a_merge_is_told_what_the_states_are_made_of() -> None:
    """The one that its step starts from, and the one that a late site started from."""
    bench = bench_at(4)
    late = make_update(bench.plan, "south", make_state(bench.plan, 2))
    (merge,) = jobs(bench.upload("south", late), d.Merge)
    whole = {version: make_state(bench.plan, version) for version in (0, 3)}
    step = {version: make_step(bench.plan, version) for version in (1, 2, 4)}
    assert merge.plan.before == ids(whole[3], step[4])
    assert merge.plan.contributions[0].base == ids(whole[0], step[1], step[2])


def test_steps_and_anchors_are_served_as_states_are() -> None:
    """Also those of old versions; an id that was never published is answered by the announcement."""
    bench = bench_at(4)
    for wanted in (make_step(bench.plan, 1), make_state(bench.plan, 3), make_step(bench.plan, 4)):
        want = Want(transfer_id=wanted.transfer_id, have=bits(wanted.frames), window=4)
        served = bench.receive("north", want)
        assert jobs(served, d.Serve)[0].transfer_id == wanted.transfer_id
    never = bench.receive("north", Want(transfer_id=make_state(bench.plan, 4).transfer_id, have=bits(5), window=4))
    assert said(never, Announce, "north") == [bench.core.announcement()]


@pytest.mark.parametrize(("heard", "again"), [(4, False), (3, True), (None, True)])
def test_a_site_is_asked_what_state_it_has_heard_of(heard: int | None, again: bool) -> None:
    """By the id of the state, though it does not travel whole; one that heard of an older one hears it again."""
    bench = bench_at(4)
    told: Any = None if heard is None else make_state(bench.plan, heard).transfer_id
    assert bool(said(bench.hello("south", heard=told), Announce, "south")) == again


def test_an_update_names_the_state_that_steps_have_made() -> None:
    """Its digest is that of the state, not of the step; any other is none that was published."""
    bench = bench_at(2)
    false = make_update(bench.plan, "north", make_state(bench.plan, 2, salt="other"))
    (receipt,) = said(bench.receive("north", Offer(manifest=false)), Receipt, "north")
    assert receipt.rule == "base-unknown"
    sound = bench.receive("north", Offer(manifest=make_update(bench.plan, "north", make_state(bench.plan, 2))))
    assert len(jobs(sound, d.OpenSpool)) == 1
