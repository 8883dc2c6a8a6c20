"""The plan of a merge: which updates make version v, and with which weights. Pure; the tensors are elsewhere.

Notation: x is the master (float32), delta_i the i-th update of a round, n_i its examples, tau_i its staleness, s the
staleness function, p the size power.

Which updates are in a round is a matter of who came when. In which order they are added up is not (`in_order`): a sum
in float32 depends on it, and the same updates shall give the same model whoever was the first.

sync and fedbuff: mean = sum_i n_i^p s(tau_i) delta_i / sum_i n_i^p, both sums over the updates that hold the tensor,
then x <- server optimizer(x, mean). With a `clip_norm` C, delta_i min(1, C / |delta_i|) stands for delta_i, with the
norm over all its tensors, so that no site moves the mean by more than its share of C (Sun et al., arXiv 1911.07963).
With p = 1 and s = 1 this is FedAvg (McMahan et al., arXiv 1602.05629, algorithm 1); with p = 0 it is
FedBuff (Nguyen et al., arXiv 2106.06639, algorithm 1). s stands above the line only: lateness
damps the step. Were it below too, a buffer in which all are equally late would step as far as a fresh one.

With a robust rule (`coordinator.robust`) every update counts alike: n^p is 1, and the median or trimmed mean of the
s(tau_i) delta_i, clipped where wished, takes the place of the mean.

fedasync: one update, x <- (1 - a_t) x + a_t (y + delta), where y is the published state that the site started from
and a_t = alpha s(tau) (Xie et al., arXiv 1903.03934, algorithm 1). No server optimizer: mixing is the optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from coordinator.records import Accepted, Anchored, Contribution, VersionCommitted
from coordinator.staleness import staleness_weight
from shared.config import AggregationSection, Mode
from shared.ids import Ident, Sha256Hex, TransferId
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
    """n^p s(tau), times C / |delta| where that is less than 1; for fedasync a_t."""
    denominator: float
    """n^p; 1 for fedasync and robust rules."""


@dataclass(frozen=True, slots=True)
class MergePlan:
    """How `version` follows from `base_version`, the version before it."""

    version: int
    base_version: int
    before: tuple[TransferId, ...]
    """Transfers that make up the published state of that version."""
    mode: Mode
    alpha: float
    """Mixing rate of fedasync before staleness; unused elsewhere."""
    contributions: tuple[PlannedContribution, ...]
    """In the order of addition."""

    @property
    def latest(self) -> int:
        """The greatest staleness in it."""
        return max(each.staleness for each in self.contributions)

    def recorded(self) -> tuple[Contribution, ...]:
        """The contributions as VersionCommitted stores them; weight = numerator / sum of all denominators."""
        total = sum(each.denominator for each in self.contributions)
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
    """Of the published state, or of the step to it; its transfer id is the head of its file's SHA-256."""
    master_sha256: Sha256Hex
    optimizer_sha256: Sha256Hex | None
    """Digest of the server optimizer's slots; None where it has none."""
    anchor: Manifest | None = None
    """Of the published state whole, besides a step; None where its turn has not come."""


def version_records(plan: MergePlan, result: MergeResult, at: float) -> list[VersionCommitted | Anchored]:
    """Return what the journal says of a version whose files are durable."""
    committed = VersionCommitted(
        version=plan.version,
        contributions=plan.recorded(),
        state=result.state.to_bytes(),
        master_sha256=result.master_sha256,
        optimizer_sha256=result.optimizer_sha256,
        at=at,
    )
    return [committed] if result.anchor is None else [committed, Anchored(plan.version, result.anchor.to_bytes(), at)]


def in_order(accepted: Iterable[Accepted]) -> list[Accepted]:
    """Return a round's updates in the order in which they are added up: by site, then base version, then id."""
    return sorted(accepted, key=lambda update: (update.site, update.base_version, update.update_id))


def plan_merge(
    version: int,
    accepted: Sequence[Accepted],
    section: AggregationSection,
    parts: Callable[[int], tuple[TransferId, ...]],
) -> MergePlan:
    """Return the plan that makes `version` out of `version - 1` and `accepted`, given in the order of addition.

    That is `in_order` for a new version, and what the journal recorded for one that is made again.
    `parts` names the transfers that make up the published state of a version (`Ledger.parts`).
    """
    assert version >= 1
    assert accepted, f"version {version} has nothing to merge"
    assert section.mode != "fedasync" or len(accepted) == 1, "fedasync merges one update at a time"
    assert len({update.update_id for update in accepted}) == len(accepted), "an update may count once only"
    return MergePlan(
        version=version,
        base_version=version - 1,
        before=parts(version - 1),
        mode=section.mode,
        alpha=section.alpha,
        contributions=tuple(_planned(version, update, section, parts) for update in accepted),
    )


def _planned(
    version: int, update: Accepted, section: AggregationSection, parts: Callable[[int], tuple[TransferId, ...]]
) -> PlannedContribution:
    tau = version - 1 - update.base_version
    assert tau >= 0, f"update {update.update_id} starts from version {update.base_version}, which does not exist yet"
    damping = staleness_weight(section.staleness, tau)
    alike = section.mode == "fedasync" or section.rule != "mean"
    size = 1.0 if alike else float(update.examples) ** section.size_power
    scale = section.alpha if section.mode == "fedasync" else size * _clipping(update.norm, section.clip_norm)
    return PlannedContribution(
        update_id=update.update_id,
        site=update.site,
        base_version=update.base_version,
        base=parts(update.base_version),
        staleness=tau,
        examples=update.examples,
        numerator=scale * damping,
        denominator=size,
    )


def _clipping(norm: float, limit: float | None) -> float:
    """The factor that brings an update of this norm down to the limit."""
    return 1.0 if limit is None or norm <= limit else limit / norm
