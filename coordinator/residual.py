"""What averaging the factors of adapters loses, added to the weights that they adapt: FedEx-LoRA.

An adapter adds s B A to a frozen weight W. The mean of the sites' products is not the product of their means, so each
version carries a correction R beside A and B, and computes W + R + s B A. Singhal, Ponkshe and Vepakomma, arXiv
2410.09432, for sites of equal size that all start from the same version: R <- R + s (mean(B_i A_i) - mean(B) mean(A)).

Here update i brings b_i = B_i - B and a_i = A_i - A, and moves the mean by its share c_i: the server's rate times the
weight of `coordinator.merging`, in which lateness and clipping are. Written with these, B and A fall out:

    R <- R + s (sum_i c_i b_i a_i - (sum_i c_i b_i) (sum_i c_i a_i))

Then R + s B A moves by the sum of c_i s ((B + b_i) (A + a_i) - B A), whatever the c_i add up to: by each update's share
of what it does to the product.

A product of matrices is as many outer products as the rank, added up in one order with one rounding after each
operation: the order in which a linear algebra library adds differs from processor to processor, and a replay must give
the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from shared.codec import SPAN
from shared.tensorfile import F32Array

Factors = tuple[float, F32Array, F32Array]
"""c_i, b_i of shape (out, rank), a_i of shape (rank, in)."""


def correct(residual: F32Array, updates: Iterator[Factors], scale: float) -> None:
    """Move `residual`, float32 of shape (out, in), by what the mean of these updates' factors loses; in place.

    One update at a time is in memory, and as much again as the residual.
    """
    lost = np.zeros_like(residual)
    sums: tuple[F32Array, F32Array] | None = None
    for weight, b, a in updates:
        weighted = b * np.float32(weight)
        add_product(lost, weighted, a)
        if sums is None:
            sums = np.zeros_like(b), np.zeros_like(a)
        np.add(sums[0], weighted, out=sums[0])
        np.add(sums[1], a * np.float32(weight), out=sums[1])
    if sums is not None:
        add_product(lost, -sums[0], sums[1])
        np.multiply(lost, np.float32(scale), out=lost)
        np.add(residual, lost, out=residual)


def add_product(out: F32Array, b: F32Array, a: F32Array) -> None:
    """Add b a to `out`, float32 of shapes (m, n), (m, r) and (r, n): for each element its r products one by one."""
    rows = max(1, SPAN // max(1, out.shape[1]))
    scratch = np.empty((min(rows, out.shape[0]), out.shape[1]), dtype=np.float32)
    for start in range(0, out.shape[0], rows):
        tile = out[start : start + rows]
        for column, row in zip(b[start : start + rows].T, a, strict=True):
            product = np.multiply(column[:, None], row, out=scratch[: len(tile)])
            np.add(tile, product, out=tile)
