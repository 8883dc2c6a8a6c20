"""A stream of bytes cut into slices of fixed size, each compressed on its own into one zstd frame; and back.

    slice   `slice_size` raw bytes (the last one fewer), byte-grouped: byte 0 of every element, then byte 1, ...
    frame   one zstd frame, its content size declared, without checksum, dictionary or anything behind it

Slices are independent, so frames may arrive in any order and be repeated. Grouping is what makes float data smaller:
exponents stand together and compress, mantissas do not and are stored; source: ZipNN (arXiv 2411.05239). Each group
ends a zstd block, so that it gets statistics of its own: without that, slices whose groups are no multiple of zstd's
128 KiB blocks lose most of the gain (bf16, slices of 128 KiB: 78 % of the bytes instead of 69 %; and slower to expand).

The hash of frames and file is BLAKE3, taken without the interpreter's lock, so that it overlaps with compression; why,
says `shared.digest`.

Deltas after AdamW steps (`make bench-codec`), beside zstd's level 1: bf16 takes 33.6 % of the float32 bytes and not
34.2, f32 79.9 % and not 80.5, both packed and expanded almost twice as fast; int8, int4 and topk2 stay as they are.
Levels above 1 are slower *and* larger.

A frame comes from a peer. Its hash is checked before this module sees it; here its declared content size is compared
with the one size that is right, before anything is decompressed. `ZstdDecompressor.decompress` then allocates exactly
that size and fails when the frame holds more or less (its `max_output_size` argument is no guard: it is ignored for
frames that declare a size, however large).
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import zstandard
from numpy.typing import NDArray

from shared.ahead import ahead
from shared.codec import Codec, Group, encode_file, group_size
from shared.digest import Hasher, digest
from shared.errors import RefusedError
from shared.manifest import DEFAULT_SLICE_BYTES, MAX_FRAME_BYTES, MAX_SLICE_BYTES
from shared.tensorfile import F32Array

ByteArray = NDArray[np.uint8]

PARAMETERS = zstandard.ZstdCompressionParameters(
    strategy=zstandard.STRATEGY_FAST, window_log=20, hash_log=8, min_match=7, write_content_size=True
)
"""Almost entropy coding alone, as in ZipNN: a table of 256 places finds runs and little else. Matches of a few bytes
are chance in exponents, and cost more than they save. The window is larger than any slice."""

WINDOW_BYTES_MAX = 8 * 1024 * 1024
"""What RFC 8878 (3.1.1.1.2) asks of every decoder, and more than our frames need: bounds the decoder's memory."""

_thread = threading.local()

_MAGIC = b"\x28\xb5\x2f\xfd"
"""RFC 8878, 3.1.1; skippable frames have another."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One compressed slice and its digest (32 bytes)."""

    data: bytes
    digest: bytes


@dataclass(frozen=True, slots=True)
class FileSummary:
    """What a manifest says of a file and its frames: sizes in bytes; `frame_hashes` is 32 bytes a frame, in order."""

    slice_size: int
    group: Group
    file_size: int
    file_digest: str
    frame_lengths: tuple[int, ...]
    frame_hashes: bytes


def compress_slice(raw: ByteArray | memoryview | bytes, group: int) -> bytes:
    """Return the frame of one slice of 1 to 768 KiB bytes; at most 0.4 % and 64 bytes longer than the slice.

    Equal bytes give equal frames with one version of zstd; another version may choose other frames.
    """
    data = np.frombuffer(raw, dtype=np.uint8)
    assert 0 < data.size <= MAX_SLICE_BYTES
    stream = _compressor().compressobj(data.size)
    grouped = _grouped(data, group)
    width = data.size // group
    pieces = []
    for plane in range(group - 1):
        pieces += [stream.compress(grouped[plane * width : (plane + 1) * width].data)]
        pieces += [stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)]
    pieces += [stream.compress(grouped[(group - 1) * width :].data), stream.flush()]
    frame = b"".join(pieces)
    assert len(frame) <= min(data.size + data.size // 256 + 64, MAX_FRAME_BYTES)
    return frame


def expand_frame(frame: bytes, raw_size: int, group: int) -> bytes:
    """Return the slice of `raw_size` bytes that a frame holds; RefusedError as `expand_into`."""
    raw = np.empty(raw_size, dtype=np.uint8)
    expand_into(frame, raw, group)
    return raw.tobytes()


def expand_into(frame: bytes, raw: ByteArray, group: int) -> None:
    """Decompress a frame into `raw`, whose size is the only one allowed; memory used: twice that size.

    RefusedError with rule 'frame-format' when the bytes are not one plain zstd frame (a skippable frame, a dictionary,
    a checksum, a window over 8 MiB), 'frame-size' when it declares another size, 'frame-data' when it is damaged,
    holds another size than it declares, or more bytes follow.
    """
    if frame[:4] != _MAGIC:
        _refuse("frame-format", "a frame does not begin as a zstd frame")
    try:
        declared = zstandard.get_frame_parameters(frame)
    except zstandard.ZstdError:
        raise RefusedError("a frame's header is damaged", rule="frame-format") from None
    if declared.dict_id or declared.has_checksum or declared.window_size > WINDOW_BYTES_MAX:
        _refuse("frame-format", "a frame asks for a dictionary, a checksum or too large a window")
    if declared.content_size != raw.size:
        _refuse("frame-size", f"a frame does not declare the {raw.size} bytes that its slice has")
    try:
        grouped = _decompressor().decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError:
        raise RefusedError("a frame does not decompress to its declared size", rule="frame-data") from None
    assert len(grouped) == raw.size, "zstandard checks this itself"
    _ungroup(np.frombuffer(grouped, dtype=np.uint8), raw, group)


def _compressor() -> zstandard.ZstdCompressor:
    """The one of this thread: a new one would ask the kernel for a megabyte of fresh pages, slice by slice."""
    if not hasattr(_thread, "compressor"):
        _thread.compressor = zstandard.ZstdCompressor(compression_params=PARAMETERS)
    compressor: zstandard.ZstdCompressor = _thread.compressor
    return compressor


def _decompressor() -> zstandard.ZstdDecompressor:
    """The one of this thread; a frame that was refused leaves nothing in it."""
    if not hasattr(_thread, "decompressor"):
        _thread.decompressor = zstandard.ZstdDecompressor()
    decompressor: zstandard.ZstdDecompressor = _thread.decompressor
    return decompressor


def _refuse(rule: str, message: str) -> NoReturn:
    raise RefusedError(message, rule=rule)


def _grouped(raw: ByteArray, group: int) -> ByteArray:
    if group == 1:
        return raw
    count = raw.size // group
    out = np.empty_like(raw)
    words = raw[: count * group].view(f"<u{group}")
    # Shifted and cut to a byte, one pass a plane: 10 GB/s (width 4), where a strided copy makes 4.
    for plane in range(group):
        into = out[plane * count : (plane + 1) * count]
        np.right_shift(words, 8 * plane, out=into, dtype=words.dtype, casting="unsafe")
    out[count * group :] = raw[count * group :]
    return out


def _ungroup(grouped: ByteArray, raw: ByteArray, group: int) -> None:
    if group == 1:
        raw[...] = grouped
        return
    count = raw.size // group
    words = raw[: count * group].view(f"<u{group}")
    words[...] = grouped[(group - 1) * count : group * count]
    for plane in reversed(range(group - 1)):
        np.left_shift(words, 8, out=words)
        np.bitwise_or(words, grouped[plane * count : (plane + 1) * count], out=words)
    raw[count * group :] = grouped[count * group :]


class FrameWriter:
    """Turns chunks of bytes, of any sizes, into frames, and sums up the file afterwards; iterate it once.

    The next frame is compressed in a thread while this one is hashed and stored. Holds one slice and two frames at a
    time. `summary` is there when the iteration has ended.
    """

    def __init__(
        self,
        chunks: Iterable[bytes | memoryview],
        *,
        group: Group,
        slice_size: int = DEFAULT_SLICE_BYTES,
    ) -> None:
        assert slice_size % 8 == 0
        assert 0 < slice_size <= MAX_SLICE_BYTES
        self._chunks = chunks
        self._group = group
        self._slice_size = slice_size
        self._summary: FileSummary | None = None

    def __iter__(self) -> Generator[Frame, None, None]:
        file_hash = Hasher()
        file_size = 0
        lengths: list[int] = []
        hashes: list[bytes] = []

        def compressed() -> Iterator[bytes]:
            nonlocal file_size
            for raw in cut(self._chunks, self._slice_size):
                file_hash.update(raw)
                file_size += len(raw)
                yield compress_slice(raw, self._group)

        with closing(ahead(compressed())) as coming:
            for data in coming:
                frame = Frame(data, digest(data))
                lengths.append(len(data))
                hashes.append(frame.digest)
                yield frame
        self._summary = FileSummary(
            self._slice_size, self._group, file_size, file_hash.hexdigest(), tuple(lengths), b"".join(hashes)
        )

    @property
    def summary(self) -> FileSummary:
        """Sizes and hashes of the file and its frames; asserts that the frames were all taken."""
        assert self._summary is not None, "iterate first"
        return self._summary


def cut(chunks: Iterable[bytes | memoryview], size: int) -> Iterator[memoryview]:
    """Yield the concatenation of `chunks` in pieces of `size` bytes, the last one shorter.

    A piece that lies within one chunk is a view of it; others are views of a buffer that the next piece reuses.
    """
    buffer = bytearray(size)
    filled = 0
    for chunk in chunks:
        rest = memoryview(chunk).cast("B")
        while rest:
            if not filled and len(rest) >= size:
                yield rest[:size]
                rest = rest[size:]
                continue
            taken = rest[: size - filled]
            buffer[filled : filled + len(taken)] = taken
            filled += len(taken)
            rest = rest[len(taken) :]
            if filled == size:
                yield memoryview(buffer)
                filled = 0
    if filled:
        yield memoryview(buffer)[:filled]


def make_transfer_frames(
    tensors: Mapping[str, F32Array],
    codec: Codec,
    metadata: Mapping[str, str],
    slice_size: int = DEFAULT_SLICE_BYTES,
) -> FrameWriter:
    """Return a writer of the frames of the safetensors file that holds `tensors` in `codec`.

    In memory at a time: one encoded tensor, one slice and two frames. Errors as `encode_file`, on iteration.
    """
    return FrameWriter(encode_file(tensors, codec, metadata), group=group_size(codec), slice_size=slice_size)
