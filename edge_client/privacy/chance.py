"""Chance that nobody can compute: the noise, and which records are drawn, are secrets that the guarantee rests on.

Not torch's generator: on a processor it keeps 32 bits of any seed, so that whoever sees an update could try all of
them. Not the federation's seed, which everybody knows. The stream here is AES-256 in counter mode (NIST SP 800-38A)
under a key that the operating system draws for each training and that is written nowhere.

Numbers are made in double precision, and noise is added in it before the sum is rounded to the float32 that goes on.
Gaussian samples of finite precision leave holes by which sums can be told apart (Mironov, "On Significance of the Least
Significant Bits", CCS 2012); those holes lie at the last bits of a double, below what the rounding keeps.
"""

from __future__ import annotations

import os

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

_KEY_BYTES, _COUNTER_BYTES = 32, 16
_MANTISSA_BITS = 53


class Chance:
    """An endless stream of independent random numbers under a key of its own; it cannot be seeded or repeated."""

    def __init__(self) -> None:
        cipher = Cipher(algorithms.AES(os.urandom(_KEY_BYTES)), modes.CTR(bytes(_COUNTER_BYTES)))
        self._stream = cipher.encryptor()

    def uniform(self, count: int) -> npt.NDArray[np.float64]:
        """Return `count` numbers from [0, 1), multiples of 2^-53."""
        words = np.frombuffer(self._stream.update(bytes(8 * count)), dtype=np.uint64)
        return (words >> np.uint64(64 - _MANTISSA_BITS)).astype(np.float64) * 2.0**-_MANTISSA_BITS

    def normal(self, count: int) -> npt.NDArray[np.float64]:
        """Return `count` standard normal numbers: Box and Muller (1958), by pairs."""
        pairs = -(-count // 2)
        radius = np.sqrt(-2.0 * np.log1p(-self.uniform(pairs)))
        angle = 2.0 * np.pi * self.uniform(pairs)
        return np.concatenate((radius * np.cos(angle), radius * np.sin(angle)))[:count]
