from __future__ import annotations

import numpy as np
import pytest

from shared.codec import decode_add, decode_tensor
from shared.errors import RefusedError
from shared.schemes.ternary import BLOCK
from shared.tensorfile import bf16_to_f32, f32_to_bf16
from tests.unit.shared.encoded import LARGEST, arrays_of, relative_error, round_trip, weights

SIZE = BLOCK + 10


def test_by_hand() -> None:
    """Of seven values three are kept: 4, -5 and 3, whose mean magnitude is 4; codes 1, 3, 0, 0 and 0, 1, 0."""
    values = np.array([4, -5, 0.5, -1, 2, 3, 0], dtype=np.float32)
    shape, trits, scales = arrays_of(values, "ternary")
    assert shape.shape == (0, 7)
    assert [f"{byte:08b}" for byte in trits.tolist()] == ["00001101", "00000100"]
    np.testing.assert_array_equal(bf16_to_f32(scales), [4])
    np.testing.assert_array_equal(round_trip(values, "ternary"), [4, -4, 0, 0, 0, 4, 0])


def test_each_block_keeps_its_own_five_sixteenths() -> None:
    """160 of 512 values; of the ten behind them four; however much larger another block's are."""
    values = weights(SIZE)
    values[:BLOCK] *= 1e6
    decoded = round_trip(values, "ternary")
    assert np.count_nonzero(decoded[:BLOCK]) == BLOCK * 5 // 16 == 160
    assert np.count_nonzero(decoded[BLOCK:]) == 4
    for block in (slice(0, BLOCK), slice(BLOCK, SIZE)):
        kept = decoded[block] != 0
        magnitudes = np.abs(values[block])
        assert magnitudes[kept].min() > magnitudes[~kept].max()
        np.testing.assert_allclose(np.abs(decoded[block][kept]), magnitudes[kept].mean(), rtol=2**-8)
        np.testing.assert_array_equal(np.sign(decoded[block][kept]), np.sign(values[block][kept]))


def test_equal_values_are_all_kept_and_zeros_never() -> None:
    """A block of one magnitude comes back as it was; of a block with one value that is not zero only this is kept."""
    same = np.where(np.arange(BLOCK) % 3 == 0, np.float32(-0.5), np.float32(0.5))
    np.testing.assert_array_equal(round_trip(same, "ternary"), same)
    lonely = np.zeros(BLOCK, dtype=np.float32)
    lonely[77] = -2
    np.testing.assert_array_equal(round_trip(lonely, "ternary"), lonely)
    assert not round_trip(np.zeros(SIZE, dtype=np.float32), "ternary").any()


def test_error_on_normally_distributed_values() -> None:
    """They come back with this relative error (2-norm).

    5/16 lie beyond t = 1.010 standard deviations; with the density f(t) = 0.2396 their mean magnitude is
    2 f(t) / (5/16) = 1.533, and the squared error 1 - (5/16) 1.533^2 = 0.265, whose root is 0.515.
    """
    assert relative_error(weights(512, 512), "ternary") == pytest.approx(0.515, rel=0.01)


@pytest.mark.parametrize("magnitude", [1e-44, 1e-30, 1.0, 3e30, LARGEST])
def test_levels_over_the_whole_range(magnitude: float) -> None:
    """Plus and minus a magnitude come back, with their signs, whatever it is."""
    values = np.array([-magnitude, magnitude, 0, 0], dtype=np.float32)
    np.testing.assert_allclose(round_trip(values, "ternary"), values, rtol=2**-8, atol=2.0**-133)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1e-9])
def test_a_lying_scale_is_refused(bad: float) -> None:
    """A scale that is negative, NaN or infinite is refused before it is used."""
    parts = arrays_of(weights(SIZE), "ternary")
    parts[-1][1] = f32_to_bf16(np.array([bad], dtype=np.float32))[0]
    accumulator = np.zeros(SIZE, dtype=np.float32)
    with pytest.raises(RefusedError) as caught:
        decode_add(parts, "ternary", 1.0, accumulator)
    assert caught.value.rule == "codec-scale"
    assert not accumulator.any()


@pytest.mark.parametrize(("place", "bits"), [(0, 0b10), (64, 0b10000000), (-1, 0b10000), (-1, 0b1000000)])
def test_bits_that_no_value_claims_are_zero(place: int, bits: int) -> None:
    """A value that is not kept has no sign, and behind the last one there is nothing."""
    parts = arrays_of(np.zeros(SIZE, dtype=np.float32), "ternary")
    parts[1][place] |= bits
    accumulator = np.zeros(SIZE, dtype=np.float32)
    for refused in (
        lambda: decode_add(parts, "ternary", 1.0, accumulator),
        lambda: decode_tensor(parts, "ternary", (SIZE,)),
    ):
        with pytest.raises(RefusedError) as caught:
            refused()
        assert caught.value.rule == "codec-padding"
    assert not accumulator.any()


def test_each_code_of_a_byte_has_its_value() -> None:
    """All sums of four codes from 0, 1 and 3, in each of the 81 bytes that there may be."""
    level = {0: 0, 1: 1, 3: -1}
    codes = [[a, b, c, d] for a in level for b in level for c in level for d in level]
    trits = np.array([a | b << 2 | c << 4 | d << 6 for a, b, c, d in codes], dtype=np.uint8)
    size = 4 * len(codes)
    parts = [np.empty((0, size), dtype="<f4"), trits, f32_to_bf16(np.array([2], dtype=np.float32))]
    expected = [2 * level[code] for four in codes for code in four]
    np.testing.assert_array_equal(decode_tensor(parts, "ternary", (size,)), expected)
