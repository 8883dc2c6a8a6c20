"""Tensors out of the frames of one transfer, slice by slice, in bounded memory.

A reader sees frames through a function, so it does not know where they rest. It keeps the slices used last, one more
than the codec has parts: each part of a span may end in a slice in which the next span begins, and one lies across two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.codec import SPAN, codec_named, decode_add, decode_tensor, group_size, part_specs, tensor_shapes
from shared.digest import Hasher
from shared.errors import RefusedError
from shared.manifest import Manifest
from shared.slices import ByteArray, expand_into
from shared.tensorfile import NUMPY_DTYPES, F32Array, Shape, header_size, parse_header, tensor_bytes


class TensorReader:
    """Reads the safetensors file that `manifest` describes from its frames.

    `read_frame(index)` returns a frame that has the manifest's length. What the frames hold is a sender's
    word: RefusedError as from `expand_into`, `parse_header`, `codec_named` and `tensor_shapes`, or with rule
    'codec-group' when the manifest's grouping is not the codec's. `shapes` names the tensors that can be read;
    compare it with the plan before reading, as memory is that of the tensor read and of two slices more than the codec
    has parts (with `spans`, of these slices and three spans, whatever the tensor's size).

    With `verify`, slices are hashed on their way for `verify_file`.
    """

    def __init__(self, manifest: Manifest, read_frame: Callable[[int], bytes], *, verify: bool) -> None:
        self.codec = codec_named(manifest.codec)
        if manifest.group != group_size(self.codec):
            raise RefusedError(
                f"codec {self.codec} groups by {group_size(self.codec)} bytes, the manifest says {manifest.group}",
                rule="codec-group",
            )
        self.manifest = manifest
        self._read_frame = read_frame
        self._verify = verify
        self._kept: dict[int, ByteArray] = {}
        self._keep = 1 + len(part_specs("", (), self.codec))
        self._hash = Hasher()
        self._hashed = 0
        prefix = self._bytes(0, min(8, manifest.file_size)).tobytes()
        head = self._bytes(0, header_size(prefix, manifest.file_size)).tobytes()
        self.header = parse_header(head, manifest.file_size)
        self.shapes: dict[str, Shape] = tensor_shapes(self.header, self.codec)
        """Name and shape of each encoded tensor, in file order."""
        self._specs = {spec.name: spec for spec in self.header.specs}

    def stored(self, name: str) -> NDArray[Any]:
        """Return one tensor as it is stored (bfloat16 as uint16), companions included; KeyError for an unknown name."""
        spec = self._specs[name]
        data = self._bytes(self.header.size + spec.begin, self.header.size + spec.end)
        return data.view(NUMPY_DTYPES[spec.dtype]).reshape(spec.shape)

    def tensor(self, name: str) -> F32Array:
        """Return one decoded tensor; may hold NaN or infinity. RefusedError as `decode_tensor`."""
        return decode_tensor(self._parts(name), self.codec, self.shapes[name])

    def add_tensor(self, name: str, weight: float, accumulator: F32Array) -> None:
        """Add weight x one tensor to an accumulator of its shape; RefusedError as `decode_add`."""
        decode_add(self._parts(name), self.codec, weight, accumulator)

    def spans(self, name: str) -> Iterator[F32Array]:
        """Yield one decoded tensor, flat, at most SPAN values at a time; RefusedError as `decode_tensor`."""
        size = math.prod(self.shapes[name])
        for start in range(0, size, SPAN):
            yield self.span(name, start, min(SPAN, size - start))
        self._hash_until(max(self._specs[part].end for part, _, _ in part_specs(name, self.shapes[name], self.codec)))

    def span(self, name: str, start: int, count: int) -> F32Array:
        """Return `count` decoded values of one tensor, flat, from `start`, a multiple of its codec's block.

        RefusedError as `decode_tensor`.
        """
        # So what lies before it is what `start` values take.
        before, here = (part_specs(name, (size,), self.codec) for size in (start, count))
        parts = []
        for (_, _, skipped), (part, dtype, shape) in zip(before, here, strict=True):
            begin = self.header.size + self._specs[part].begin + tensor_bytes(dtype, skipped)
            data = self._bytes(begin, begin + tensor_bytes(dtype, shape))
            parts.append(data.view(NUMPY_DTYPES[dtype]).reshape(shape))
        return decode_tensor(parts, self.codec, (count,))

    def tensors(self) -> Iterator[tuple[str, F32Array]]:
        """Yield all tensors, decoded, in file order."""
        for name in self.shapes:
            yield name, self.tensor(name)

    def slices(self) -> Iterator[ByteArray]:
        """Yield the bytes of the plain safetensors file; a slice is valid until the next one."""
        for index in range(self.manifest.frames):
            yield self._slice(index)

    def verify_file(self) -> None:
        """Read what was not read in order so far, and compare the file's hash with the manifest's.

        RefusedError(rule='file-hash') when they differ. After reading all tensors in file order this costs nothing.
        """
        assert self._verify, "slices were not hashed"
        for index in range(self._hashed, self.manifest.frames):
            self._slice(index)
        if self._hash.hexdigest() != self.manifest.file_digest:
            raise RefusedError("the file's hash is not the one that its manifest announced", rule="file-hash")

    def _parts(self, name: str) -> list[NDArray[Any]]:
        return [self.stored(part) for part, _, _ in part_specs(name, self.shapes[name], self.codec)]

    def _bytes(self, begin: int, end: int) -> ByteArray:
        """Return the bytes [begin, end) of the file; slices that lie wholly within are expanded in place."""
        out = np.empty(end - begin, dtype=np.uint8)
        size = self.manifest.slice_size
        position = begin
        while position < end:
            index = position // size
            start = index * size
            stop = start + self.manifest.raw_size(index)
            upto = min(stop, end)
            target = out[position - begin : upto - begin]
            if index not in self._kept and target.size == stop - start:
                self._expand(index, target)
            else:
                target[...] = self._slice(index)[position - start : upto - start]
            position = upto
        return out

    def _slice(self, index: int) -> ByteArray:
        raw = self._kept.pop(index, None)
        if raw is None:
            # Dictionaries keep their order: the first one is the one not used for longest. Its memory is reused.
            oldest = self._kept.pop(next(iter(self._kept))) if len(self._kept) == self._keep else None
            size = self.manifest.raw_size(index)
            raw = oldest if oldest is not None and oldest.size == size else np.empty(size, dtype=np.uint8)
            self._expand(index, raw)
        self._kept[index] = raw
        self._hash_next(index, raw)
        return raw

    def _expand(self, index: int, raw: ByteArray) -> None:
        expand_into(self._read_frame(index), raw, self.manifest.group)
        self._hash_next(index, raw)

    def _hash_until(self, end: int) -> None:
        # Of a companion of many slices, the first were read long before their turn.
        if self._verify:
            for index in range(self._hashed, (self.header.size + end) // self.manifest.slice_size):
                self._slice(index)

    def _hash_next(self, index: int, raw: ByteArray) -> None:
        # The file's hash wants its slices in order; one that is read early is hashed when its turn comes.
        if self._verify and index == self._hashed:
            self._hash.update(raw.data)
            self._hashed += 1
