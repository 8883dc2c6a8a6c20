"""Error feedback: what a codec leaves out of one update is added to the next. Arithmetic alone; `residual` keeps it.

    e <- b e + delta        what is to be sent: this update's change, and what earlier ones still owe
    sent = decode(encode(e))
    e <- e - sent           the residual

b is `[codec] feedback`. Source: SparseLoCo (Sarfi et al., arXiv 2508.15706), where b = 0.95 takes the place of momentum
at the server; b = 1 is the error feedback of Karimireddy et al. (arXiv 1901.09847), which sends everything in the end.
A tensor that an update does not hold has delta = 0 and sends nothing: its residual decays.
"""

from __future__ import annotations

import numpy as np

from shared.codec import Codec, decode_add, encode
from shared.tensorfile import F32Array


def accumulated(delta: F32Array | None, residual: F32Array, decay: float) -> F32Array:
    """Return b e + delta, float32, of the same shape; None stands for zeros."""
    owed: F32Array = np.multiply(residual, np.float32(decay))
    return owed if delta is None else np.add(owed, delta, out=owed)


def left_out(name: str, whole: F32Array, codec: Codec) -> F32Array:
    """Return e - sent, float32, exactly what the receiver lacks but for one rounding; errors as `encode`."""
    left = whole.copy()
    decode_add([array for _, _, array in encode(name, whole, codec)], codec, -1.0, left)
    return left
