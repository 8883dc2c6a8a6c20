from __future__ import annotations

import contextlib
import itertools
import struct
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import get_args

import numpy as np
import pytest
import zstandard
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from shared.codec import Codec, Group, encode_file
from shared.errors import RefusedError
from shared.manifest import MAX_FRAME_BYTES, MAX_SLICE_BYTES
from shared.slices import FrameWriter, compress_slice, cut, expand_frame, expand_into, make_transfer_frames
from shared.tensorfile import f32_to_bf16

GROUPS: st.SearchStrategy[Group] = st.sampled_from([1, 2, 4])
groups = pytest.mark.parametrize("group", [1, 2, 4])


def rule_of(frame: bytes, raw_size: int, group: int = 1) -> str:
    """The rule under which a frame is refused."""
    with pytest.raises(RefusedError) as caught:
        expand_frame(frame, raw_size, group)
    return caught.value.rule


def zstd(data: bytes, **options: bool | int) -> bytes:
    """A frame as another sender might make it."""
    return zstandard.ZstdCompressor(level=1, **options).compress(data)  # type: ignore[arg-type]


@given(raw=st.binary(min_size=1, max_size=2000), group=GROUPS)
def test_a_slice_comes_back(raw: bytes, group: int) -> None:
    """Compression and expansion are inverse for any bytes, also where the width does not divide them."""
    frame = compress_slice(raw, group)
    assert expand_frame(frame, len(raw), group) == raw
    assert len(frame) <= len(raw) + len(raw) // 256 + 64


@groups
@pytest.mark.parametrize("size", [8, 512 * 1024, MAX_SLICE_BYTES])
def test_noise_grows_by_almost_nothing(group: int, size: int) -> None:
    """A frame of incompressible bytes stays within the packet limit and 0.4 % of the slice."""
    raw = np.random.default_rng(1).bytes(size)
    frame = compress_slice(raw, group)
    assert len(frame) <= size + size // 256 + 64
    assert len(frame) <= MAX_FRAME_BYTES
    assert expand_frame(frame, size, group) == raw


def test_what_was_compressed_before_leaves_no_trace() -> None:
    """A slice makes the frame that a fresh thread makes of it, whatever this one has compressed before."""
    rng = np.random.default_rng(3)
    slices = [
        (rng.standard_normal(size) * scale).astype(np.float32).tobytes() for size in (999, 40_000) for scale in (1, 9)
    ]
    for before, raw in itertools.product(slices, slices):
        compress_slice(before, 2)
        with ThreadPoolExecutor(1) as fresh:
            assert compress_slice(raw, 4) == fresh.submit(compress_slice, raw, 4).result()


def test_a_frame_that_was_refused_leaves_no_trace() -> None:
    """A thread that met a damaged frame, a cut one and one with more behind it expands the next sound one as ever."""
    raw = np.random.default_rng(4).bytes(40_000)
    frame = compress_slice(raw, 4)
    for spoilt in (frame[:-9], frame + b"more", frame[:20] + bytes(40) + frame[60:]):
        with pytest.raises(RefusedError, match="frame"):
            expand_frame(spoilt, len(raw) - 4, 4)
        with contextlib.suppress(RefusedError):  # without a checksum, damage may go unseen here; its hash shows it
            expand_frame(spoilt, len(raw), 4)
        assert expand_frame(frame, len(raw), 4) == raw


def test_frames_declare_their_size_and_nothing_else() -> None:
    """A frame declares its content size, and has neither checksum nor dictionary."""
    declared = zstandard.get_frame_parameters(compress_slice(bytes(5000), 2))
    assert (declared.content_size, declared.has_checksum, declared.dict_id) == (5000, False, 0)


def test_grouping_puts_equal_bytes_together() -> None:
    """A frame holds the first bytes of all elements, then the second ones, then what the width does not divide."""
    frame = compress_slice(b"a1b2c3d4!", 2)
    assert zstandard.ZstdDecompressor().decompress(frame) == b"abcd1234!"
    frame = compress_slice(b"abcdABCDxyz", 4)
    assert zstandard.ZstdDecompressor().decompress(frame) == b"aAbBcCdDxyz"


@pytest.mark.parametrize("size", [8, 64, 100, 128, 512])
def test_grouping_makes_floats_smaller(size: int) -> None:
    """Whatever the slice's size in KiB, the bfloat16 bits of normally distributed values shrink to 71 % or less."""
    values = (np.random.default_rng(2).standard_normal(size * 512) * 1e-4).astype(np.float32)
    bits = f32_to_bf16(values).tobytes()
    assert len(bits) == size * 1024
    assert len(compress_slice(bits, 2)) < 0.71 * len(bits)
    assert len(compress_slice(bits, 1)) > 0.75 * len(bits)


@pytest.mark.parametrize(
    ("codec", "percent"),
    [
        ("f32", 84.0),
        ("bf16", 34.5),
        ("int8", 23.9),
        ("int4", 11.2),
        ("ternary", 4.0),
        ("topk2", 0.55),
        ("topk2x4", 1.6),
    ],
)
def test_share_of_float32(codec: Codec, percent: float) -> None:
    """Of a million normally distributed values in four tensors no more travels than this, header included."""
    rng = np.random.default_rng(3)
    tensors = {f"layer.{n}": (rng.standard_normal((512, 512)) * 1e-4).astype(np.float32) for n in range(4)}
    sent = sum(len(frame.data) for frame in make_transfer_frames(tensors, codec, {}))
    assert 100 * sent / (4 * 4 * 512 * 512) <= percent


def test_bombs_are_refused_before_they_are_opened() -> None:
    """A frame of a few hundred bytes that expands to 64 MB costs no memory, whichever size it declares."""
    honest = zstd(bytes(64_000_000))
    place = honest.index(struct.pack("<I", 64_000_000))
    lying = honest[:place] + struct.pack("<I", 70_000) + honest[place + 4 :]
    silent = zstd(bytes(64_000_000), write_content_size=False)
    tracemalloc.start()
    try:
        assert rule_of(honest, 70_000) == "frame-size"
        assert rule_of(lying, 70_000) == "frame-data"
        assert rule_of(silent, 70_000) == "frame-size"
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000


@pytest.mark.parametrize(
    ("frame", "rule"),
    [
        (b"", "frame-format"),
        (b"\x28\xb5\x2f\xfd", "frame-format"),
        (bytes(100), "frame-format"),
        (b"\x50\x2a\x4d\x18\x04\0\0\0abcd", "frame-format"),
        (b"\x50\x2a\x4d\x18\0\0\0\0" + zstd(bytes(100)), "frame-format"),
        (zstd(bytes(100), write_checksum=True), "frame-format"),
        (zstd(bytes(100), write_content_size=False), "frame-size"),
        (zstd(bytes(99)), "frame-size"),
        (zstd(bytes(101)), "frame-size"),
        (zstd(b""), "frame-size"),
        (zstd(bytes(100)) + b"\0", "frame-data"),
        (zstd(bytes(100)) + zstd(bytes(100)), "frame-data"),
        (zstd(bytes(100)) + b"\x50\x2a\x4d\x18\0\0\0\0", "frame-data"),
    ],
)
def test_each_violation_has_its_rule(frame: bytes, rule: str) -> None:
    """Anything but one plain frame of exactly the declared, expected size is refused under the rule's name."""
    assert rule_of(frame, 100) == rule


def test_large_windows_and_dictionaries_are_refused() -> None:
    """A frame that would make the decoder allocate 128 MiB, or look for a dictionary, is refused by its header."""
    # RFC 8878, 3.1.1.1: descriptor (content size of 4 bytes, not single segment), window descriptor, content size.
    window = b"\x28\xb5\x2f\xfd" + bytes([0b10_0_00000, (27 - 10) << 3]) + struct.pack("<I", 100) + b"\x01\0\0"
    assert rule_of(window, 100) == "frame-format"
    # The same with a dictionary id of one byte instead.
    dictionary = b"\x28\xb5\x2f\xfd" + bytes([0b10_1_00001, 7]) + struct.pack("<I", 100) + b"\x01\0\0"
    assert rule_of(dictionary, 100) == "frame-format"


@groups
def test_truncation_is_refused_at_each_byte(group: int) -> None:
    """Every proper beginning of a frame is refused, wherever it ends."""
    raw = np.random.default_rng(3).standard_normal(100).astype(np.float32).tobytes()
    frame = compress_slice(raw, group)
    for size in range(len(frame)):
        assert rule_of(frame[:size], len(raw), group) in {"frame-format", "frame-size", "frame-data"}


@given(data=st.data(), group=GROUPS)
def test_damage_is_refused_or_of_the_right_size(data: st.DataObject, group: int) -> None:
    """A frame with bytes changed is refused, or fills exactly the buffer given; nothing else is raised."""
    raw = bytes(range(256)) * 4
    frame = bytearray(compress_slice(raw, group))
    for _ in range(data.draw(st.integers(1, 3))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    into = np.full(len(raw) + 2, 7, dtype=np.uint8)
    with contextlib.suppress(RefusedError):
        expand_into(bytes(frame), into[1:-1], group)
    assert into[0] == into[-1] == 7


@given(junk=st.binary(max_size=100), size=st.integers(1, 1000))
def test_junk_behind_the_magic_is_refused(junk: bytes, size: int) -> None:
    """Arbitrary bytes behind a true magic number are refused, or are a frame of that very size."""
    with contextlib.suppress(RefusedError):
        assert len(expand_frame(b"\x28\xb5\x2f\xfd" + junk, size, 1)) == size


@given(chunks=st.lists(st.binary(max_size=40)), size=st.sampled_from([1, 8, 16, 24]))
def test_cutting_keeps_every_byte(chunks: list[bytes], size: int) -> None:
    """Pieces have the size asked for, the last one at most that, and make up the chunks' bytes in order."""
    pieces = [bytes(piece) for piece in cut(chunks, size)]
    assert b"".join(pieces) == b"".join(chunks)
    assert all(len(piece) == size for piece in pieces[:-1])
    assert all(pieces)


@given(chunks=st.lists(st.binary(max_size=60)), group=GROUPS)
def test_frames_and_summary_describe_the_file(chunks: list[bytes], group: Group) -> None:
    """Frames expand to the file, and the summary holds the true sizes and hashes of frames and file."""
    writer = FrameWriter(chunks, group=group, slice_size=16)
    frames = list(writer)
    summary, whole = writer.summary, b"".join(chunks)
    sizes = [min(16, len(whole) - start) for start in range(0, len(whole), 16)]
    raws = [expand_frame(frame.data, size, group) for frame, size in zip(frames, sizes, strict=True)]
    assert b"".join(raws) == whole
    assert (summary.file_size, summary.slice_size, summary.group) == (len(whole), 16, group)
    assert summary.file_digest == blake3(whole).hexdigest()
    assert summary.frame_lengths == tuple(len(frame.data) for frame in frames)
    assert summary.frame_hashes == b"".join(blake3(frame.data).digest() for frame in frames)
    assert all(frame.digest == blake3(frame.data).digest() for frame in frames)


def test_the_file_is_never_in_memory_as_a_whole() -> None:
    """Writing 64 MiB takes less than 3 MiB at any time."""
    piece = bytes(1 << 18)

    def chunks() -> Iterator[bytes]:
        for _ in range(256):
            yield piece

    tracemalloc.start()
    try:
        writer = FrameWriter(chunks(), group=2)
        assert sum(1 for _ in writer) == 128
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert writer.summary.file_size == 64 << 20
    assert peak < 3 << 20


@pytest.mark.parametrize("codec", get_args(Codec))
def test_transfer_frames_hold_the_safetensors_file(codec: Codec) -> None:
    """The frames made of tensors expand to the bytes of their safetensors file, the same each time."""
    rng = np.random.default_rng(4)
    tensors = {name: rng.standard_normal((37, 41)).astype(np.float32) for name in "abc"}
    writer = make_transfer_frames(tensors, codec, {"codec": codec}, slice_size=4096)
    frames = [frame.data for frame in writer]
    file = b"".join(encode_file(tensors, codec, {"codec": codec}))
    summary = writer.summary
    assert summary.file_digest == blake3(file).hexdigest()
    last = len(file) - 4096 * (len(frames) - 1)
    sizes = [4096] * (len(frames) - 1) + [last]
    assert b"".join(map(expand_frame, frames, sizes, [summary.group] * len(frames))) == file
    assert frames == [frame.data for frame in make_transfer_frames(tensors, codec, {"codec": codec}, slice_size=4096)]
