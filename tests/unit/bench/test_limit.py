"""The bound below a round, on a model of a few thousand parameters."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.limit import MAILBOAT, Steps, steps
from bench.peers.work import Work
from shared.config import StateCodecName


@pytest.mark.parametrize("codec", MAILBOAT)
def test_each_step_of_a_round_is_taken_as_often_as_a_round_takes_it(codec: StateCodecName, tmp_path: Path) -> None:
    """At each site once, at the coordinator once an update or once a version; nothing is left that was not deleted."""
    work = Work(str(tmp_path), 3, 60_000, 12, 1, 0.0)
    work.save()
    found = steps(tmp_path, codec, work, 1)
    assert found.times.keys() == found.seconds.keys()
    assert {name: times for name, times in found.times.items() if not name.startswith("site")} == {
        "coordinator: take an update in": 3,
        "coordinator: verify it": 3,
        "coordinator: merge and publish": 1,
        "coordinator: read the state to send it": 1,
        "sockets": 1,
    }
    assert {times for name, times in found.times.items() if name.startswith("site")} == {3}
    assert len(found.times) == 11
    assert len([*(tmp_path / "coordinator" / "updates").glob("*.frames")]) == 3
    assert not [*(tmp_path / "updates").glob("*.frames")]


def test_the_sum_counts_each_step_as_often_as_it_is_taken() -> None:
    """And of several measurements the least."""
    found = Steps(2)
    spent = iter([30, 0])
    found.take("uneven", 4, lambda: [pow(7, number, 1009) for number in range(next(spent) * 100_000)])
    assert found.seconds["uneven"] < 0.05
    found.seconds |= {"uneven": 0.25, "other": 2.0}
    found.times["other"] = 1
    assert found.total == 3.0
