"""The blocks that matter most, by scores in the metrics of updates: one rule for a site's own choice and for all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from shared.manifest import IMPORTANCE
from shared.plan import Blocks

Vote = tuple[float, Mapping[str, float]]
"""The weight of an update, and its metrics."""


def score_name(block: int) -> str:
    """Return the metric that says how much a block matters to a site's notes."""
    return f"{IMPORTANCE}{block}"


def best(votes: Iterable[Vote], candidates: Blocks, count: int) -> Blocks:
    """Return the `count` candidates, ascending, with the greatest weighted sum of shares; none without any score.

    Of equal ones the higher is taken, which costs less to train. Scores below 0 and of other blocks count for nothing.
    """
    sums = dict.fromkeys(candidates, 0.0)
    for weight, metrics in votes:
        scores = {block: max(0.0, metrics.get(score_name(block), 0.0)) for block in candidates}
        greatest = max(scores.values())
        if greatest > 0:
            # Divided by the greatest first: a sum of huge numbers is infinite.
            total = sum(score / greatest for score in scores.values())
            for block, score in scores.items():
                sums[block] += weight * (score / greatest / total)
    if not any(sums.values()):
        return ()
    return tuple(sorted(sorted(candidates, key=lambda block: (-sums[block], -block))[:count]))
