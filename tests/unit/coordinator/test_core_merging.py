"""The coordinator's decisions about what goes into a merge; when a round closes is in test_core and test_rounds."""

from __future__ import annotations

import math
from typing import Any

import pytest

from coordinator import decisions as d
from coordinator.records import Accepted, Quarantined, Rejected, Substituted, Validated, VersionCommitted
from shared.manifest import Manifest
from shared.messages import Offer, Receipt
from tests.cores import STALL_S, CoordinatorBench, bits, jobs, said
from tests.factories import make_federation, make_update


def _bench(**aggregation: Any) -> CoordinatorBench:
    return CoordinatorBench(make_federation(aggregation=aggregation))


def _weighing(**aggregation: Any) -> CoordinatorBench:
    return _bench(mode="sync", quality="exp-loss", staleness={"kind": "constant"}, **aggregation)


def _measured(bench: CoordinatorBench, site: str, loss: float, **changes: Any) -> tuple[Manifest, d.Decision]:
    """An update of the site comes in and has this loss."""
    update = make_update(bench.plan, site, bench.state, **changes)
    (job,) = jobs(bench.upload(site, update), d.Validate)
    return update, bench.handle(d.Validated(job.update_id, job.norm, loss))


def test_who_answers_first_changes_no_plan() -> None:
    """Two runs whose sites answer in opposite orders merge by the same plan, to the last number."""
    plans = []
    for sites in (("south", "north", "east"), ("east", "north", "south")):
        bench = _bench(mode="sync", quorum=3)
        for site in sites:
            bench.upload(site, make_update(bench.plan, site, bench.state, examples=len(site)))
        (merge,) = jobs(bench.tick(STALL_S), d.Merge)
        plans.append(merge.plan)
    assert plans[0] == plans[1]
    assert [part.site for part in plans[0].contributions] == ["east", "north", "south"]


# -- by their loss ---


def test_an_update_is_accepted_when_its_loss_is_known_and_not_before() -> None:
    """Verified, it asks for the loss of its base state with it added; nothing is recorded or said until that is known.

    Then both rows are one transaction, and the receipt follows.
    """
    bench = _weighing()
    update = make_update(bench.plan, "north", bench.state)
    decision = bench.upload("north", update)
    assert jobs(decision, d.Validate) == [d.Validate(update.transfer_id, 1.0, (bench.state.transfer_id,))]
    assert (decision.records, said(decision, Receipt, "north")) == ([], [])
    decision = bench.handle(d.Validated(update.transfer_id, 1.0, 0.75))
    accepted, validated = decision.records
    assert isinstance(accepted, Accepted)
    assert validated == Validated(update.transfer_id, 0.75, 1e9 + bench.now)
    assert [receipt.outcome for receipt in said(decision, Receipt, "north")] == ["accepted"]


def test_a_round_waits_for_the_loss_of_what_it_would_merge() -> None:
    """Everybody present has sent; the version is made when the last loss is known, by both."""
    bench = _weighing(quorum=1)
    bench.hello("north")
    bench.hello("south")
    bench.tick(STALL_S)
    _measured(bench, "north", 1.0)
    late = make_update(bench.plan, "south", bench.state)
    assert jobs(bench.upload("south", late), d.Merge) == []
    assert jobs(bench.tick(STALL_S), d.Merge) == []
    (merge,) = jobs(bench.handle(d.Validated(late.transfer_id, 1.0, 2.0)), d.Merge)
    assert [part.weight for part in merge.plan.recorded()] == pytest.approx([1 / (1 + math.exp(-1)), 1 / (1 + math.e)])


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_rejects_the_update(loss: float) -> None:
    """Its bytes go, its site is told why and counts as having answered."""
    bench = _weighing(quorum=2)
    bench.hello("north")
    bench.hello("south")
    bench.tick(STALL_S)
    update, decision = _measured(bench, "north", loss)
    (rejected,) = decision.records
    assert isinstance(rejected, Rejected)
    assert rejected.rule == "loss-not-finite"
    assert d.Discard(update.transfer_id) in decision.jobs
    assert [(each.outcome, each.rule) for each in said(decision, Receipt, "north")] == [("rejected", "loss-not-finite")]
    _update, decision = _measured(bench, "south", 1.0)
    assert jobs(decision, d.Merge)


def test_a_restart_before_the_loss_is_known_begins_with_the_offer_again() -> None:
    """Nothing was promised; the bytes are here, so that the update is verified and measured once more."""
    bench = _weighing()
    update = make_update(bench.plan, "north", bench.state)
    assert jobs(bench.upload("north", update), d.Validate)
    bench.boot("f" * 16)
    assert bench.handle(d.Validated(update.transfer_id, 1.0, 0.5)).records == []
    bench.receive("north", Offer(manifest=update))
    bench.handle(d.SpoolOpened(update.transfer_id, bits(update.frames, *range(update.frames))))
    assert jobs(bench.handle(d.Verified(update.transfer_id, 1.0)), d.Validate)
    assert len(bench.handle(d.Validated(update.transfer_id, 1.0, 0.5)).records) == 2


def test_a_restart_after_it_is_known_needs_no_model() -> None:
    """The losses come back with the journal, and the version is made of them."""
    bench = _weighing(quorum=2)
    for site, loss in (("north", 1.0), ("south", 2.0)):
        _measured(bench, site, loss)
    before = bench.core.ledger.losses
    bench.boot("f" * 16)
    assert bench.core.ledger.losses == before
    bench.tick()
    decision = bench.merged(bench.tick(STALL_S))
    assert isinstance(decision.records[0], VersionCommitted)
    assert bench.core.ledger.losses == {}


def test_a_run_that_ended_meanwhile_measures_nothing() -> None:
    """Neither is an update measured that comes verified after the end, nor accepted when its loss comes after it."""
    bench = CoordinatorBench(
        make_federation(federation={"name": "ward", "versions": 1}, aggregation={"mode": "sync", "quality": "exp-loss"})
    )
    late, later = (make_update(bench.plan, site, bench.state) for site in ("late", "later"))
    bench.upload("late", late)
    bench.receive("later", Offer(manifest=later))
    bench.handle(d.SpoolOpened(later.transfer_id, bits(later.frames, *range(later.frames))))
    _measured(bench, "north", 1.0)
    bench.merged(bench.tick(STALL_S))
    for decision in (
        bench.handle(d.Validated(late.transfer_id, 1.0, 0.5)),
        bench.handle(d.Verified(later.transfer_id, 1.0)),
    ):
        assert jobs(decision, d.Validate) == []
        (rejected,) = decision.records
        assert isinstance(rejected, Rejected)
        assert rejected.rule == "run-complete"


def test_an_update_out_of_line_is_measured_and_kept_apart() -> None:
    """Whoever looks at it sees its loss; released, it is weighed by it."""
    bench = CoordinatorBench(
        make_federation(aggregation={"mode": "sync", "quality": "exp-loss"}),
        admission={"norm_max": 0.5},
    )
    update, decision = _measured(bench, "north", 0.25)
    assert [type(record) for record in decision.records] == [Accepted, Validated, Quarantined]
    bench.tick()
    (merge,) = jobs(bench.handle(d.Ruled(update.transfer_id, release=True)), d.Merge) or jobs(
        bench.tick(STALL_S), d.Merge
    )
    assert [part.weight for part in merge.plan.recorded()] == [1.0]


# -- by krum ---


def test_too_few_for_krum_are_told_in_a_row_before_the_version() -> None:
    """Two updates of a rule that needs five: the row says what stood in, in the same transaction."""
    bench = _bench(mode="sync", rule="krum", quorum=2)
    for site in ("north", "south"):
        bench.upload(site, make_update(bench.plan, site, bench.state))
    substituted, version = bench.merged(bench.tick(STALL_S)).records
    assert substituted == Substituted(1, "median", 2, 5, 1e9 + bench.now)
    assert isinstance(version, VersionCommitted)


def test_what_is_told_of_a_version_is_what_its_merge_found() -> None:
    """Krum chose one of five: the record says so, and each site's receipt what its update counted."""
    bench = _bench(mode="sync", rule="krum", quorum=5)
    sites = ("ash", "bay", "cove", "dale", "elm")
    for site in sites:
        bench.upload(site, make_update(bench.plan, site, bench.state))
    decision = bench.merged(bench.tick(STALL_S), chosen={"cove"})
    (version,) = decision.records
    assert isinstance(version, VersionCommitted)
    assert [part.weight for part in version.contributions] == [0, 0, 1, 0, 0]
    assert [said(decision, Receipt, site)[0].weight for site in sites] == [0, 0, 1, 0, 0]
