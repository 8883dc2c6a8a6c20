"""What is learnt, and how a site learns it: model, task, layers, codec and local training of `federation.toml`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from shared.config.section import Positive, Section
from shared.ids import Sha256Hex

CodecName = Literal["f32", "bf16", "int8"]


class ModelSection(Section):
    """The pre-trained model that everybody starts from."""

    base: str
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
    """`6` or `top:6`; a share of the depth such as `0.375`; a list such as `10,11,15`; `all`."""


class CodecSection(Section):
    """How tensors travel."""

    up: CodecName = "bf16"
    down: CodecName = "bf16"
    steps: int = Field(default=0, ge=0, le=64)
    """0: each version travels whole, rounded by `down`. Else it travels as the step from the version before, rounded by
    `down`, and every so many versions also whole, in float32, for sites that are new or too far behind."""
    slice_kib: int = Field(default=512, ge=4, le=768)
    """Raw bytes per chunk, in KiB; 64 to 256 suits slow links."""

    @property
    def whole(self) -> CodecName:
        """How a state travels that travels whole; steps are added up in float32, and no bit may be lost."""
        return "f32" if self.steps else self.down


class TrainingSection(Section):
    """Local training of one update."""

    epochs: int = Field(default=1, ge=1, le=1000)
    batch_size: int = Field(default=8, ge=1, le=4096)
    lr: Positive = 1e-3
    final_lr: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of `lr` that is left when training from the last version but one; it falls evenly with the version."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    warmup: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of the steps of one update over which the rate rises."""
    max_grad_norm: Positive = 1.0
