"""Which blocks all sites train next, where the federation's plan chooses them by importance. Pure.

Sites measure, on a published state and a few of their batches, how much each candidate block matters to their notes
(`edge_client.importance`), and tell it among the metrics of their update. The choice follows from the updates of one
round alone, so that everybody who has them can make it again: it stands in the header of the next master and state,
whose digests are in the journal.

Sites that all train the same blocks are the limit, for a large lambda, of Sun et al. (arXiv 2408.15600, section 5):
maximise the sum of the sites' squared gradient norms of the chosen blocks minus lambda times how much choices differ.
Unlike there, a site's scores are shares of its sum (`shared.selection`), so that no site outvotes the others by large
gradients, and they are weighted as its update is.
"""

from __future__ import annotations

from collections.abc import Iterable

from shared.plan import Blocks, SealedPlan
from shared.selection import Vote, best


def next_blocks(
    before: Blocks | None, votes: Iterable[Vote], *, base_version: int, rechoose: int, sealed: SealedPlan
) -> Blocks | None:
    """Return the blocks for the version after `base_version`, whose own are `before`; None while nobody has chosen.

    They stay what they are, but for each `rechoose`-th version (0: never) and where no scores came.
    """
    if sealed.at_once is None:
        return None
    if before is not None and not (rechoose and base_version % rechoose == 0):
        return before
    return best(votes, sealed.layers, sealed.at_once) or before
