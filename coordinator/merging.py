"""The plan of a merge: which updates make version v, and with which weights. Pure; the tensors are elsewhere.

Notation: x is the master (float32), delta_i the i-th update of a round, n_i its examples, tau_i its staleness, s the
staleness function, p the size power.

Which updates are in a round is a matter of who came when. In which order they are added up is not (`in_order`): a sum
in float32 depends on it, and the same updates shall give the same model whoever was the first.

sync and fedbuff: x <- server optimizer(x, mean), where the mean follows from `rule`:

mean: sum_i w_i s(tau_i) delta_i / sum_i w_i, both sums over the updates that hold the tensor, or with `missing` "zero"
the lower one over all of the round, so that a site weighs the same in each tensor; w_i = n_i^p. A tensor that no update
of the round holds is not moved either way, by no momentum either. With a `clip_norm` C,
delta_i min(1, C / |delta_i|) stands for delta_i, with the norm over all its tensors, so that no site moves the mean by
more than its share of C (Sun et al., arXiv 1911.07963). With p = 1 and s = 1 this is FedAvg (McMahan et al., arXiv
1602.05629, algorithm 1); with p = 0 it is FedBuff (Nguyen et al., arXiv 2106.06639, algorithm 1). s stands above the
line only: lateness damps the step. Were it below too, a buffer in which all are equally late would step as far as a
fresh one.

With `quality` the loss l_i that the i-th site's model had on the coordinator's own notes decides as well, as in
Fed-MedLoRA+ (arXiv 2601.22124): w_i = exp(1 - l_i) (exp-loss, as its code has it; the 1 falls out) or w_i = n_i^p
exp(-l_i / T) (size-exp-loss, as its text has it). Both are formed relative to the lowest loss of the round, as large
ones would underflow.

ca2fl: sum_i h_i / N + sum_i s(tau_i) (delta_i - h_i) / K, where h_i is the update of the site that was merged last
before this round, zero where there is none; N counts the sites that were merged before or are now, K the updates now
(Wang et al., "Tackling the Data Heterogeneity in Asynchronous Federated Learning with Cached Update Calibration", ICLR
2024, algorithm 2, there without s). So a slow site goes on speaking through what it said last. Of a tensor, those sites
and updates are counted that hold it.

median, trimmed-mean, krum, multi-krum (`coordinator.robust`): of the s(tau_i) delta_i, clipped where wished. As in
ca2fl every update counts alike. A round of fewer updates than Krum can judge is merged by their median, and a record
says so.

fedasync: one update, x <- (1 - a_t) x + a_t (y + delta), where y is the published state that the site started from
and a_t = alpha s(tau) (Xie et al., arXiv 1903.03934, algorithm 1). No server optimizer: mixing is the optimizer.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import assert_never

from coordinator.exact import exp, power
from coordinator.ledger import Known
from coordinator.records import Accepted, Anchored, Contribution, Record, Substituted, VersionCommitted
from coordinator.robust import KRUMS
from coordinator.staleness import staleness_weight
from shared.config import AggregationSection, MergeRule, Missing, Mode
from shared.ids import DigestHex, Ident, TransferId
from shared.manifest import Manifest


@dataclass(frozen=True, slots=True)
class PlannedContribution:
    """One update's part, before its tensors are known."""

    update_id: TransferId
    site: Ident
    base_version: int
    base: tuple[TransferId, ...]
    """Transfers that make up the published state that the site started from."""
    staleness: int
    examples: int
    numerator: float
    """w s(tau), times C / |delta| where that is less than 1; for fedasync a_t. 0 where Krum did not choose it."""
    denominator: float
    """w; 1 for fedasync and where every update counts alike. 0 where Krum did not choose it."""


@dataclass(frozen=True, slots=True)
class CachedUpdate:
    """The update of a site that was merged last before this round."""

    update_id: TransferId
    site: Ident


@dataclass(frozen=True, slots=True)
class MergePlan:
    """How `version` follows from `base_version`, the version before it."""

    version: int
    base_version: int
    before: tuple[TransferId, ...]
    """Transfers that make up the published state of that version."""
    mode: Mode
    rule: MergeRule
    """That of the federation, or what stands in for it."""
    alpha: float
    """Mixing rate of fedasync before staleness; unused elsewhere."""
    contributions: tuple[PlannedContribution, ...]
    """In the order of addition."""
    cached: tuple[CachedUpdate, ...] = ()
    """For ca2fl, by site."""
    missing: Missing = "omit"

    @property
    def latest(self) -> int:
        """The greatest staleness of the updates that count."""
        return max(each.staleness for each in self.contributions if each.denominator > 0)

    def recorded(self) -> tuple[Contribution, ...]:
        """The contributions as VersionCommitted stores them; weight = numerator / sum of all denominators."""
        total = _total(each.denominator for each in self.contributions)
        return tuple(
            Contribution(
                update_id=each.update_id,
                site=each.site,
                base_version=each.base_version,
                staleness=each.staleness,
                weight=each.numerator / total,
            )
            for each in self.contributions
        )


@dataclass(frozen=True, slots=True)
class MergeResult:
    """What a merge left on disk, durably."""

    state: Manifest
    """Of the published state, or of the step to it; its transfer id is the head of its file's digest."""
    master_digest: DigestHex
    optimizer_digest: DigestHex | None
    """Digest of the server optimizer's slots; None where it has none."""
    contributions: tuple[Contribution, ...]
    """What each update of the round counted."""
    anchor: Manifest | None = None
    """Of the published state whole, besides a step; None where its turn has not come."""


def in_order(accepted: Iterable[Accepted]) -> list[Accepted]:
    """Return a round's updates in the order in which they are added up: by site, then base version, then id."""
    return sorted(accepted, key=lambda update: (update.site, update.base_version, update.update_id))


def rule_for(section: AggregationSection, updates: int) -> MergeRule:
    """Return the rule by which a round of so many updates is merged: Krum's needs `krum_min`, else the median is taken.

    The median bears f hostile updates of 2 f + 1; of fewer no rule could tell which are.
    """
    return "median" if section.rule in KRUMS and updates < section.krum_min else section.rule


def last_merged(known: Mapping[str, Known]) -> dict[Ident, TransferId]:
    """Return the update of each site that was merged last, of several in one version the one that was added last."""
    last: dict[str, tuple[tuple[int, int, str], str]] = {}
    for update_id, life in known.items():
        if life.outcome == "merged":
            assert life.version is not None
            assert life.staleness is not None
            rank = (life.version, -life.staleness, update_id)
            if life.site not in last or last[life.site][0] < rank:
                last[life.site] = (rank, update_id)
    return {site: update_id for site, (_rank, update_id) in sorted(last.items())}


def given_up(known: Mapping[str, Known], pruned: int, section: AggregationSection) -> frozenset[TransferId]:
    """Return the updates whose bytes went when those merged up to version `pruned` did: all that no later merge reads.

    By `ca2fl` the next merge takes back each site's last one.
    """
    old = {each: life for each, life in known.items() if life.outcome == "merged" and (life.version or 0) <= pruned}
    read = last_merged(old).values() if section.rule == "ca2fl" else ()
    return frozenset(old) - frozenset(read)


def plan_merge(
    version: int,
    accepted: Sequence[Accepted],
    section: AggregationSection,
    parts: Callable[[int], tuple[TransferId, ...]],
    *,
    known: Mapping[str, Known] = MappingProxyType({}),
    losses: Mapping[str, float] = MappingProxyType({}),
) -> MergePlan:
    """Return the plan that makes `version` out of `version - 1` and `accepted`, given in the order of addition.

    That is `in_order` for a new version, and what the journal recorded for one that is made again. `parts` names the
    transfers that make up the published state of a version (`Ledger.parts`), `known` says what became of all updates so
    far, and `losses` has those of the accepted ones where the federation weighs by them.
    """
    assert version >= 1
    assert accepted, f"version {version} has nothing to merge"
    assert section.mode != "fedasync" or len(accepted) == 1, "fedasync merges one update at a time"
    assert len({update.update_id for update in accepted}) == len(accepted), "an update may count once only"
    cached = last_merged(known) if section.rule == "ca2fl" else {}
    return MergePlan(
        version=version,
        base_version=version - 1,
        before=parts(version - 1),
        mode=section.mode,
        rule=rule_for(section, len(accepted)),
        alpha=section.alpha,
        contributions=tuple(
            _planned(version, update, section, parts, weight)
            for update, weight in zip(accepted, _weights(accepted, section, losses), strict=True)
        ),
        cached=tuple(CachedUpdate(update_id, site) for site, update_id in cached.items()),
        missing=section.missing,
    )


def committed(plan: MergePlan, result: MergeResult, section: AggregationSection, at: float) -> Iterator[Record]:
    """Yield what is written down of the version that was made by a plan."""
    if plan.rule != section.rule:
        yield Substituted(plan.version, plan.rule, len(plan.contributions), section.krum_min, at)
    yield VersionCommitted(
        version=plan.version,
        contributions=result.contributions,
        state=result.state.to_bytes(),
        master_digest=result.master_digest,
        optimizer_digest=result.optimizer_digest,
        at=at,
    )
    if result.anchor is not None:
        yield Anchored(plan.version, result.anchor.to_bytes(), at)


def choosing(plan: MergePlan, chosen: Collection[TransferId]) -> MergePlan:
    """Return the plan in which none but the `chosen` updates count."""
    parts = (
        part if part.update_id in chosen else dataclasses.replace(part, numerator=0.0, denominator=0.0)
        for part in plan.contributions
    )
    return dataclasses.replace(plan, contributions=tuple(parts))


def coefficients(plan: MergePlan, holders: Collection[TransferId]) -> dict[TransferId, float]:
    """Return what the delta of each update is multiplied by in the mean of a tensor that the `holders` hold.

    Cached updates included; empty when no update of the round that counts holds the tensor.
    """
    counted = [part for part in plan.contributions if part.update_id in holders and part.denominator > 0]
    weighed = plan.contributions if plan.missing == "zero" else counted
    total = _total(part.denominator for part in weighed)
    factors = {part.update_id: part.numerator / total for part in counted}
    cached = [each for each in plan.cached if each.update_id in holders] if counted else []
    sites = len({part.site for part in counted} | {each.site for each in cached})
    for each in cached:
        factors[each.update_id] = 1 / sites - _total(
            factors[part.update_id] for part in counted if part.site == each.site
        )
    return factors


def _weights(accepted: Sequence[Accepted], section: AggregationSection, losses: Mapping[str, float]) -> Iterator[float]:
    """The w of each update."""
    if section.mode == "fedasync" or section.rule != "mean":
        yield from itertools.repeat(1.0, len(accepted))
        return
    lowest = 0.0 if section.quality == "none" else min(losses[update.update_id] for update in accepted)
    for update in accepted:
        size = power(update.examples, section.size_power)
        match section.quality:
            case "none":
                yield size
            case "exp-loss":
                yield exp(lowest - losses[update.update_id])
            case "size-exp-loss":
                yield size * exp((lowest - losses[update.update_id]) / section.temperature)
            case _:
                assert_never(section.quality)


def _planned(
    version: int,
    update: Accepted,
    section: AggregationSection,
    parts: Callable[[int], tuple[TransferId, ...]],
    weight: float,
) -> PlannedContribution:
    tau = version - 1 - update.base_version
    assert tau >= 0, f"update {update.update_id} starts from version {update.base_version}, which does not exist yet"
    damping = staleness_weight(section.staleness, tau)
    scale = section.alpha if section.mode == "fedasync" else weight * _clipping(update.norm, section.clip_norm)
    return PlannedContribution(
        update_id=update.update_id,
        site=update.site,
        base_version=update.base_version,
        base=parts(update.base_version),
        staleness=tau,
        examples=update.examples,
        numerator=scale * damping,
        denominator=weight,
    )


def _clipping(norm: float, limit: float | None) -> float:
    """The factor that brings an update of this norm down to the limit."""
    return 1.0 if limit is None or norm <= limit else limit / norm


def _total(values: Iterable[float]) -> float:
    """The sum, rounded after each addition; `sum` rounds otherwise from Python 3.12 on, and a replay compares bits."""
    total = 0.0
    for value in values:
        total += value
    return total
