"""Encoded tensors, for the tests of codecs."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.codec import Codec, decode_tensor, encode
from shared.tensorfile import F32Array

LARGEST = float(np.nextafter(np.float32(2.0**127), np.float32(0)))
"""What every codec takes."""


def arrays_of(values: F32Array, codec: Codec) -> list[NDArray[Any]]:
    """The encoded arrays alone."""
    return [array for _, _, array in encode("w", values, codec)]


def round_trip(values: F32Array, codec: Codec) -> F32Array:
    """What a receiver sees of these values."""
    return decode_tensor(arrays_of(values, codec), codec, values.shape)


def relative_error(values: F32Array, codec: Codec) -> float:
    """||decoded - x|| / ||x||."""
    return float(np.linalg.norm(round_trip(values, codec) - values) / np.linalg.norm(values))


def weights(*shape: int, seed: int = 0) -> F32Array:
    """Something like the delta of a layer."""
    return (np.random.default_rng(seed).standard_normal(shape) * 1e-4).astype(np.float32)
