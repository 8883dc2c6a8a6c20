"""The bench of merges gives the coordinator's own merge many updates of few contents."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bench.merge import DISTINCT, make_run, measure, memory_rate, repeat


def test_repeated_updates_merge_to_the_mean_of_their_contents(tmp_path: Path) -> None:
    """Sixteen names of eight contents move the master as far as the eight do; each is an update of its own."""
    run, accepted = make_run(tmp_path, 1600, "f32")
    assert len(accepted) == DISTINCT
    many = repeat(run, accepted, 2 * DISTINCT)
    assert len({each.update_id for each in many}) == len({each.site for each in many}) == 2 * DISTINCT
    row = measure(run, many, 1600, turns=1)
    twice = run.master(1)
    run.run_plan(run.planned(accepted))
    for name, values in run.master(1).items():
        np.testing.assert_allclose(twice[name], values, rtol=1e-6, atol=1e-9)
    assert (row["updates"], row["parameters_per_s"] > 0, row["peak_bytes"] >= 0) == (16, True, True)


def test_what_the_memory_can_do_is_a_rate() -> None:
    """Of a few blocks, too."""
    assert memory_rate(1 << 18) > 0
