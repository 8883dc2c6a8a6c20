"""A slice of the chaotic runs: a few seconds of them, with a kill at a commit point on either side."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path

import pytest

from broker.launcher import find_mosquitto
from coordinator.records import VersionCommitted
from mailboat.flaky import Conditions
from shared.faultpoint import BOTH, COORDINATOR, SITE
from tests.chaos import checks
from tests.chaos.conduct import Outcome, conduct
from tests.chaos.disks import may_mount
from tests.chaos.plan import BROKER, COORDINATOR_NAME, Fault, Plan, absent_plan, make_plan

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(400),
    pytest.mark.skipif(find_mosquitto() is None, reason="Mosquitto is not installed: apt-get install mosquitto"),
]


def small_plan(*faults: Fault, points: dict[str, tuple[str, ...]] | None = None, disks: tuple[str, ...] = ()) -> Plan:
    """One site, two versions, good links."""
    return Plan(
        seed=0,
        mode="sync",
        sites=1,
        versions=2,
        parameters=20_000,
        slice_kib=16,
        window=4,
        queue_max=1000,
        sealed=False,
        training_s=0.1,
        links={name: Conditions() for name in (COORDINATOR_NAME, "site-1")},
        points=points or {},
        faults=faults,
        disks=disks,
    )


def hold(root: Path, plan: Plan) -> Outcome:
    """Run it; everything that the checks look at must hold."""
    outcome = asyncio.run(conduct(root, plan))
    assert outcome.problems == []
    return outcome


def test_killed_at_commit_points_nothing_is_lost(tmp_path: Path) -> None:
    """Coordinator and site die at four commit points, the broker forgets everything: each sealed update counts once."""
    lives: dict[str, tuple[str, ...]] = {
        COORDINATOR_NAME: ("chunks-sync.after:1", "journal-accepted.after:1"),
        "site-1": ("seal.after:1", "settle.middle:1"),
    }
    outcome = hold(tmp_path, small_plan(Fault(0.5, "forget", BROKER, 0.2), points=lives))
    assert [death.how for death in outcome.deaths if death.name == COORDINATOR_NAME] == [*lives[COORDINATOR_NAME]]
    assert [death.how for death in outcome.deaths if death.name == "site-1"] == [*lives["site-1"]]
    assert outcome.kills == 5


@pytest.mark.skipif(not may_mount(), reason="a small disk takes root to mount")
def test_a_full_disk_holds_the_coordinator_and_room_lets_it_go_on(tmp_path: Path) -> None:
    """Without room it waits, or, when it cannot even start, ends with status 4; with room the run comes to its end."""
    faults = (Fault(0.5, "full", COORDINATOR_NAME, 3.0), Fault(0.5, "kill", "site-1"))
    outcome = hold(tmp_path, small_plan(*faults, disks=(COORDINATOR_NAME,)))
    assert {death.how for death in outcome.deaths} <= {"kill", "exit 4"}


def test_a_site_that_was_away_for_many_versions_hears_of_its_update(tmp_path: Path) -> None:
    """It died with a sealed update, missed twenty versions, and comes back: the update is merged, as late as it is."""
    hold(tmp_path, absent_plan(20))
    (first, *_) = sorted(checks.receipts(tmp_path, "site-2").values(), key=lambda told: told["base_version"])
    assert (first["base_version"], first["outcome"]) in {(0, "accepted"), (0, "merged")}
    committed = [fact for fact in checks.records(tmp_path) if isinstance(fact, VersionCommitted)]
    staleness = [part.staleness for fact in committed for part in fact.contributions]
    assert max(staleness) >= 20


def test_the_checks_find_what_they_look_for(tmp_path: Path) -> None:
    """An update without receipt, litter, a traceback and a tampered trail are each reported."""
    plan = small_plan()
    hold(tmp_path, plan)
    (receipt, *_) = (tmp_path / "site-1" / "receipts").glob("*.json")
    receipt.unlink()
    litter = tmp_path / COORDINATOR_NAME / "updates" / f"{'ab' * 16}.frames"
    litter.write_bytes(b"x")
    (tmp_path / "site-1.log").write_text("Traceback (most recent call last)")
    trail = tmp_path / COORDINATOR_NAME / "audit.jsonl"
    trail.write_bytes(trail.read_bytes().replace(b'"version":1', b'"version":7', 1))
    found = "\n".join(checks.check(tmp_path, plan, {"site-1": {receipt.stem, "cd" * 16}}, "no such token"))
    for said in (f"{receipt.stem} and has no receipt", "cdcd", "abab", "site-1.log has a traceback", "audit verify"):
        assert said in found
    assert "audit replay" not in found


def test_a_seed_makes_one_plan() -> None:
    """The same seed gives the same plan, another seed another; a row of seeds passes every commit point."""
    assert make_plan(7) == make_plan(7)
    assert dataclasses.replace(make_plan(7), seed=8) != make_plan(8)
    lives = [make_plan(seed).points for seed in range(12)]
    for names, points in (((COORDINATOR_NAME,), {*BOTH, *COORDINATOR}), (("site-1", "site-2"), {*BOTH, *SITE})):
        drawn = {life.rpartition(":")[0] for each in lives for name in names for life in each[name]}
        assert drawn == points
