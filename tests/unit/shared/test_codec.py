from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import safetensors
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from shared.codec import (
    Codec,
    codec_named,
    data_bytes,
    decode_add,
    decode_tensor,
    encode,
    encode_file,
    group_size,
    part_specs,
    tensor_shapes,
)
from shared.errors import RefusedError
from shared.schemes.blocks import FLUSH, INT4_BLOCK, INT8_BLOCK
from shared.tensorfile import NUMPY_DTYPES, F32Array, bf16_to_f32, build_header, f32_to_bf16, parse_header

CODECS: tuple[Codec, ...] = get_args(Codec)
LARGEST = float(np.nextafter(np.float32(2.0**127), np.float32(0)))
VALUES = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=30),
    elements=st.floats(-LARGEST, LARGEST, width=32),
)
codecs = pytest.mark.parametrize("codec", CODECS)


def arrays_of(values: F32Array, codec: Codec) -> list[NDArray[Any]]:
    """The encoded arrays alone."""
    return [array for _, _, array in encode("w", values, codec)]


def weights(*shape: int, seed: int = 0) -> F32Array:
    """Something like the delta of a layer."""
    return (np.random.default_rng(seed).standard_normal(shape) * 1e-4).astype(np.float32)


def errors_allowed(values: F32Array, codec: Codec) -> NDArray[np.float64]:
    """The documented bound for each value, in float64."""
    exact = np.abs(values.reshape(-1).astype(np.float64))
    if codec == "f32":
        return np.zeros_like(exact)
    if codec == "bf16":
        return exact * 2.0**-8 + 2.0**-134
    block, share = {"int8": (INT8_BLOCK, 0.502 / 127), "int4": (INT4_BLOCK, 0.503 / 7)}[codec]
    padded = np.pad(exact, (0, -exact.size % block)).reshape(-1, block)
    top = np.repeat(padded.max(axis=1, initial=0), block)[: exact.size]
    return np.where(top < FLUSH, top, share * top)


@codecs
@given(values=VALUES)
def test_errors_stay_within_the_documented_bound(codec: Codec, values: F32Array) -> None:
    """What is decoded has the shape that was encoded, and differs by no more than the docstring says."""
    decoded = decode_tensor(arrays_of(values, codec), codec, values.shape)
    assert decoded.shape == values.shape
    difference = np.abs(decoded.astype(np.float64) - values.astype(np.float64)).reshape(-1)
    assert (difference <= errors_allowed(values, codec)).all()


@codecs
@given(values=VALUES)
def test_parts_are_those_announced(codec: Codec, values: F32Array) -> None:
    """Names, types and shapes of the parts follow from name and shape alone."""
    parts = encode("layer.w", values, codec)
    assert [(name, dtype, array.shape) for name, dtype, array in parts] == part_specs("layer.w", values.shape, codec)
    assert all(array.dtype == NUMPY_DTYPES[dtype] for _, dtype, array in parts)


@codecs
@pytest.mark.parametrize("size", [1, 255, 256, 257, 1 << 17, (1 << 17) + 1, 300_000])
def test_decode_add_adds_weight_times_decoded(codec: Codec, size: int) -> None:
    """The fused form equals weight x decoded + accumulator to float32 rounding, at each block and span boundary."""
    values, accumulator = weights(size), weights(size, seed=1)
    parts = arrays_of(values, codec)
    expected = accumulator + np.float32(0.3) * decode_tensor(parts, codec, (size,))
    decode_add(parts, codec, 0.3, accumulator)
    np.testing.assert_allclose(accumulator, expected, rtol=1e-6, atol=1e-10)


@codecs
def test_decode_add_is_the_same_bits_each_time(codec: Codec) -> None:
    """Adding the same parts in the same order gives the same bits, from a copy at another address too."""
    parts = arrays_of(weights(7, 1001), codec)
    sums = []
    for offset in (0, 1):
        accumulator = np.zeros(7 * 1001 + 1, dtype=np.float32)[offset : offset + 7007].reshape(7, 1001)
        for weight in (0.1, 0.7, 1 / 3):
            decode_add([part.copy() for part in parts], codec, weight, accumulator)
        sums.append(accumulator.tobytes())
    assert sums[0] == sums[1]


@codecs
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 2.0**127, -(2.0**127)])
@pytest.mark.parametrize("place", [0, 299, 200_000])
def test_input_that_is_not_finite_is_refused(codec: Codec, bad: float, place: int) -> None:
    """NaN, infinity and values from 2^127 on are refused, wherever they stand, and the tensor is named."""
    values = weights(200_001)
    values[place] = bad
    with pytest.raises(RefusedError, match=r"layer\.3") as caught:
        encode("layer.3", values, codec)
    assert caught.value.rule == "non-finite"


def test_int8_error_on_a_realistic_delta() -> None:
    """Normally distributed values come back with a relative error (2-norm) of 0.007."""
    values = weights(512, 512)
    decoded = decode_tensor(arrays_of(values, "int8"), "int8", values.shape)
    assert float(np.linalg.norm(decoded - values) / np.linalg.norm(values)) == pytest.approx(0.007, abs=0.0005)


def test_int8_blocks_do_not_share_a_scale() -> None:
    """An outlier costs precision in its own block only; zero blocks stay exactly zero."""
    values = np.full(INT8_BLOCK * 3 + 7, 1e-3, dtype=np.float32)
    values[0] = 1e6
    values[INT8_BLOCK : 2 * INT8_BLOCK] = 0
    levels, scales = arrays_of(values, "int8")
    assert scales.shape == (4,)
    assert scales[1] == 0
    assert not levels[INT8_BLOCK : 2 * INT8_BLOCK].any()
    decoded = decode_tensor([levels, scales], "int8", values.shape)
    np.testing.assert_allclose(decoded[2 * INT8_BLOCK :], 1e-3, rtol=1e-6)
    assert not decoded[1:INT8_BLOCK].any()


def test_int8_flushes_the_tiniest_blocks() -> None:
    """A block below 2^-100 becomes zero instead of overflowing its inverse; one at 2^-100 does not."""
    tiny = np.full(INT8_BLOCK, np.float32(1e-45))
    assert not decode_tensor(arrays_of(tiny, "int8"), "int8", tiny.shape).any()
    edge = np.full(INT8_BLOCK, FLUSH)
    np.testing.assert_allclose(decode_tensor(arrays_of(edge, "int8"), "int8", edge.shape), edge, rtol=1e-6)


def test_int8_uses_levels_up_to_127_symmetrically() -> None:
    """Levels stay within -127..127 for magnitudes over the whole permitted range."""
    for magnitude in (2.0**-100, 1e-30, 1.0, 3e30, LARGEST):
        levels, _ = arrays_of(np.array([-magnitude, magnitude, magnitude / 4], dtype=np.float32), "int8")
        assert levels.tolist() == [-127, 127, 32]


def test_int4_by_hand() -> None:
    """Two values a byte, the first in the lower half; scale 2, levels 7, -7, 3 (2.5 to even is 2, 3.5 to even is 4)."""
    shape, packed, scales = arrays_of(np.array([[14, -14, 6], [5, 7, 1]], dtype=np.float32), "int4")
    assert shape.shape == (0, 2, 3)
    assert [f"{byte:02x}" for byte in packed.tolist()] == ["97", "23", "04"]
    np.testing.assert_array_equal(bf16_to_f32(scales), [2.0])
    decoded = decode_tensor([shape, packed, scales], "int4", (2, 3))
    np.testing.assert_array_equal(decoded, [[14, -14, 6], [4, 8, 0]])


def test_int4_error_on_a_realistic_delta() -> None:
    """Normally distributed values come back with a relative error (2-norm) of 0.117."""
    values = weights(512, 512)
    decoded = decode_tensor(arrays_of(values, "int4"), "int4", values.shape)
    assert float(np.linalg.norm(decoded - values) / np.linalg.norm(values)) == pytest.approx(0.117, abs=0.002)


def test_int4_takes_the_whole_range() -> None:
    """The largest magnitude of a block is level 7 over the whole permitted range, and a block below 2^-100 is zero."""
    for magnitude in (2.0**-100, 1e-30, 1.0, 3e30, LARGEST):
        values = np.array([-magnitude, magnitude, 0], dtype=np.float32)
        _, packed, _ = arrays_of(values, "int4")
        assert packed.tolist() == [0x79, 0x00]
        np.testing.assert_allclose(decode_tensor(arrays_of(values, "int4"), "int4", (3,)), values, rtol=2**-8)
    assert not decode_tensor(arrays_of(values * 0 + np.float32(1e-45), "int4"), "int4", (3,)).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1e-9, 1e38])
def test_a_lying_int4_scale_is_refused(bad: float) -> None:
    """As for int8; level -8, which no encoder writes, stays finite at the largest scale."""
    shape, packed, scales = arrays_of(weights(600), "int4")
    scales[1] = f32_to_bf16(np.array([bad], dtype=np.float32))[0]
    accumulator = np.zeros(600, dtype=np.float32)
    for read in (
        lambda: decode_tensor([shape, packed, scales], "int4", (600,)),
        lambda: decode_add([shape, packed, scales], "int4", 1.0, accumulator),
    ):
        with pytest.raises(RefusedError) as caught:
            read()
        assert caught.value.rule == "codec-scale"
    assert not accumulator.any()
    _, _, largest = arrays_of(np.full(1, LARGEST, dtype=np.float32), "int4")
    lowest = decode_tensor([np.empty((0, 1), dtype=np.float32), np.array([8], dtype=np.uint8), largest], "int4", (1,))
    assert np.isfinite(lowest).all()


def test_bits_behind_the_last_int4_value_are_zero() -> None:
    """A half byte that no value claims may not carry anything."""
    shape, packed, scales = arrays_of(weights(3), "int4")
    packed[-1] |= 0x10
    accumulator = np.zeros(3, dtype=np.float32)
    with pytest.raises(RefusedError) as caught:
        decode_add([shape, packed, scales], "int4", 1.0, accumulator)
    assert caught.value.rule == "codec-padding"
    assert not accumulator.any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1e-9, 1e37])
def test_a_lying_scale_is_refused(bad: float) -> None:
    """A scale that is negative, NaN, infinite or beyond the permitted range is refused before it is used."""
    levels, scales = arrays_of(weights(600), "int8")
    scales[1] = bad
    accumulator = np.zeros(600, dtype=np.float32)
    with pytest.raises(RefusedError) as caught:
        decode_tensor([levels, scales], "int8", (600,))
    assert caught.value.rule == "codec-scale"
    with pytest.raises(RefusedError) as caught:
        decode_add([levels, scales], "int8", 1.0, accumulator)
    assert caught.value.rule == "codec-scale"
    assert not accumulator.any()


@codecs
def test_parts_of_another_shape_are_refused(codec: Codec) -> None:
    """Too few parts, other types or other shapes are refused; nothing is broadcast."""
    parts = arrays_of(weights(4, 640), codec)
    *others, last = parts
    wrong = [others, [*parts, last], [*others, last.astype(np.float64)], [*others, last[:1]], [last, *others, last]]
    for candidate in wrong:
        with pytest.raises(RefusedError) as caught:
            decode_tensor(candidate, codec, (4, 640))
        assert caught.value.rule == "codec-parts"


def test_codec_names() -> None:
    """Each codec is found by its name and says how wide its values are; another name is refused."""
    assert {codec_named(codec): group_size(codec) for codec in CODECS} == {"f32": 4, "bf16": 2, "int8": 1, "int4": 1}
    with pytest.raises(RefusedError) as caught:
        codec_named("int3")
    assert caught.value.rule == "unknown-codec"


@codecs
def test_a_whole_file_reads_back(codec: Codec, tmp_path: Path) -> None:
    """A file of encoded tensors is read by safetensors, and its header names exactly the tensors that went in."""
    tensors = {"b": weights(3, 100), "a": weights(257), "a-x": weights(5), "c.bias": weights(0), "d": weights()}
    data = b"".join(encode_file(tensors, codec, {"codec": codec}))
    header = parse_header(data, len(data))
    shapes = tensor_shapes(header, codec)
    assert shapes == {name: values.shape for name, values in tensors.items()}
    assert len(data) == header.size + data_bytes(shapes, codec)
    path = tmp_path / "file.safetensors"
    path.write_bytes(data)
    with safetensors.safe_open(path, "numpy") as file:
        assert set(file.keys()) == {spec.name for spec in header.specs}
        if codec in {"f32", "int8"}:  # numpy has no bfloat16 for it to return
            for name, values in tensors.items():
                parts = [file.get_tensor(part) for part, _, _ in part_specs(name, values.shape, codec)]
                expected = decode_tensor(arrays_of(values, codec), codec, values.shape)
                np.testing.assert_array_equal(decode_tensor(parts, codec, values.shape), expected)


def test_names_that_collide_with_a_companion_are_refused() -> None:
    """Two tensors of which one bears the name of the other's companion cannot go into one file."""
    tensors = {"w": weights(3), "w.scale": weights(3)}
    with pytest.raises(RefusedError) as caught:
        list(encode_file(tensors, "int8", {}))
    assert caught.value.rule == "header-duplicate"
    assert list(encode_file(tensors, "f32", {}))


@pytest.mark.parametrize(
    ("tensors", "codec"),
    [
        ([("w", "F32", (3,))], "bf16"),
        ([("w", "BF16", (3,))], "f32"),
        ([("w", "BF16", (3,)), ("x", "F32", (3,))], "bf16"),
        ([("w", "I8", (3,))], "int8"),
        ([("w", "I8", (300,)), ("w.scale", "F32", (1,))], "int8"),
        ([("w", "I8", (3,)), ("w.scale", "F32", (1,)), ("x", "F32", (1,))], "int8"),
        ([("w.scale", "F32", (1,))], "int8"),
        ([("w", "F32", (0, 3)), ("w.packed", "U8", (2,))], "int4"),
        ([("w", "F32", (0, 3)), ("w.packed", "U8", (3,)), ("w.scale", "BF16", (1,))], "int4"),
        ([("w", "F32", (1, 3)), ("w.packed", "U8", (2,)), ("w.scale", "BF16", (1,))], "int4"),
        ([("w", "F32", ()), ("w.packed", "U8", (1,)), ("w.scale", "BF16", (1,))], "int4"),
        ([("w", "F32", (0, 2**30, 2**30)), ("w.packed", "U8", (2,)), ("w.scale", "BF16", (1,))], "int4"),
    ],
)
def test_headers_of_another_codec_are_refused(tensors: list[Any], codec: Codec) -> None:
    """A file whose tensors this codec would not have written, one too few or too many, is refused."""
    head = build_header(tensors, {})
    size = len(head) + sum(NUMPY_DTYPES[dtype].itemsize * int(np.prod(shape)) for _, dtype, shape in tensors)
    with pytest.raises(RefusedError) as caught:
        tensor_shapes(parse_header(head, size), codec)
    assert caught.value.rule == "codec-parts"
