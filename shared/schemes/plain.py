"""f32 and bf16: one stored tensor each, of the same shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.schemes.scheme import SPAN, Arrays, PartSpec, Scheme, check_finite, spans
from shared.tensorfile import DType, F32Array, Shape, bf16_to_f32, f32_to_bf16


def _layout(dtype: DType) -> Callable[[str, Shape], list[PartSpec]]:
    def layout(name: str, shape: Shape) -> list[PartSpec]:
        return [(name, dtype, shape)]

    return layout


def _f32_encode(flat: F32Array) -> list[NDArray[Any]]:
    check_finite(flat)
    return [flat]


def _f32_add(parts: Arrays, weight: np.float32 | None, out: F32Array) -> None:
    (values,) = parts
    if weight is None:
        out[...] = values
        return
    scratch = np.empty(min(out.size, SPAN), dtype=np.float32)
    for span in spans(out.size):
        product = np.multiply(values[span], weight, out=scratch[: span.stop - span.start])
        np.add(out[span], product, out=out[span])


def _bf16_encode(flat: F32Array) -> list[NDArray[Any]]:
    check_finite(flat)
    return [f32_to_bf16(flat)]


def _bf16_add(parts: Arrays, weight: np.float32 | None, out: F32Array) -> None:
    (bits,) = parts
    scratch = np.empty(min(out.size, SPAN), dtype=np.float32)
    for span in spans(out.size):
        into = out[span] if weight is None else scratch[: span.stop - span.start]
        bf16_to_f32(bits[span], out=into)
        if weight is not None:
            np.add(out[span], np.multiply(into, weight, out=into), out=out[span])


F32 = Scheme(group=4, layout=_layout("F32"), encode=_f32_encode, add=_f32_add)
BF16 = Scheme(group=2, layout=_layout("BF16"), encode=_bf16_encode, add=_bf16_add)
