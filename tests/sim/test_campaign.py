"""A campaign goes on where it was stopped, and counts each world once."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from tests.sim import campaign, runner
from tests.sim.world import World, run_world


def test_ranges_leave_out_what_is_done() -> None:
    """Whatever order the ranges were done in."""
    done = [(10, 14), (0, 4), (5, 6)]
    assert list(campaign.open_ranges(range(20), done, 3)) == [(7, 9), (15, 17), (18, 19)]
    assert list(campaign.open_ranges(range(5), done, 3)) == []
    assert list(campaign.open_ranges(range(3, 9), [], 4)) == [(3, 6), (7, 8)]


def test_a_campaign_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    """The second call runs the rest alone; the sums are those of one call, and the file reads back as it was."""
    path = tmp_path / "campaign.json"
    campaign.save(path, campaign.run_range("c", 0, 1).plain())
    went_on = campaign.run([range(4)], 1, path, "c")
    assert went_on.ranges == [(0, 3)]
    assert went_on.count == sum(went_on.worlds.values()) == 4
    at_once = campaign.run_range("c", 0, 3)
    assert (went_on.faults, went_on.updates, went_on.versions) == (at_once.faults, at_once.updates, at_once.versions)
    assert campaign.load(path, "c").plain() == went_on.plain()


def test_a_campaign_belongs_to_one_commit(tmp_path: Path) -> None:
    """Worlds of other code are not added up."""
    path = tmp_path / "campaign.json"
    campaign.save(path, campaign.Result("a").plain())
    with pytest.raises(SystemExit, match="campaign of commit a, this is b"):
        campaign.load(path, "b")


def test_a_failing_seed_is_kept_and_the_rest_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """One bad world among others."""

    def broken(seed: int) -> World:
        if seed == 1:
            msg = "lost"
            raise AssertionError(msg)
        return run_world(seed)

    monkeypatch.setattr(campaign, "run_world", broken)
    result = campaign.run_range("c", 0, 2)
    assert [(failure.seed, failure.what) for failure in result.failures] == [(1, "AssertionError: lost")]
    assert result.count == 3
    assert "--seed 1 --trace" in str(result.failures[0])


def test_a_result_does_not_replace_one_of_more_worlds(tmp_path: Path) -> None:
    """A short run leaves the published figures alone."""
    path = tmp_path / "sim.json"
    many, few = campaign.Result("a", worlds=Counter(sync=5), ranges=[(0, 4)]), campaign.Result("b")
    runner.publish(path, many)
    runner.publish(path, few)
    assert json.loads(path.read_bytes())["commit"] == "a"
