from __future__ import annotations

import random
import struct
import tracemalloc
from typing import Any, get_args

import numpy as np
import pytest

from shared.codec import SPAN, Codec, decode_tensor, encode, encode_file, group_size
from shared.errors import RefusedError
from shared.manifest import Manifest
from shared.reader import TensorReader
from shared.slices import FrameWriter, compress_slice, make_transfer_frames
from tests.unit.shared.transfers import SLICE_BYTES, manifest_builder, tensors_of, transfer_of, with_frames

codecs = pytest.mark.parametrize("codec", get_args(Codec))


def expected(codec: Codec) -> dict[str, np.ndarray[Any, Any]]:
    """What decoding gives, without any file in between."""
    return {
        name: decode_tensor([array for _, _, array in encode(name, values, codec)], codec, values.shape)
        for name, values in tensors_of().items()
    }


def reader_of(manifest: Manifest, frames: list[bytes], *, verify: bool = True) -> TensorReader:
    """A reader of frames in memory."""
    return TensorReader(manifest, frames.__getitem__, verify=verify)


def counting(manifest: Manifest, frames: list[bytes]) -> tuple[TensorReader, list[int]]:
    """A reader of frames in memory, and the frames that it has taken so far."""
    taken: list[int] = []

    def read_frame(index: int) -> bytes:
        taken.append(index)
        return frames[index]

    return TensorReader(manifest, read_frame, verify=True), taken


def rule_of(manifest: Manifest, frames: list[bytes]) -> str:
    """The rule under which reading and verifying everything is refused."""
    with pytest.raises(RefusedError) as caught:
        read_all(manifest, frames)
    return caught.value.rule


def read_all(manifest: Manifest, frames: list[bytes]) -> None:
    """Read all tensors, then verify."""
    reader = reader_of(manifest, frames)
    for _ in reader.tensors():
        pass
    reader.verify_file()


def refile(file: bytes, codec: Codec = "f32") -> tuple[Manifest, list[bytes]]:
    """Honest frames and manifest of any file whatsoever."""
    writer = FrameWriter([file], group=group_size(codec), slice_size=SLICE_BYTES)
    frames = [frame.data for frame in writer]
    return manifest_builder(codec)(writer.summary), frames


@codecs
def test_tensors_come_back_in_file_order(codec: Codec) -> None:
    """All tensors are yielded once, in ascending order of name, as their codec decodes them."""
    reader = reader_of(*transfer_of(tensors_of(), codec))
    read = dict(reader.tensors())
    assert list(read) == sorted(tensors_of())
    for name, values in expected(codec).items():
        np.testing.assert_array_equal(read[name], values)
        assert read[name].shape == values.shape == reader.shapes[name]
    assert reader.header.metadata == {"codec": codec}


@codecs
def test_tensors_come_back_in_any_order(codec: Codec) -> None:
    """Random access, repeated, gives the same tensors, and the file's hash is right all the same."""
    reader = reader_of(*transfer_of(tensors_of(), codec))
    wanted = expected(codec)
    names = list(wanted) * 3
    random.Random(1).shuffle(names)
    for name in names:
        np.testing.assert_array_equal(reader.tensor(name), wanted[name])
    reader.verify_file()


@codecs
def test_add_tensor_accumulates(codec: Codec) -> None:
    """A tensor is added with its weight to an accumulator."""
    reader = reader_of(*transfer_of(tensors_of(), codec), verify=False)
    accumulator = np.ones((110, 101), dtype=np.float32)
    reader.add_tensor("layer.w", 0.5, accumulator)
    np.testing.assert_allclose(accumulator, 1 + 0.5 * expected(codec)["layer.w"], rtol=1e-6)


def test_stored_parts_can_be_read() -> None:
    """Companions are read as they are stored; an unknown name is a KeyError."""
    reader = reader_of(*transfer_of(tensors_of(), "int8"))
    assert reader.stored("layer.w").dtype == np.int8
    assert reader.stored("layer.w.scale").shape == (-(-110 * 101 // 256),)
    with pytest.raises(KeyError):
        reader.stored("layer.x")


def test_reading_in_order_reads_each_frame_once() -> None:
    """Sequential reading with verification takes each frame from the disk once only."""
    manifest, frames = transfer_of(tensors_of(), "f32")
    reader, taken = counting(manifest, frames)
    for _ in reader.tensors():
        pass
    reader.verify_file()
    assert sorted(taken) == list(range(manifest.frames))


@codecs
def test_spans_are_the_tensor(codec: Codec) -> None:
    """The spans of a tensor, one behind the other, are what reading it whole gives; also of an empty one."""
    given = tensors_of()
    given["large"] = (np.random.default_rng(1).standard_normal(2 * SPAN + 777) * 1e-3).astype(np.float32)
    reader = reader_of(*transfer_of(given, codec))
    for name in given:
        spans = list(reader.spans(name))
        assert all(span.size <= SPAN for span in spans)
        np.testing.assert_array_equal(
            np.concatenate([np.empty(0, np.float32), *spans]), reader.tensor(name).reshape(-1)
        )


@codecs
def test_spans_read_each_frame_once(codec: Codec) -> None:
    """Spans of all tensors, with verification, take each frame from the disk once, companions behind them included."""
    values = (np.random.default_rng(2).standard_normal(3 * SPAN + 5) * 1e-3).astype(np.float32)
    writer = make_transfer_frames({"a": values, "b": values[:1000]}, codec, {})
    frames = [frame.data for frame in writer]
    manifest = manifest_builder(codec)(writer.summary)
    reader, taken = counting(manifest, frames)
    for name in reader.shapes:
        for _ in reader.spans(name):
            pass
    reader.verify_file()
    assert sorted(taken) == list(range(manifest.frames))


@pytest.mark.parametrize("codec", ["int8", "int4", "ternary", "topk2", "topk2x4"])
def test_spans_of_a_large_tensor_read_no_frame_for_each_span(codec: Codec) -> None:
    """Where each companion fills slices of its own, spans read from all of them, and each frame twice at most."""
    values = (np.random.default_rng(2).standard_normal(32 * SPAN) * 1e-3).astype(np.float32)
    writer = make_transfer_frames({"a": values}, codec, {}, 16 * 1024)
    frames = [frame.data for frame in writer]
    manifest = manifest_builder(codec)(writer.summary)
    reader, taken = counting(manifest, frames)
    for _ in reader.spans("a"):
        pass
    reader.verify_file()
    assert len(taken) <= 2 * manifest.frames


def test_a_companion_of_many_slices_is_hashed_in_its_turn() -> None:
    """A tensor whose companion fills slices of its own leaves nothing behind it for the file's hash to read anew."""
    values = (np.random.default_rng(2).standard_normal(3 * SPAN + 5) * 1e-3).astype(np.float32)
    manifest, frames = transfer_of({"a": values, "b": values[:100_000]}, "int8")
    reader, taken = counting(manifest, frames)
    for name in reader.shapes:
        for _ in reader.spans(name):
            pass
    companion = 4 * (len(values) // 256 + 1) // SLICE_BYTES + 2
    before = len(taken)
    reader.verify_file()
    assert len(taken) - before <= 1
    assert len(taken) <= manifest.frames + 2 * companion


def test_memory_of_spans_is_that_of_slices() -> None:
    """Reading one tensor of 32 MiB in spans takes a few slices of memory."""
    one = (np.random.default_rng(0).standard_normal(1 << 23) * 1e-3).astype(np.float32)
    writer = make_transfer_frames({"w": one}, "f32", {})
    frames = [frame.data for frame in writer]
    manifest = manifest_builder("f32")(writer.summary)
    tracemalloc.start()
    try:
        for _ in reader_of(manifest, frames).spans("w"):
            pass
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 6 << 20


def test_slices_make_up_the_file() -> None:
    """The plain slices, one behind the other, are the safetensors file."""
    reader = reader_of(*transfer_of(tensors_of()))
    assert b"".join(piece.tobytes() for piece in reader.slices()) == b"".join(
        encode_file(tensors_of(), "bf16", {"codec": "bf16"})
    )


def test_memory_is_that_of_the_largest_tensor() -> None:
    """Reading 32 tensors of 1 MiB takes little more memory than one of them."""
    one = (np.random.default_rng(0).standard_normal(1 << 18) * 1e-3).astype(np.float32)
    writer = make_transfer_frames({f"w{index:02}": one for index in range(32)}, "bf16", {})
    frames = [frame.data for frame in writer]
    manifest = manifest_builder("bf16")(writer.summary)
    tracemalloc.start()
    try:
        for _ in reader_of(manifest, frames).tensors():
            pass
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 6 << 20


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"codec": "int3"}, "unknown-codec"),
        ({"codec": "f32"}, "codec-group"),
        ({"codec": "int8"}, "codec-group"),
        ({"group": 1}, "codec-group"),
        ({"file_digest": "00" * 32}, "file-hash"),
    ],
)
def test_a_lying_manifest_is_refused(changes: dict[str, Any], rule: str) -> None:
    """A manifest that names an unknown codec, another grouping or another file is refused under the rule's name."""
    manifest, frames = transfer_of(tensors_of())
    assert rule_of(manifest.model_copy(update=changes), frames) == rule


@pytest.mark.parametrize("codec", ["f32", "int8"])
def test_a_file_of_another_codec_is_refused(codec: Codec) -> None:
    """A sound file of bfloat16 tensors, sent as if it were of another codec, is refused."""
    manifest, frames = refile(b"".join(encode_file(tensors_of(), "bf16", {})), codec)
    assert rule_of(manifest, frames) == "codec-parts"


def test_a_slice_of_another_size_is_refused() -> None:
    """A frame that has the manifest's hash, but holds more or fewer bytes than its slice, is refused."""
    manifest, frames = transfer_of(tensors_of())
    for size in (SLICE_BYTES - 2, SLICE_BYTES + 2, 60_000):
        lying = [*frames[:3], compress_slice(bytes(size), 2), *frames[4:]]
        assert rule_of(with_frames(manifest, lying), lying) == "frame-size"


def test_a_swapped_slice_is_found_by_the_file_hash() -> None:
    """Frames that are sound one by one, but not those of the file announced, are refused at the end."""
    manifest, frames = transfer_of(tensors_of())
    frames[2], frames[3] = frames[3], frames[2]
    assert rule_of(with_frames(manifest, frames), frames) == "file-hash"


def test_a_slice_beyond_all_tensors_read_still_counts() -> None:
    """Verification covers slices that no tensor read so far has touched."""
    manifest, frames = transfer_of(tensors_of())
    frames[-1] = compress_slice(bytes(manifest.raw_size(manifest.frames - 1)), 2)
    reader = reader_of(with_frames(manifest, frames), frames)
    reader.tensor("empty")
    with pytest.raises(RefusedError) as caught:
        reader.verify_file()
    assert caught.value.rule == "file-hash"


@pytest.mark.parametrize(
    ("file", "rule"),
    [
        (b"x", "header-truncated"),
        (bytes(8), "header-size"),
        (bytes(100_000), "header-size"),
        (struct.pack("<Q", 1 << 60) + bytes(5000), "header-size"),
        (struct.pack("<Q", 9000) + bytes(5000), "header-truncated"),
        (struct.pack("<Q", 5000) + b"{" * 6000, "header-json"),
        (struct.pack("<Q", 2) + b"{}" + bytes(5000), "file-size"),
    ],
)
def test_files_that_are_not_safetensors_are_refused(file: bytes, rule: str) -> None:
    """Honest frames of a file with a hostile header are refused when the reader is made."""
    manifest, frames = refile(file)
    with pytest.raises(RefusedError) as caught:
        reader_of(manifest, frames)
    assert caught.value.rule == rule


def test_verification_must_be_asked_for_beforehand() -> None:
    """A reader that did not hash cannot claim to have verified."""
    reader = reader_of(*transfer_of(tensors_of()), verify=False)
    with pytest.raises(AssertionError):
        reader.verify_file()
