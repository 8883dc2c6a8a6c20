"""The arithmetic of error feedback, against numbers worked by hand."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest

from edge_client.feedback import accumulated, left_out
from shared.codec import Codec
from shared.errors import RefusedError
from shared.tensorfile import F32Array
from tests.unit.shared.encoded import round_trip, weights


def values_of(*first: float, size: int = 64) -> F32Array:
    """These, and zeros behind them."""
    values = np.zeros(size, dtype=np.float32)
    values[: len(first)] = first
    return values


def test_two_updates_by_hand() -> None:
    """With b = 0.5, of 64 values one is sent.

    4, 2, 1: 4 is sent, 0, 2, 1 are left. Then 0, 1, 1 more: 0.5 x (0, 2, 1) + (0, 1, 1) = 0, 2, 1.5; 2 is sent.
    """
    first = left_out("w", values_of(4, 2, 1), "topk2")
    np.testing.assert_array_equal(first, values_of(0, 2, 1))
    whole = accumulated(values_of(0, 1, 1), first, 0.5)
    np.testing.assert_array_equal(whole, values_of(0, 2, 1.5))
    np.testing.assert_array_equal(left_out("w", whole, "topk2"), values_of(0, 0, 1.5))


def test_a_tensor_that_is_not_trained_owes_less_and_less() -> None:
    """Its delta is zero and nothing of it is sent."""
    np.testing.assert_array_equal(accumulated(None, values_of(4, -2), 0.5), values_of(2, -1))


@pytest.mark.parametrize("codec", get_args(Codec))
def test_what_is_sent_and_what_is_left_make_the_whole(codec: Codec) -> None:
    """decode(encode(e)) + left = e, to one rounding of float32; of f32 nothing is left."""
    whole = weights(5000)
    left = left_out("w", whole, codec)
    np.testing.assert_allclose(round_trip(whole, codec) + left, whole, rtol=1e-6, atol=1e-11)
    assert left.any() == (codec != "f32")


def test_everything_is_sent_in_the_end() -> None:
    """With b = 1, after n updates of the same delta: what was sent is n deltas less the residual, which stays bounded.

    The largest value left is at most what 64 rounds in turn can gather: each round sends the largest.
    """
    delta, sent, left = weights(64), np.zeros(64, dtype=np.float32), np.zeros(64, dtype=np.float32)
    for _ in range(256):
        whole = accumulated(delta, left, 1.0)
        left = left_out("w", whole, "topk2")
        sent += whole - left
    np.testing.assert_allclose(sent + left, 256 * delta, rtol=1e-4, atol=1e-8)
    assert np.abs(left).max() < 64 * np.abs(delta).max()
    np.testing.assert_allclose(sent / 256, delta, atol=0.25 * float(np.abs(delta).max()))


def test_a_tensor_that_is_not_finite_is_named() -> None:
    """Training has diverged."""
    with pytest.raises(RefusedError, match=r"layer\.3") as caught:
        left_out("layer.3", values_of(np.nan), "int4")
    assert caught.value.rule == "non-finite"
