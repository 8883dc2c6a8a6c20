"""Which blocks matter most, by hand."""

from __future__ import annotations

import pytest

from shared.plan import Blocks
from shared.selection import Vote, best


def vote(weight: float, **scores: float) -> Vote:
    """A site's word: `b3=2.0` scores block 3."""
    return weight, {f"importance/{name[1:]}": score for name, score in scores.items()}


@pytest.mark.parametrize(
    ("votes", "count", "chosen"),
    [
        ([vote(1.0, b3=5.0, b4=1.0, b5=2.0)], 2, (3, 5)),
        # Shares 0.9 and 0.1 against 0.2 and 0.8: of equal weight 1.1 beats 0.9, whatever the gradients' size.
        ([vote(1.0, b3=9.0, b4=1.0), vote(1.0, b3=2e6, b4=8e6)], 1, (3,)),
        # With weights 1 and 2: 0.9 + 0.4 against 0.1 + 1.6.
        ([vote(1.0, b3=9.0, b4=1.0), vote(2.0, b3=2.0, b4=8.0)], 1, (4,)),
        ([vote(1.0, b3=1.0, b4=1.0, b5=1.0)], 2, (4, 5)),
        ([vote(1.0, b3=1.0), vote(1.0)], 2, (3, 5)),
        ([vote(1.0, b3=1e308, b4=1e308, b5=1e300)], 1, (4,)),
        ([vote(1.0, b3=-5.0, b4=0.1), vote(1.0, b9=1.0)], 1, (4,)),
        ([vote(1.0, b3=0.0)], 1, ()),
        ([vote(1.0)], 1, ()),
        ([], 1, ()),
    ],
)
def test_the_greatest_sum_of_shares(votes: list[Vote], count: int, chosen: Blocks) -> None:
    """Of candidates 3, 4 and 5; equal ones from the top; what is negative, foreign or absent counts for nothing."""
    assert best(votes, (3, 4, 5), count) == chosen
