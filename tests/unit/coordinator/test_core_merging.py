"""The coordinator's decisions about what goes into a merge; when a round closes is in test_core and test_rounds."""

from __future__ import annotations

from coordinator import decisions as d
from tests.cores import STALL_S, CoordinatorBench, jobs
from tests.factories import make_federation, make_update


def test_who_answers_first_changes_no_plan() -> None:
    """Two runs whose sites answer in opposite orders merge by the same plan, to the last number."""
    plans = []
    for sites in (("south", "north", "east"), ("east", "north", "south")):
        bench = CoordinatorBench(make_federation(aggregation={"mode": "sync", "quorum": 3}))
        for site in sites:
            bench.upload(site, make_update(bench.plan, site, bench.state, examples=len(site)))
        (merge,) = jobs(bench.tick(STALL_S), d.Merge)
        plans.append(merge.plan)
    assert plans[0] == plans[1]
    assert [part.site for part in plans[0].contributions] == ["east", "north", "south"]
