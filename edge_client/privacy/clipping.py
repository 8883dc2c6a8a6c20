"""By how much the gradient of a record is scaled down, however it was computed."""

from __future__ import annotations

import math

ROUNDING = 1e-6
"""Share by which a clipped gradient stays below its bound: float32 products round, and the bound must hold all the
same."""

NORM_MAX = 1e30
"""Gradients from here on count as not finite: the factor that would clip them is near the end of float32's range."""


def clip_factor(norm: float, loss: float, clip_norm: float) -> float:
    """Return min(1, C / ||g||), a little less than it; 0 for a gradient without a norm below NORM_MAX, or a loss.

    So whatever a record holds, it moves a sum by no more than the bound.
    """
    if not (norm < NORM_MAX and math.isfinite(loss)):
        return 0.0
    return min(1.0, clip_norm / norm if norm else 1.0) * (1.0 - ROUNDING)
