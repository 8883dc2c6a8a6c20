"""What is learnt, and how a site learns it: model, task, layers, codec and local training of `federation.toml`."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self, cast, get_args

from pydantic import Field, field_validator, model_validator

from shared.config.section import FOLDER_OR_ID, Positive, Section
from shared.ids import Sha256Hex

AdapterKind = Literal["none", "lora", "ffa-lora", "fedsa-lora", "fedex-lora"]
CodecName = Literal["f32", "bf16", "int8", "int4", "ternary", "topk2x4", "topk2"]
SPARSE: frozenset[CodecName] = frozenset({"ternary", "topk2x4", "topk2"})
"""Codecs under which most of an update is zero."""
_OWING: frozenset[CodecName] = frozenset({"topk2x4", "topk2"})
"""Codecs that send so little that what they leave out is sent later."""
StateCodecName = Literal["f32", "bf16", "int8", "int4"]
"""A model of which one value in 64 is known is none: the sparse codecs are for updates, and for steps."""
_STATE_CODECS = ", ".join(get_args(StateCodecName))
IMPORTANCE_PLAN = "importance:"
"""How plans begin under which sites measure which blocks to train."""
ImportanceName = Literal["gradient-norm", "relative-gradient-norm", "snr"]
TensorPattern = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.*?-]{1,256}$")]


class ModelSection(Section):
    """The pre-trained model that everybody starts from."""

    base: Annotated[str, FOLDER_OR_ID]
    """Local directory or hub id. Where it lies may differ per machine, so it stays out of the fingerprint."""
    revision: str = "main"
    frozen_sha256: Sha256Hex | None = None
    """Expected hash of the frozen weights; checked when given, and always part of the fingerprint as computed."""


class TaskSection(Section):
    """What is learnt."""

    kind: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,63}$")] = "ner"
    """Name of a task that is installed where models are loaded; a coordinator's host needs none of it."""
    labels: tuple[Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")], ...] = ("problem", "treatment", "test")
    max_length: int = Field(default=192, ge=8, le=8192)
    """Tokens per training window."""

    @field_validator("labels")
    @classmethod
    def _distinct(cls, labels: tuple[str, ...]) -> tuple[str, ...]:
        if not labels or len(set(labels)) != len(labels):
            msg = "labels must be distinct and at least one"
            raise ValueError(msg)
        return labels


class LayersSection(Section):
    """Which layers are trained and exchanged."""

    plan: str = "top:6"
    """`top:6` or `6`, `bottom:6`, `middle:6`, `random:6`; a share of the depth such as `0.375` in the place of a count;
    a list such as `10,11,15`; `importance:6`, the six that matter most to the sites' notes; `all`."""
    among: str = "1.0"
    """importance: a plan of the blocks to choose from; a state holds all of them."""
    by: ImportanceName = "gradient-norm"
    """importance: what sites measure, see `edge_client.importance`."""
    rechoose: int = Field(default=0, ge=0, le=1_000_000)
    """importance: the choice is made anew on each so many-th version; 0: once."""
    personal: tuple[TensorPattern, ...] = ()
    """Trained tensors that stay at their site, such as `score.*`; `*` stands for any run of characters, `?` for one."""

    @property
    def by_importance(self) -> bool:
        """True when sites measure which blocks to train."""
        return self.plan.strip().lower().startswith(IMPORTANCE_PLAN)


class AdapterSection(Section):
    """Low-rank adapters in the blocks of the layer plan: W x + scale B A x, where W is frozen and A and B are trained.

    LoRA: Hu et al., arXiv 2106.09685. What the kinds do with A and B is in docs/adapters.md.
    """

    kind: AdapterKind = "none"
    """none: the blocks themselves are trained. lora: A and B are averaged, each for itself. ffa-lora: A stays as it was
    drawn, B is averaged. fedsa-lora: A is averaged, every site keeps a B of its own. fedex-lora: as lora, and the
    coordinator adds to W what that loses."""
    rank: int = Field(default=16, ge=1, le=4096)
    """r: rows of A, columns of B."""
    alpha: int = Field(default=64, ge=1, le=65536)
    """scale = alpha / r."""
    rank_stabilized: bool = False
    """scale = alpha / sqrt(r) instead, which suits large ranks: Kalajdzievski, arXiv 2312.03732."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the inputs of A that is dropped in training."""
    targets: tuple[Annotated[str, Field(pattern=r"^[A-Za-z0-9_.]{1,64}$")], ...] = ()
    """Linear layers of a block that get an adapter, such as q_proj; empty: all of them."""

    @property
    def used(self) -> bool:
        """True when adapters are trained, and not the blocks themselves."""
        return self.kind != "none"

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)


class CodecSection(Section):
    """How tensors travel."""

    up: CodecName = "bf16"
    down: CodecName = "bf16"
    steps: int = Field(default=0, ge=0, le=64)
    """0: each version travels whole, rounded by `down`. Else it travels as the step from the version before, rounded by
    `down`, and every so many versions also whole, in float32, for sites that are new or too far behind."""
    feedback: Annotated[float, Field(ge=0, le=1)] | None = None
    """Share of what `up` left out of a site's updates that is added to its next one; when missing, 0.95 for those
    of top-k and 0, which keeps nothing, for the others."""
    slice_kib: int = Field(default=512, ge=4, le=768)
    """Raw bytes per chunk, in KiB; 64 to 256 suits slow links."""

    @property
    def whole(self) -> StateCodecName:
        """How a state travels that travels whole; steps are added up in float32, and no bit may be lost."""
        return "f32" if self.steps else cast("StateCodecName", self.down)

    @property
    def decay(self) -> float:
        """The share that `feedback` means."""
        if self.feedback is not None:
            return self.feedback
        return 0.95 if self.up in _OWING else 0.0

    @model_validator(mode="after")
    def _leaves_something(self) -> Self:
        if self.up == "f32" and self.feedback:
            msg = "f32 leaves nothing out that could be added later: set feedback to 0, or another codec"
            raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _bears_states(self) -> Self:
        if not self.steps and self.down not in get_args(StateCodecName):
            msg = f'down = "{self.down}" is no codec for whole states: set steps, or one of {_STATE_CODECS}'
            raise ValueError(msg)
        return self


class TrainingSection(Section):
    """Local training of one update."""

    epochs: int = Field(default=1, ge=1, le=1000)
    batch_size: int = Field(default=8, ge=1, le=4096)
    """Windows of a step; with [privacy] records, as many as are drawn on average."""
    lr: Positive = 1e-3
    final_lr: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of `lr` that is left when training from the last version but one; it falls evenly with the version."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    warmup: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of the steps of one update over which the rate rises."""
    max_grad_norm: Positive = 1.0
    """L2 norm that a step's gradient is scaled down to; [privacy] clips by record in its place."""
    proximal: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """mu of FedProx, which FedAsync calls rho: how strongly training is held to the state that it started from."""
