"""When a round closes: sync, buffered-async (FedBuff) and fully async (FedAsync) as three rules over the same facts.

Sync (FedAvg, arXiv 1602.05629) closes when a quorum of sites has answered and every site that is present has; a site
answers with an update, or with one that is rejected; the deadline stands in for those present who do not come, and no
later round waits for them either until they have answered one in time.
FedBuff (arXiv 2106.06639) closes at K updates. FedAsync (arXiv 1903.03934) closes at each. None may wait for ever on
sites that will not come: a buffer that nobody present is going to fill closes early, and the deadline closes any round
that has something to merge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from coordinator.records import Accepted
from shared.config import AggregationSection


@dataclass(frozen=True, slots=True)
class RoundView:
    """The facts on which a round closes."""

    version: int
    """The version that everybody is to train on now."""
    pending: Sequence[Accepted]
    """Accepted and not yet merged, in acceptance order."""
    awaited: frozenset[str]
    """Sites connected now, but for those that missed a deadline and have answered no round in time since."""
    open_s: float
    """Seconds since this version was announced."""
    answered: frozenset[str]
    """Sites whose update on this version was rejected: they have answered, and are not waited for."""
    settled: bool
    """Whether presence can be trusted: sites had time to say hello since we started."""


def updates_to_merge(view: RoundView, section: AggregationSection) -> int:
    """Return how many of the pending updates, from the oldest, to merge now; 0 keeps the round open."""
    if not view.pending:
        return 0
    overdue = view.open_s >= section.deadline_s
    match section.mode:
        case "fedasync":
            return 1
        case "fedbuff":
            if len(view.pending) >= section.buffer:
                return section.buffer
            nobody_left = bool(view.awaited) and _everybody(view)
            return len(view.pending) if overdue or nobody_left else 0
        case "sync":
            if not overdue and not _everybody(view):
                return 0
            quorum = len(view.answered.union(update.site for update in view.pending)) >= section.quorum
            return len(view.pending) if quorum else 0


def punctuality(view: RoundView, section: AggregationSection) -> tuple[frozenset[str], frozenset[str]]:
    """Return who answered a round that closes now in time, and who was waited for to its deadline in vain."""
    contributed = _contributed(view)
    late = view.awaited - contributed if view.open_s >= section.deadline_s else frozenset[str]()
    return contributed, late


def _everybody(view: RoundView) -> bool:
    """Whether all that are awaited have contributed; their numbers mostly say no before anybody is looked at."""
    enough = view.settled and len(view.awaited) <= len(view.answered) + len(view.pending)
    return enough and view.awaited <= _contributed(view)


def _contributed(view: RoundView) -> frozenset[str]:
    return view.answered.union(update.site for update in view.pending if update.base_version == view.version)
