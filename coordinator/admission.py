"""Admission: what the bytes of a complete update must satisfy, checked in one streaming pass.

Each frame was compared with its hash when it arrived. Here, in this order, so that nothing is trusted before it is
checked: its declared size against the one that is right, the header against the format, names and shapes against the
sealed plan, then the values, and last the whole file's hash. Memory: a few slices and spans (4 MB), however large
the tensors.

Rules (RefusedError.rule), besides those of `shared.tensorfile` (header-*, tensor-*, file-size), `shared.slices`
(frame-*), `shared.codec` (codec-*) and `shared.reader` (file-hash):

    no-tensors       the update holds none
    unknown-tensor   it holds one that the plan does not name, or that no site trains
    wrong-shape      it holds one of another shape
    non-finite       NaN or infinity
    norm-bound       the delta's L2 norm is above NORM_MAX

What an offer must satisfy before its bytes are taken is in `coordinator.offers`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from shared.errors import RefusedError
from shared.plan import SealedPlan
from shared.store import Stored
from shared.tensorfile import F32Array, Shape

NORM_MAX = 2.0**64
"""Far above any sound delta; a million merged ones, at a server rate of 10 with momentum, keep float32 finite."""


@dataclass(frozen=True, slots=True)
class Admitted:
    """A sound update: global L2 norm of the delta as it will be merged, and number of tensors."""

    norm: float
    tensors: int


def verify(stored: Stored, plan: SealedPlan) -> Admitted:
    """Check a complete update against its manifest and the plan.

    RefusedError names the first broken rule (see above) and never repeats what the sender chose, other than a tensor's
    name that passed the format's rules. CorruptError when the disk no longer holds the frames that arrived.
    """
    with stored.open_tensors(verify=True) as reader:
        _check_header(reader.shapes, plan.trained)
        squares = 0.0
        for name in reader.shapes:
            squares += _finite_squares(name, reader.spans(name))
    norm = math.sqrt(squares)
    if norm > NORM_MAX:
        raise RefusedError(f"the delta's norm is {norm:.3g}, at most {NORM_MAX:.3g} is allowed", rule="norm-bound")
    return Admitted(norm, len(reader.shapes))


def _check_header(found: Mapping[str, Shape], planned: Mapping[str, Shape]) -> None:
    if not found:
        raise RefusedError("the update holds no tensor", rule="no-tensors")
    for name, shape in found.items():
        if name not in planned:
            raise RefusedError(f"tensor {name} is not one that sites train", rule="unknown-tensor")
        if shape != planned[name]:
            raise RefusedError(f"tensor {name} has shape {shape}, the plan says {planned[name]}", rule="wrong-shape")


def _finite_squares(name: str, spans: Iterable[F32Array]) -> float:
    """Sum of squares in float64, which no finite float32 values overflow: an infinite sum means an infinite value.

    Not by a dot product: for one of more than 10,000 values OpenBLAS takes all cores, and its threads spin while they
    wait for one another; with smaller ones the interpreter's lock changes hands at each.
    """
    total = sum(float(np.einsum("i,i->", flat, flat, dtype=np.float64)) for flat in spans)
    if not math.isfinite(total):
        raise RefusedError(
            f"tensor {name} holds NaN or infinity",
            rule="non-finite",
            hint="training diverged at the site: lower the learning rate or clip gradients",
        )
    return total
