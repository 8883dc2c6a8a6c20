"""How updates become the next version: the `[aggregation]` of `federation.toml`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from shared.config.section import Positive, Section

Mode = Literal["sync", "fedbuff", "fedasync"]
StalenessKind = Literal["constant", "hinge", "polynomial"]
Quality = Literal["none", "exp-loss", "size-exp-loss"]
Missing = Literal["omit", "zero"]
MergeRule = Literal["mean", "ca2fl", "median", "trimmed-mean", "krum", "multi-krum"]
ServerOptimizerName = Literal["sgd", "momentum", "nesterov", "adam", "yogi", "fadas", "delayed-nesterov"]


class StalenessSection(Section):
    """s(tau): how much an update counts that is tau versions late."""

    kind: StalenessKind = "polynomial"
    a: Positive | None = None
    """Exponent (polynomial, 0.5) or slope (hinge, 10)."""
    b: Annotated[float, Field(ge=0)] | None = None
    """Hinge: versions of lateness that cost nothing (4)."""
    limit: int = Field(default=1000, ge=0)
    """Updates later than this are rejected under the rule too-stale."""


class ServerSection(Section):
    """The server optimizer over the mean delta."""

    optimizer: ServerOptimizerName = "sgd"
    lr: Positive | None = None
    """The step's size; None takes what the optimizer's authors start from, see `rate`."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Share of the running mean that is kept: beta, or beta_1 of those with two; sgd has none."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """adam, yogi, fadas: share of the running square that is kept."""
    eps: Positive = 1e-3
    """adam, yogi, fadas: added to the root of the running square; the smaller, the more alike all steps."""
    slow_after: int = Field(default=4, ge=0, le=1_000_000)
    """fadas: with an update later than this many versions the step is divided by its lateness."""
    every: int = Field(default=5, ge=1, le=1_000_000)
    """delayed-nesterov: versions from one step of the momentum to the next."""

    @property
    def rate(self) -> float:
        """`lr`, or the default of the optimizer.

        sgd and momentum: 1, so that sgd is FedAvg. nesterov, delayed-nesterov: 0.7 (Douillard et al., arXiv
        2311.08105). adam 0.1, yogi 0.01 (Reddi et al., arXiv 2003.00295). fadas 0.001 (Wang et al., arXiv 2407.18365).
        """
        return SERVER_RATES[self.optimizer] if self.lr is None else self.lr


SERVER_RATES: Mapping[ServerOptimizerName, float] = MappingProxyType(
    {
        "sgd": 1.0,
        "momentum": 1.0,
        "nesterov": 0.7,
        "adam": 0.1,
        "yogi": 0.01,
        "fadas": 0.001,
        "delayed-nesterov": 0.7,
    }
)


class AggregationSection(Section):
    """When a round closes and how its updates are weighted."""

    mode: Mode = "sync"
    quorum: int = Field(default=1, ge=1, le=100_000)
    """Fewest sites that must have answered, with an update or with one that is rejected, to close a sync round; it also
    waits for every site present, up to the deadline."""
    buffer: int = Field(default=3, ge=1, le=100_000)
    """K of FedBuff."""
    alpha: Annotated[float, Field(gt=0, le=1)] = 0.6
    """Mixing rate of FedAsync."""
    size_power: Annotated[float, Field(ge=0, le=1)] = 1.0
    """p in weight = examples^p; 1 is FedAvg, 0 counts every update alike."""
    rule: MergeRule = "mean"
    """What stands for a round's updates: their weighted mean. Or, every update counting alike, the mean corrected by
    what each site sent before (ca2fl), for each number the median or the mean without the outermost, the one update
    that is closest to the others (krum), or the mean without those that are farthest from them (multi-krum)."""
    quality: Quality = "none"
    """Whether an update counts by how well its site's model does on the coordinator's own notes (Fed-MedLoRA+), by its
    loss l there: "exp-loss" weighs by exp(1 - l) and no size, "size-exp-loss" by examples^p exp(-l / temperature)."""
    temperature: Positive = 1.0
    """T of size-exp-loss: the smaller, the more the best update counts."""
    byzantine: int = Field(default=1, ge=1, le=1000)
    """f of Krum: updates of a round that may be wrong or hostile."""
    trim: Annotated[float, Field(gt=0, lt=0.5)] = 0.2
    """Share of the updates that the trimmed mean leaves out at each end, rounded down."""
    missing: Missing = "omit"
    """What an update says of a tensor that it lacks, as its site trains fewer blocks: nothing, it has no part in that
    tensor's mean ("omit"); or that the site left it as it was ("zero")."""
    clip_norm: Positive | None = None
    """An update whose L2 norm, over all its tensors, is above this is scaled down to it; None leaves it as it is."""
    deadline_s: Positive = 3600.0
    """A round that has any update at all closes after this long (sync: only with the quorum)."""
    staleness: StalenessSection = StalenessSection()
    server: ServerSection = ServerSection()

    @property
    def krum_min(self) -> int:
        """Fewest updates that Krum can judge: 2 f + 3 (Blanchard et al., NIPS 2017)."""
        return 2 * self.byzantine + 3

    @property
    def fewest(self) -> tuple[int, str]:
        """Fewest updates of a round of which the rule leaves any out, and the formula that says so."""
        match self.rule:
            case "krum" | "multi-krum":
                return self.krum_min, "2 byzantine + 3"
            case "trimmed-mean":
                # As `trimmed` of the coordinator rounds: of 5 updates a share of 0.2 is one.
                return math.ceil((1 - 1e-9) / self.trim), "1 / trim"
            case _:
                return 1, "1"

    @model_validator(mode="after")
    def _rules_fit(self) -> Self:
        if self.mode == "fedbuff":
            self.check_enough(self.buffer, f"buffer = {self.buffer}")
        if self.rule == "ca2fl" and self.clip_norm is not None:
            raise ValueError('clip_norm has no meaning with rule = "ca2fl", which takes back what it added before')
        if self.missing == "zero" and (self.rule != "mean" or self.mode == "fedasync"):
            msg = 'missing = "zero" is for a weighted mean: it needs rule = "mean", and mode "sync" or "fedbuff"'
            raise ValueError(msg)
        if self.quality != "none" and (self.rule != "mean" or self.mode == "fedasync"):
            msg = f'quality = "{self.quality}" weighs a mean: it needs rule = "mean", and mode "sync" or "fedbuff"'
            raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _fedasync_mixes(self) -> Self:
        if self.mode == "fedasync" and (self.server.optimizer != "sgd" or self.server.lr is not None):
            raise ValueError('[aggregation.server] has no meaning with mode = "fedasync", which mixes by alpha')
        if self.mode == "fedasync" and self.clip_norm is not None:
            raise ValueError('clip_norm has no meaning with mode = "fedasync", which mixes whole states')
        if self.mode == "fedasync" and self.rule != "mean":
            raise ValueError(f'rule = "{self.rule}" needs several updates, mode = "fedasync" merges one at a time')
        return self

    def check_enough(self, updates: int, because: str) -> None:
        """Raise ValueError when no round of at most so many updates, `because` of what is said, can follow the rule."""
        needed, formula = self.fewest
        if updates < needed:
            msg = f'rule = "{self.rule}" needs {needed} updates in a round or more ({formula}), and {because}'
            raise ValueError(msg)
