"""When the blocks of all sites are chosen, and when the choice stands."""

from __future__ import annotations

import pytest

from coordinator.selection import next_blocks
from shared.plan import Blocks
from tests.factories import make_federation, make_plan

SEALED = make_plan(make_federation()).model_copy(update={"layers": (1, 2, 3), "at_once": 1})
VOTES = [(1.0, {"importance/2": 1.0})]


@pytest.mark.parametrize(
    ("before", "votes", "base_version", "rechoose", "chosen"),
    [
        (None, VOTES, 0, 0, (2,)),
        (None, [], 0, 0, None),
        (None, VOTES, 3, 0, (2,)),  # nobody had measured so far: late sites in an asynchronous run
        ((1,), VOTES, 3, 0, (1,)),
        ((1,), VOTES, 3, 2, (1,)),
        ((1,), VOTES, 4, 2, (2,)),
        ((1,), [], 4, 2, (1,)),
    ],
)
def test_the_choice_is_made_once_or_anew(
    before: Blocks | None, votes: list[tuple[float, dict[str, float]]], base_version: int, rechoose: int, chosen: Blocks
) -> None:
    """As soon as there are scores, then after each so many-th version; without scores it stays."""
    found = next_blocks(before, votes, base_version=base_version, rechoose=rechoose, sealed=SEALED)
    assert found == chosen


def test_other_plans_choose_nothing() -> None:
    """Scores in an update of a federation that trains fixed blocks are numbers like any."""
    fixed = SEALED.model_copy(update={"at_once": None})
    assert next_blocks(None, VOTES, base_version=0, rechoose=1, sealed=fixed) is None
