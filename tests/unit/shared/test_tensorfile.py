from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from shared.errors import RefusedError
from shared.tensorfile import (
    HEADER_BYTES_MAX,
    NUMPY_DTYPES,
    DType,
    F32Array,
    Shape,
    bf16_to_f32,
    build_header,
    f32_to_bf16,
    header_size,
    let_go,
    map_file,
    map_tensors,
    parse_header,
    tensor_bytes,
)

NAMES = st.from_regex(r"[A-Za-z0-9_.-]{1,24}", fullmatch=True).filter(lambda name: name != "__metadata__")
DTYPES = st.sampled_from(sorted(NUMPY_DTYPES))
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)
PLANS = st.dictionaries(NAMES, st.tuples(DTYPES, SHAPES), max_size=8)
METADATA = st.dictionaries(st.text(max_size=8), st.text(max_size=20), max_size=3)


def head_of(entries: object) -> bytes:
    """Length and JSON of any header, valid or not."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, Any]:
    """One tensor's description."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def rule_of(head: bytes, file_size: int) -> str:
    """The rule under which a header is refused."""
    with pytest.raises(RefusedError) as caught:
        parse_header(head, file_size)
    return caught.value.rule


def write_file(path: Path, arrays: dict[str, tuple[DType, NDArray[Any]]], metadata: dict[str, str]) -> bytes:
    """A whole file made with `build_header`."""
    head = build_header([(name, dtype, array.shape) for name, (dtype, array) in arrays.items()], metadata)
    data = head + b"".join(arrays[name][1].tobytes() for name in sorted(arrays))
    path.write_bytes(data)
    return data


@given(plan=PLANS, metadata=METADATA)
def test_what_is_built_is_parsed(plan: dict[str, tuple[DType, Shape]], metadata: dict[str, str]) -> None:
    """A built header gives back names, types, shapes and metadata, ascending by name, and covers the file exactly."""
    head = build_header([(name, *rest) for name, rest in plan.items()], metadata)
    size = len(head) + sum(tensor_bytes(*rest) for rest in plan.values())
    header = parse_header(head, size)
    assert [(spec.name, (spec.dtype, spec.shape)) for spec in header.specs] == sorted(plan.items())
    assert header.metadata == metadata
    assert header.size == len(head) == header_size(head, size)
    assert header.file_size == size
    assert len(head) % 8 == 0


@given(plan=PLANS, metadata=METADATA)
def test_bytes_do_not_depend_on_order(plan: dict[str, tuple[DType, Shape]], metadata: dict[str, str]) -> None:
    """The order in which tensors and metadata are handed over changes no byte of the header."""
    tensors = [(name, *rest) for name, rest in plan.items()]
    backwards = dict(reversed(metadata.items()))
    assert build_header(tensors[::-1], backwards) == build_header(tensors, metadata)


@given(plan=PLANS, data=st.data())
def test_safetensors_reads_our_files(plan: dict[str, tuple[DType, Shape]], data: st.DataObject) -> None:
    """The safetensors library reads each tensor of a file of ours, byte for byte."""
    content = {
        name: data.draw(st.binary(min_size=(n := tensor_bytes(*rest)), max_size=n)) for name, rest in plan.items()
    }
    head = build_header([(name, *rest) for name, rest in plan.items()], {"format": "np"})
    read = dict(
        safetensors.deserialize(  # type: ignore[no-untyped-call]
            head + b"".join(content[name] for name in sorted(content))
        )
    )
    assert {name: bytes(tensor["data"]) for name, tensor in read.items()} == content
    assert {name: (tensor["dtype"], tuple(tensor["shape"])) for name, tensor in read.items()} == plan


def test_safe_open_reads_our_files(tmp_path: Path) -> None:
    """safetensors.safe_open reads our file, also where an odd number of bytes stands before a float tensor."""
    levels = np.arange(5, dtype=np.int8)
    scale = np.array([0.5, 2.0], dtype=np.float32)
    path = tmp_path / "odd.safetensors"
    write_file(path, {"w": ("I8", levels), "w.scale": ("F32", scale)}, {"codec": "int8"})
    with safetensors.safe_open(path, "numpy") as file:
        assert list(file.keys()) == ["w", "w.scale"]
        assert file.metadata() == {"codec": "int8"}
        np.testing.assert_array_equal(file.get_tensor("w"), levels)
        np.testing.assert_array_equal(file.get_tensor("w.scale"), scale)


@given(
    arrays=st.dictionaries(
        NAMES,
        st.one_of(
            hnp.arrays(np.float32, hnp.array_shapes(max_dims=3, max_side=4)),
            hnp.arrays(np.int8, hnp.array_shapes(max_dims=3, max_side=4)),
        ),
        max_size=5,
    )
)
def test_we_read_files_of_safetensors(arrays: dict[str, NDArray[Any]]) -> None:
    """A file saved by safetensors.numpy parses, and each tensor lies where the header says."""
    data = safetensors.numpy.save(arrays, {"made": "elsewhere"})
    header = parse_header(data, len(data))
    assert {spec.name for spec in header.specs} == set(arrays)
    for spec in header.specs:
        raw = data[header.size + spec.begin : header.size + spec.end]
        assert raw == arrays[spec.name].tobytes()
        assert spec.shape == arrays[spec.name].shape


NAN_SHAPE = b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}'
TWICE = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}'


@pytest.mark.parametrize(
    ("entries", "data_size", "rule"),
    [
        (b"[]", 0, "header-json"),
        (b" {}", 0, "header-json"),
        (b'{"a"', 0, "header-json"),
        (b"{}{}", 0, "header-json"),
        (b'{"\xff":1}', 0, "header-json"),
        (b'{"a":' + b"[" * 100_000, 0, "header-json"),
        (b'{"a":' + b"9" * 5_000 + b"}", 0, "header-json"),
        (NAN_SHAPE, 8, "header-json"),
        (TWICE, 16, "header-duplicate"),
        (b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', 8, "header-duplicate"),
        ({"__metadata__": []}, 0, "header-metadata"),
        ({"__metadata__": {"a": 1}}, 0, "header-metadata"),
        ({"": entry()}, 8, "tensor-name"),
        ({"../etc/passwd": entry()}, 8, "tensor-name"),
        ({"a\n": entry()}, 8, "tensor-name"),
        ({"\u0430": entry()}, 8, "tensor-name"),
        ({"a" * 257: entry()}, 8, "tensor-name"),
        ({"a": []}, 8, "tensor-entry"),
        ({"a": {"dtype": "F32", "shape": [2]}}, 8, "tensor-entry"),
        ({"a": {**entry(), "extra": 1}}, 8, "tensor-entry"),
        ({"a": entry(dtype="F31")}, 8, "tensor-dtype"),
        ({"a": entry(dtype=["F32"])}, 8, "tensor-dtype"),
        ({"a": entry(shape=2)}, 8, "tensor-shape"),
        ({"a": entry(shape=[-2])}, 8, "tensor-shape"),
        ({"a": entry(shape=[2.0])}, 8, "tensor-shape"),
        ({"a": entry(shape=[True, 2])}, 8, "tensor-shape"),
        ({"a": entry(shape=[1] * 9)}, 8, "tensor-shape"),
        ({"a": entry(shape=[2**40, 2**40])}, 8, "tensor-shape"),
        ({"a": entry(shape=[2**32, 2**32, 0], offsets=[0, 0])}, 0, "tensor-shape"),
        ({"a": entry(shape=[0, 2**64], offsets=[0, 0])}, 0, "tensor-shape"),
        ({"a": entry(offsets=[0])}, 8, "tensor-offsets"),
        ({"a": entry(offsets=[0, 4, 8])}, 8, "tensor-offsets"),
        ({"a": entry(offsets=[8, 0])}, 8, "tensor-offsets"),
        ({"a": entry(offsets=[-8, 0])}, 8, "tensor-offsets"),
        ({"a": entry(offsets=[0, 8.0])}, 8, "tensor-offsets"),
        ({"a": entry(offsets=[2**64, 2**64 + 8])}, 8, "tensor-offsets"),
        ({"a": entry(offsets="08")}, 8, "tensor-offsets"),
        ({"a": entry(shape=[3])}, 8, "tensor-size"),
        ({"a": entry(shape=[])}, 8, "tensor-size"),
        ({"a": entry(), "b": entry()}, 16, "tensor-overlap"),
        ({"a": entry(), "b": entry(offsets=[4, 12])}, 12, "tensor-overlap"),
        ({"a": entry(), "b": entry(offsets=[12, 20])}, 20, "tensor-hole"),
        ({"a": entry(offsets=[8, 16])}, 16, "tensor-hole"),
        ({"a": entry()}, 9, "file-size"),
        ({"a": entry()}, 7, "file-size"),
        ({}, 1, "file-size"),
    ],
)
def test_each_violation_has_its_rule(entries: object, data_size: int, rule: str) -> None:
    """A header that breaks a rule is refused under that rule's name."""
    head = head_of(entries)
    assert rule_of(head, len(head) + data_size) == rule


@pytest.mark.parametrize(
    ("prefix", "file_size", "rule"),
    [
        (b"", 0, "header-truncated"),
        (bytes(7), 100, "header-truncated"),
        (struct.pack("<Q", 0), 100, "header-size"),
        (struct.pack("<Q", HEADER_BYTES_MAX + 1), 1 << 40, "header-size"),
        (struct.pack("<Q", 2**64 - 1), 1 << 40, "header-size"),
        (struct.pack("<Q", 93), 100, "header-truncated"),
    ],
)
def test_lying_length_is_refused(prefix: bytes, file_size: int, rule: str) -> None:
    """The length is refused before a single byte is read on its word."""
    with pytest.raises(RefusedError) as caught:
        header_size(prefix, file_size)
    assert caught.value.rule == rule


def test_truncation_is_refused_at_each_byte() -> None:
    """Every proper beginning of a file is refused, wherever it ends."""
    data = safetensors.numpy.save({"a": np.zeros(2, np.float32), "b": np.zeros(3, np.int8)})
    for size in range(len(data)):
        assert rule_of(data[:size], size) in {"header-truncated", "file-size"}


@given(junk=st.binary(max_size=200), size=st.integers(0, 300))
def test_junk_is_refused_not_crashed_on(junk: bytes, size: int) -> None:
    """Arbitrary bytes are refused with a rule; nothing else is ever raised."""
    with pytest.raises(RefusedError):
        parse_header(struct.pack("<Q", len(junk)) + junk, size)


@given(data=st.data())
def test_damaged_headers_are_refused_or_equal(data: st.DataObject) -> None:
    """A header with one byte changed is refused, or still describes tensors that cover the file exactly."""
    head = bytearray(build_header([("a", "F32", (2, 3)), ("b", "I8", (5,))], {"k": "v"}))
    size = len(head) + 29
    head[data.draw(st.integers(0, len(head) - 1))] = data.draw(st.integers(0, 255))
    try:
        header = parse_header(bytes(head), size)
    except RefusedError:
        return
    assert header.file_size == size


def test_two_tensors_of_one_name_are_refused() -> None:
    """A file cannot be built with two tensors of one name."""
    with pytest.raises(RefusedError) as caught:
        build_header([("a", "F32", ()), ("a", "I8", ())], {})
    assert caught.value.rule == "header-duplicate"


def test_metadata_key_is_not_a_tensor_name() -> None:
    """A tensor named __metadata__ cannot be built, with or without metadata."""
    for metadata in ({}, {"a": "b"}):
        with pytest.raises(RefusedError):
            build_header([("__metadata__", "F32", ())], metadata)


def test_mapped_tensors_are_those_of_the_file(tmp_path: Path) -> None:
    """Read-only, in any shape, and still there when the file's name is gone."""
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros((0, 4), np.float32)}
    path = tmp_path / "delta.safetensors"
    safetensors.numpy.save_file(arrays, path)
    mapped = map_tensors(path)
    path.unlink()
    assert {name: values.tolist() for name, values in mapped.items()} == {k: v.tolist() for k, v in arrays.items()}
    assert mapped["b"].shape == (0, 4)
    assert not mapped["a"].flags.writeable


@pytest.mark.parametrize(
    ("data", "rule"), [(b"", "header-truncated"), (head_of({"a": entry("BF16", (4,))}), "file-size")]
)
def test_what_cannot_be_mapped_is_refused(data: bytes, rule: str, tmp_path: Path) -> None:
    """An empty file, and one whose tensors are not there."""
    path = tmp_path / "odd.safetensors"
    path.write_bytes(data)
    with pytest.raises(RefusedError) as caught:
        map_tensors(path)
    assert caught.value.rule == rule


def test_only_float32_is_mapped(tmp_path: Path) -> None:
    """Whose bytes are something else is named and not read as numbers."""
    path = tmp_path / "odd.safetensors"
    write_file(path, {"w": ("I8", np.arange(4, dtype=np.int8))}, {})
    with pytest.raises(RefusedError, match="tensor w is I8, not F32") as caught:
        map_tensors(path)
    assert caught.value.rule == "wrong-dtype"


def reference_bf16(value: float) -> int:
    """Round to bfloat16 by exact comparison of the two neighbours, independent of bit tricks."""
    bits = int(np.float32(value).view(np.uint32))
    low, rest = bits >> 16, bits & 0xFFFF
    return low + (rest > 0x8000 or (rest == 0x8000 and low & 1))


@given(hnp.arrays(np.float32, hnp.array_shapes(max_dims=2, max_side=20), elements=st.floats(width=32, allow_nan=False)))
def test_bf16_rounds_to_nearest_even(values: F32Array) -> None:
    """Conversion to bfloat16 rounds to nearest, ties to even, and keeps the shape."""
    bits = f32_to_bf16(values)
    assert bits.shape == values.shape
    assert bits.reshape(-1).tolist() == [reference_bf16(value) for value in values.reshape(-1).tolist()]


def test_bf16_keeps_nan_whatever_its_payload() -> None:
    """Every NaN stays a NaN of its sign, also those whose payload rounding would carry away."""
    nans = np.array([0x7F800001, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF, 0x7FC00000], dtype=np.uint32).view(np.float32)
    bits = f32_to_bf16(nans)
    assert np.isnan(bf16_to_f32(bits)).all()
    assert (bits >> 15).tolist() == [0, 0, 1, 1, 0]


def test_bf16_widens_exactly_and_survives_a_round_trip() -> None:
    """All 65,536 bfloat16 patterns but signalling NaNs come back from float32 unchanged."""
    bits = np.arange(1 << 16, dtype=np.uint16)
    back = f32_to_bf16(bf16_to_f32(bits))
    nan = np.isnan(bf16_to_f32(bits))
    np.testing.assert_array_equal(back[~nan], bits[~nan])
    np.testing.assert_array_equal(back[nan], bits[nan] | 0x40)


def test_bf16_overflow_and_blocks() -> None:
    """Values beyond the largest bfloat16 become infinite; arrays longer than a block are converted whole."""
    assert f32_to_bf16(np.array([3.4028235e38, -3.4028235e38], dtype=np.float32)).tolist() == [0x7F80, 0xFF80]
    long = np.arange(300_001, dtype=np.float32)
    expected = f32_to_bf16(long[-5:])
    assert f32_to_bf16(long)[-5:].tolist() == expected.tolist()


def test_pages_of_a_mapped_file_can_be_let_go(tmp_path: Path) -> None:
    """They leave this process's memory, and hold the same when they are looked at again."""
    values = np.arange(1 << 22, dtype=np.float32)
    safetensors.numpy.save_file({"a": values}, tmp_path / "file")
    header, data = map_file(tmp_path / "file")
    (spec,) = header.specs

    def look() -> int:
        assert np.array_equal(data[spec.begin : spec.end].view("<f4"), values)
        return _mapped_bytes()

    seen = look()
    let_go(data)
    assert _mapped_bytes() <= seen - values.nbytes // 2
    assert look() >= seen - values.nbytes // 2


def _mapped_bytes() -> int:
    """Bytes of files that are in this process's memory, of those on a RAM disk too."""
    kinds = ("RssFile", "RssShmem")
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(kinds))
