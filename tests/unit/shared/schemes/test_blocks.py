from __future__ import annotations

import numpy as np
import pytest

from shared.codec import Codec, decode_add, decode_tensor
from shared.errors import RefusedError
from shared.schemes.blocks import FLUSH, INT8_BLOCK
from shared.tensorfile import bf16_to_f32, f32_to_bf16
from tests.unit.shared.encoded import LARGEST, arrays_of, relative_error, round_trip, weights

both = pytest.mark.parametrize("codec", ["int8", "int4"])


@pytest.mark.parametrize(("codec", "error"), [("int8", 0.007), ("int4", 0.117)])
def test_error_on_normally_distributed_values(codec: Codec, error: float) -> None:
    """They come back with this relative error (2-norm)."""
    assert relative_error(weights(512, 512), codec) == pytest.approx(error, rel=0.05)


def test_int8_by_hand() -> None:
    """Scale 2: 254 is level 127; 5 is 2.5, to even 2; 7 is 3.5, to even 4."""
    levels, scales = arrays_of(np.array([254, -254, 5, 7], dtype=np.float32), "int8")
    assert levels.tolist() == [127, -127, 2, 4]
    np.testing.assert_array_equal(bf16_to_f32(scales), [2.0])


def test_int4_by_hand() -> None:
    """Two values a byte, the first in the lower half; scale 2: levels 7, -7, 3, 2 (2.5, to even), 4 (3.5), 0 (0.5)."""
    values = np.array([[14, -14, 6], [5, 7, 1]], dtype=np.float32)
    shape, packed, scales = arrays_of(values, "int4")
    assert shape.shape == (0, 2, 3)
    assert [f"{byte:02x}" for byte in packed.tolist()] == ["97", "23", "04"]
    np.testing.assert_array_equal(bf16_to_f32(scales), [2.0])
    np.testing.assert_array_equal(round_trip(values, "int4"), [[14, -14, 6], [4, 8, 0]])


def test_a_scale_that_was_rounded_down_keeps_its_levels() -> None:
    """127 x (1 + 2^-8) has a scale that bfloat16 rounds to 1, so that x / scale is 127.496: level 127, not 128."""
    levels, scales = arrays_of(np.array([127 * (1 + 2**-8)], dtype=np.float32), "int8")
    np.testing.assert_array_equal(bf16_to_f32(scales), [1.0])
    assert levels.tolist() == [127]


def test_blocks_do_not_share_a_scale() -> None:
    """An outlier costs precision in its own block only; zero blocks stay exactly zero."""
    values = np.full(INT8_BLOCK * 3 + 7, 1e-3, dtype=np.float32)
    values[0] = 1e6
    values[INT8_BLOCK : 2 * INT8_BLOCK] = 0
    levels, scales = arrays_of(values, "int8")
    assert scales.shape == (4,)
    assert scales[1] == 0
    assert not levels[INT8_BLOCK : 2 * INT8_BLOCK].any()
    decoded = decode_tensor([levels, scales], "int8", values.shape)
    np.testing.assert_allclose(decoded[2 * INT8_BLOCK :], 1e-3, rtol=2**-8)
    assert not decoded[1:INT8_BLOCK].any()


@both
def test_the_tiniest_blocks_are_flushed(codec: Codec) -> None:
    """A block below 2^-100 becomes zero instead of overflowing its inverse; one at 2^-100 does not."""
    assert not round_trip(np.full(INT8_BLOCK, np.float32(1e-45)), codec).any()
    edge = np.full(INT8_BLOCK, FLUSH)
    np.testing.assert_allclose(round_trip(edge, codec), edge, rtol=2**-8)


@pytest.mark.parametrize("magnitude", [2.0**-100, 1e-30, 1.0, 3e30, LARGEST])
def test_levels_are_symmetric_over_the_whole_range(magnitude: float) -> None:
    """The largest magnitude of a block is level 127, or 7, with its sign, whatever it is."""
    values = np.array([-magnitude, magnitude, 0, 0], dtype=np.float32)
    levels, _ = arrays_of(values, "int8")
    assert levels.tolist() == [-127, 127, 0, 0]
    _, packed, _ = arrays_of(values, "int4")
    assert packed.tolist() == [0x79, 0x00]
    for codec in ("int8", "int4"):
        np.testing.assert_allclose(round_trip(values, codec), values, rtol=2**-8)


@both
@pytest.mark.parametrize("bad", [np.nan, np.inf, -1e-9, 1e38])
def test_a_lying_scale_is_refused(codec: Codec, bad: float) -> None:
    """A scale that is negative, NaN, infinite or beyond the permitted range is refused before it is used."""
    parts = arrays_of(weights(600), codec)
    parts[-1][1] = f32_to_bf16(np.array([bad], dtype=np.float32))[0]
    accumulator = np.zeros(600, dtype=np.float32)
    with pytest.raises(RefusedError) as caught:
        decode_tensor(parts, codec, (600,))
    assert caught.value.rule == "codec-scale"
    with pytest.raises(RefusedError) as caught:
        decode_add(parts, codec, 1.0, accumulator)
    assert caught.value.rule == "codec-scale"
    assert not accumulator.any()


@both
def test_the_lowest_level_is_finite_at_the_largest_scale(codec: Codec) -> None:
    """Levels -128 and -8, which no encoder writes, are decoded like any other."""
    parts = arrays_of(np.array([LARGEST], dtype=np.float32), codec)
    parts[-2][...] = -128 if codec == "int8" else 8
    (lowest,) = decode_tensor(parts, codec, (1,))
    assert np.isfinite(lowest)
    assert lowest < -LARGEST


def test_the_half_byte_behind_the_last_int4_value_is_zero() -> None:
    """What no value claims may not carry anything."""
    parts = arrays_of(weights(3), "int4")
    parts[1][-1] |= 0x10
    accumulator = np.zeros(3, dtype=np.float32)
    with pytest.raises(RefusedError) as caught:
        decode_add(parts, "int4", 1.0, accumulator)
    assert caught.value.rule == "codec-padding"
    assert not accumulator.any()
