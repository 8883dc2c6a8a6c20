from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import safetensors
import torch
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
from shared.schemes.sparse import CHUNK
from shared.schemes.ternary import BLOCK as TERNARY_BLOCK
from shared.tensorfile import NUMPY_DTYPES, F32Array, build_header, parse_header
from tests.unit.shared.encoded import LARGEST, arrays_of, round_trip, weights

CODECS: tuple[Codec, ...] = get_args(Codec)
VALUES = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=30),
    elements=st.floats(-LARGEST, LARGEST, width=32),
)
GOLDEN = Path(__file__).parents[2] / "golden" / "codec"
SAMPLE: dict[str, F32Array] = {
    "bias": np.array([0, -1, 2.5], dtype=np.float32),
    "scalar": np.array(1e-3, dtype=np.float32),
    # -4.9 to 4.9 in steps of a 512th, each once, stirred; all of them exact.
    "weight": ((np.arange(5000) * 7919 % 5000 - 2500) / 512).astype(np.float32).reshape(50, 100),
}
codecs = pytest.mark.parametrize("codec", CODECS)


def errors_allowed(values: F32Array, codec: Codec) -> NDArray[np.float64]:
    """The documented bound for each value, in float64."""
    exact = np.abs(values.reshape(-1).astype(np.float64))
    if codec == "f32":
        return np.zeros_like(exact)
    if codec == "bf16":
        return exact * 2.0**-8 + 2.0**-134
    block, share = {
        "int8": (INT8_BLOCK, 0.502 / 127),
        "int4": (INT4_BLOCK, 0.502 / 7),
        "ternary": (TERNARY_BLOCK, 1.004),
        "topk2": (CHUNK, 1.004),
        "topk2x4": (CHUNK, 1.004),
    }[codec]
    padded = np.pad(exact, (0, -exact.size % block)).reshape(-1, block)
    top = np.repeat(padded.max(axis=1, initial=0), block)[: exact.size]
    return np.where(top < FLUSH, top * 1.004 + 2.0**-133, share * top)


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


@codecs
def test_parts_of_another_shape_are_refused(codec: Codec) -> None:
    """Too few parts, other types or other shapes are refused; nothing is broadcast."""
    parts = arrays_of(weights(4, 1600), codec)
    *others, last = parts
    wrong = [others, [*parts, last], [*others, last.astype(np.float64)], [*others, last[:1]], [last, *others, last]]
    for candidate in wrong:
        with pytest.raises(RefusedError) as caught:
            decode_tensor(candidate, codec, (4, 1600))
        assert caught.value.rule == "codec-parts"


def test_codec_names() -> None:
    """Each codec is found by its name and says how wide its values are; another name is refused."""
    assert {codec_named(codec): group_size(codec) for codec in CODECS} == {
        "f32": 4,
        "bf16": 2,
        "int8": 1,
        "int4": 1,
        "ternary": 1,
        "topk2": 1,
        "topk2x4": 1,
    }
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
    with safetensors.safe_open(path, "pt") as file:
        assert set(file.keys()) == {spec.name for spec in header.specs}
        for name, values in tensors.items():
            parts = [numpy_of(file.get_tensor(part)) for part, _, _ in part_specs(name, values.shape, codec)]
            np.testing.assert_array_equal(decode_tensor(parts, codec, values.shape), round_trip(values, codec))


def numpy_of(tensor: torch.Tensor) -> NDArray[Any]:
    """The array of a tensor; bfloat16 as its bits, because numpy has no such type."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    array: NDArray[Any] = tensor.numpy()
    return array


@codecs
def test_the_bytes_of_a_file_stay_what_they_are(codec: Codec) -> None:
    """The file in tests/golden/codec is written again byte for byte: a change of it is a change of the wire."""
    golden = (GOLDEN / f"{codec}.safetensors").read_bytes()
    assert b"".join(encode_file(SAMPLE, codec, {})) == golden


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
        ([("w", "I8", (300,)), ("w.scale", "BF16", (1,))], "int8"),
        ([("w", "I8", (3,)), ("w.scale", "F32", (1,))], "int8"),
        ([("w", "I8", (3,)), ("w.scale", "BF16", (1,)), ("x", "F32", (1,))], "int8"),
        ([("w.scale", "BF16", (1,))], "int8"),
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
