"""What the rules of closing say of a version, read from its journal alone; forgeries are in test_proof."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest

from coordinator import decisions as d
from coordinator.records import Quarantined, Record, Rejected, VersionCommitted
from coordinator.trail import Trail
from shared.messages import Offer
from tests.cores import STALL_S, CoordinatorBench, bits
from tests.factories import make_federation, make_update


def findings(bench: CoordinatorBench, records: Sequence[Record], since: int = 0) -> list[str]:
    """Rules of what is found in records; with `since`, the rows up to there are known from a snapshot alone."""
    trail = Trail(bench.federation, bench.plan)
    found = []
    for seq, record in enumerate(records, start=1):
        if seq == since:
            bench.records = [*records[:seq]]
            trail.begin(seq, bench.boot().ledger)
        elif seq > since:
            found += [finding.rule for finding in trail.take(seq, record)]
    return found


def closed_with_one_of_two(**config: Any) -> CoordinatorBench:
    """A round of a quorum of two: south's update is rejected, or kept apart under `config`, and north's is merged."""
    bench = CoordinatorBench(make_federation(aggregation={"mode": "sync", "quorum": 2}), **config)
    south = make_update(bench.plan, "south", bench.state)
    bench.receive("south", Offer(manifest=south))
    bench.handle(d.SpoolOpened(south.transfer_id, bits(south.frames, *range(south.frames))))
    if config:
        bench.handle(d.Verified(south.transfer_id, 9.0))
    else:
        bench.handle(d.VerifyFailed(south.transfer_id, "non-finite", "NaN"))
    bench.upload("north", make_update(bench.plan, "north", bench.state))
    bench.merged(bench.tick(STALL_S))
    return bench


@pytest.mark.parametrize("config", [{}, {"admission": {"norm_max": 5.0}}], ids=["rejected", "kept apart"])
def test_who_answered_in_vain_counts_for_the_quorum(config: dict[str, Any]) -> None:
    """As it does when the round closes; without that row the version has fewer sites than it may."""
    bench = closed_with_one_of_two(**config)
    records = list(bench.records)
    assert findings(bench, records) == []
    silent = [record for record in records if not isinstance(record, Rejected | Quarantined)]
    assert "round-size" in findings(bench, silent)


def test_what_a_snapshot_does_not_tell_is_not_held_against_a_version() -> None:
    """Who answered in vain before it is not known; the next version is judged in full again."""
    bench = closed_with_one_of_two()
    for site in ("north", "south"):
        decision = bench.upload(site, make_update(bench.plan, site, bench.state))
    bench.merged(decision)
    records = list(bench.records)
    rejected = next(seq for seq, record in enumerate(records, start=1) if isinstance(record, Rejected))
    assert findings(bench, records, since=rejected) == []
    last = records[-1]
    assert isinstance(last, VersionCommitted)
    of_one = dataclasses.replace(last, contributions=last.contributions[:1])
    assert "round-size" in findings(bench, [*records[:-1], of_one], since=rejected)
