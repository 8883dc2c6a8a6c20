"""Whole runs in the false world: safety at every step, and an end once the faults stop."""

from __future__ import annotations

import pytest

from shared.config import Mode
from tests.factories import make_federation
from tests.sim.world import Faults, World

SITES = ["a", "b", "c"]
STORM = Faults(drop=0.05, double=0.05, delay_s=0.5, site_crash=0.01, coordinator_crash=0.01, link_cut=0.03)


def _run(mode: Mode, seed: int, faults: Faults) -> World:
    federation = make_federation(
        federation={"name": "ward", "versions": 6},
        aggregation={"mode": mode, "quorum": 2, "buffer": 2, "deadline_s": 60.0},
    )
    world = World(federation, SITES, seed=seed, faults=faults)
    world.run(120)
    world.start_coordinator()
    world.calm = True
    world.run(900)
    return world


@pytest.mark.parametrize("mode", ["sync", "fedbuff", "fedasync"])
def test_a_perfect_world_ends_with_every_update_merged_or_answered(mode: Mode) -> None:
    """Without faults every mode reaches its last version, and every sealed update has its outcome at the site."""
    world = _run(mode, 1, Faults())
    assert world.done
    assert world.core is not None
    assert world.core.ledger.version == 6
    for host in world.hosts.values():
        assert set(host.receipts) == set(host.sealed)
        assert host.left is not None
        assert host.left.rule is None


@pytest.mark.parametrize("mode", ["sync", "fedbuff", "fedasync"])
@pytest.mark.parametrize("seed", range(40))
def test_a_stormy_world_loses_nothing_and_ends_after_the_storm(mode: Mode, seed: int) -> None:
    """Drops, doubles, delays, crashes and cuts: safety holds throughout, and calm brings the run to its end."""
    world = _run(mode, seed, STORM)
    assert world.done, f"seed {seed}: still waiting for {[h.name for h in world.hosts.values() if h.left is None]}"
    assert world.core is not None
    for host in world.hosts.values():
        assert set(host.receipts) == set(host.sealed), f"seed {seed}: an update of {host.name} has no answer"
