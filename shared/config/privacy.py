"""Differential privacy: the `[privacy]` of `federation.toml` and of `site.toml`; docs/privacy.md says what it means."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from shared.config.section import Positive, Section

Clipping = Literal["record", "ghost", "auto"]

TARGET_MAX = 100.0
"""An epsilon above it promises nothing that anybody could use, and its noise is too small to be planned soundly."""


class PrivacySection(Section):
    """Every site trains under record-level differential privacy (DP-SGD) where this section is there."""

    delta: Annotated[float, Field(gt=0, le=0.01)]
    """The delta at which epsilon is told; well below one over the number of records of any site."""
    clip_norm: Positive = 1.0
    """L2 norm, over all tensors that are trained, that the gradient of one record is scaled down to."""
    noise_multiplier: Positive | None = None
    """Standard deviation of the noise on a sum of clipped gradients, as a multiple of `clip_norm`."""
    target_epsilon: Annotated[float, Field(gt=0, le=TARGET_MAX)] | None = None
    """In its place: what a run may cost each record; each site plans its noise so that all versions cost that."""

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.noise_multiplier is None) == (self.target_epsilon is None):
            raise ValueError("needs either noise_multiplier or target_epsilon")
        return self


class LocalPrivacySection(Section):
    """What this site's records may be charged."""

    budget_epsilon: Positive | None = None
    """The most that all trainings from this storage folder may cost together; None sets no bound. With a budget, the
    site takes part in no federation without `[privacy]`."""
    clipping: Clipping = "record"
    """How the clipped gradients of a step are computed; they come out alike, but for what dropout draws. record: by a
    backward pass for each record. ghost: by one for as many records as fit (`edge_client.privacy.ghost`); some layers
    do not allow it. auto: ghost for short records, where the layers allow it."""
