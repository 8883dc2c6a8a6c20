from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from shared.codec import Codec, decode_add, decode_tensor
from shared.errors import RefusedError
from shared.schemes.sparse import CHUNK
from shared.tensorfile import F32Array, bf16_to_f32, f32_to_bf16
from tests.unit.shared.encoded import LARGEST, arrays_of, relative_error, round_trip, weights


def test_by_hand() -> None:
    """Of 130 values three are kept: 8 at 5, -9 at 70, 1 at 129.

    Parted with the least squared error they are {1}, {8, 9}: levels 1 and 8.5. Before them 5, 64 and 58 are left out;
    codes are 1 (upper), 3 (upper, negative), 0.
    """
    values = np.zeros((2, 65), dtype=np.float32)
    values.flat[[5, 70, 129]] = [8, -9, 1]
    shape, gap, leap, value, scale = arrays_of(values, "topk2")
    assert shape.shape == (0, 2, 65)
    assert gap.tolist() == [5, 64, 58]
    assert leap.tolist() == [0, 0]
    assert value.tolist() == [0b00_00_11_01]
    np.testing.assert_array_equal(bf16_to_f32(scale), [[1, 8.5]])
    decoded = round_trip(values, "topk2")
    assert decoded.flat[[5, 70, 129]].tolist() == [8.5, -8.5, 1]
    assert np.count_nonzero(decoded) == 3


@pytest.mark.parametrize(("codec", "sparsity"), [("topk2", 64), ("topk2x4", 16)])
@pytest.mark.parametrize("size", [1, 63, 64, 65, 4095, 4096, 4097, 5000, 200_001])
def test_the_largest_of_each_chunk_are_kept(size: int, codec: Codec, sparsity: int) -> None:
    """ceil(m / 64), or ceil(m / 16), of each chunk of m values, those of largest magnitude, with their signs."""
    values = weights(size)
    decoded = round_trip(values, codec)
    for start in range(0, size, CHUNK):
        chunk, found = values[start : start + CHUNK], decoded[start : start + CHUNK]
        largest = np.sort(np.argsort(-np.abs(chunk), kind="stable")[: -(-chunk.size // sparsity)])
        np.testing.assert_array_equal(np.flatnonzero(found), largest)
        np.testing.assert_array_equal(np.sign(found[largest]), np.sign(chunk[largest]))


def test_of_equal_magnitudes_the_first_are_kept() -> None:
    """A chunk of zeros keeps its first 64; one with 65 ones keeps all but the last of them."""
    _, gap, leap, *_ = arrays_of(np.zeros(CHUNK, dtype=np.float32), "topk2")
    assert gap.tolist() == [0] * 64
    assert leap.tolist() == [0] * 32
    values = np.zeros(2 * CHUNK, dtype=np.float32)
    values[np.arange(100, 165)] = 1
    values[CHUNK : CHUNK + 64] = -2
    assert np.flatnonzero(round_trip(values, "topk2")).tolist() == [*range(100, 164), *range(CHUNK, CHUNK + 64)]


def test_a_gap_of_more_than_a_byte() -> None:
    """Where only the last value is not zero, 63 zeros are kept before it, and 4032 left out: 0xfc0."""
    values = np.zeros(CHUNK, dtype=np.float32)
    values[-1] = 3
    _, gap, leap, *_ = arrays_of(values, "topk2")
    assert gap.tolist() == [0] * 63 + [0xC0]
    assert leap.tolist() == [0] * 31 + [0xF0]
    assert np.flatnonzero(round_trip(values, "topk2")).tolist() == [CHUNK - 1]


def test_the_levels_are_the_best_two() -> None:
    """No other parting of the kept magnitudes into two groups, each at its mean, has a smaller squared error."""
    values = weights(CHUNK, seed=5)
    *_, scale = arrays_of(values, "topk2")
    kept = np.sort(np.abs(values))[-64:].astype(np.float64)
    errors = [kept[:split].var() * split + kept[split:].var() * (64 - split) for split in range(1, 64)]
    best = 1 + int(np.argmin(errors))
    np.testing.assert_allclose(bf16_to_f32(scale)[0], [kept[:best].mean(), kept[best:].mean()], rtol=2**-8)


@pytest.mark.parametrize(("codec", "error"), [("topk2", 0.94), ("topk2x4", 0.82)])
def test_error_on_normally_distributed_values(codec: Codec, error: float) -> None:
    """One value in 64 holds an eighth of the sum of squares, one in 16 a third."""
    assert relative_error(weights(512, 512), codec) == pytest.approx(error, abs=0.01)


@given(values=hnp.arrays(np.float32, st.integers(0, 300), elements=st.floats(-(2.0**60), 2.0**60, width=32)))
def test_what_is_left_is_never_more_than_there_was(values: F32Array) -> None:
    """||x - decoded|| <= ||x||: what error feedback rests on."""
    left = values.astype(np.float64) - round_trip(values, "topk2")
    assert np.linalg.norm(left) <= np.linalg.norm(values.astype(np.float64)) * (1 + 1e-12)


def test_the_whole_range_is_taken() -> None:
    """The largest and the smallest float32 numbers keep their magnitude to a bfloat16's precision."""
    for magnitude in (LARGEST, 1.0, 2.0**-126):
        values = np.full(64, magnitude, dtype=np.float32)
        assert round_trip(values, "topk2")[0] == pytest.approx(magnitude, rel=2**-8)
    assert round_trip(np.array([LARGEST, -LARGEST, 1] * 64, dtype=np.float32), "topk2").max() == 2.0**127


SIZE = CHUNK + 130
"""A chunk with 64 values, and a short one with three."""


def spoilt(what: str) -> list[NDArray[Any]]:
    """Sound parts of SIZE values, but for one thing."""
    shape, gap, leap, value, scale = arrays_of(weights(SIZE), "topk2")
    match what:
        case "out of a chunk":  # the first one ends at 4095 at the latest
            leap[:32] |= 0x11
        case "far out of a chunk":
            leap[:32] |= 0xFF
        case "behind the end":  # the last place, 130 of 0 to 129
            gap[-1] += 130 - (gap[-3:].astype(int) + 1).sum() + 1
        case "leap padding":
            leap[-1] |= 0x10
        case "value padding":
            value[-1] |= 0x40
        case "swapped levels":
            scale[1] = scale[1, ::-1]
        case "negative level":
            scale[0, 0] |= 0x8000
        case "negative zero":
            scale[0, 0] = 0x8000
        case "nan" | "infinity":
            scale[0, 1] = f32_to_bf16(np.array([float(what)], dtype=np.float32))[0]
    return [shape, gap, leap, value, scale]


@pytest.mark.parametrize(
    ("what", "rule"),
    [
        ("out of a chunk", "codec-index"),
        ("far out of a chunk", "codec-index"),
        ("behind the end", "codec-index"),
        ("leap padding", "codec-padding"),
        ("value padding", "codec-padding"),
        ("swapped levels", "codec-scale"),
        ("negative level", "codec-scale"),
        ("negative zero", "codec-scale"),
        ("nan", "codec-scale"),
        ("infinity", "codec-scale"),
    ],
)
def test_what_no_encoder_writes_is_refused(what: str, rule: str) -> None:
    """Under its rule, and before anything is added."""
    accumulator = np.zeros(SIZE, dtype=np.float32)
    with pytest.raises(RefusedError) as caught:
        decode_add(spoilt(what), "topk2", 1.0, accumulator)
    assert caught.value.rule == rule
    assert not accumulator.any()
    with pytest.raises(RefusedError) as caught:
        decode_tensor(spoilt(what), "topk2", (SIZE,))
    assert caught.value.rule == rule


@pytest.mark.parametrize("chunk", [0, 260, 269])
def test_the_last_place_of_a_chunk_and_the_one_behind_it(chunk: int) -> None:
    """4095 is taken and 4096 refused, in the first chunk and in those of a later span of kept values."""
    shape, gap, leap, value, scale = arrays_of(np.ones(CHUNK * 270, dtype=np.float32), "topk2x4")
    last = 256 * (chunk + 1) - 1  # 255 values before it, without gaps
    for place in (CHUNK - 1, CHUNK):
        gap[last], leap[last // 2] = (place - 255) & 0xFF, ((place - 255) >> 8) << 4
        parts = [shape, gap, leap, value, scale]
        if place == CHUNK:
            with pytest.raises(RefusedError) as caught:
                decode_tensor(parts, "topk2x4", (CHUNK * 270,))
            assert caught.value.rule == "codec-index"
        else:
            kept = np.flatnonzero(decode_tensor(parts, "topk2x4", (CHUNK * 270,)))
            assert kept[last] == chunk * CHUNK + place


def test_the_sound_parts_are_taken() -> None:
    """Spoilt in nothing, they are."""
    assert np.count_nonzero(decode_tensor(spoilt(""), "topk2", (SIZE,))) == 67


def test_many_chunks_are_decoded_in_spans() -> None:
    """Beyond 65,536 kept values decoding goes on with the next span: 1.1 million values, added twice."""
    values = weights(CHUNK * 270 + 77)
    accumulator = np.ones_like(values)
    parts = arrays_of(values, "topk2x4")
    decode_add(parts, "topk2x4", 0.5, accumulator)
    decode_add(parts, "topk2x4", 0.5, accumulator)
    np.testing.assert_allclose(accumulator, 1 + round_trip(values, "topk2x4"), rtol=1e-6)
