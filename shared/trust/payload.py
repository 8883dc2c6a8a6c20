"""Chunks of a sealed federation: each frame encrypted under a key of its transfer.

    key     HKDF-SHA256(transfer's or federation's key, salt = transfer id, "mailboat update v1" or "mailboat state v1")
    chunk   header (28 bytes, as ever; its length is that of the ciphertext) and
            ChaCha20-Poly1305(key, nonce = index (4 bytes) and the first 8 bytes of the frame's hash, frame, header)

An update's key is drawn by the site's process and handed over with each Offer; it is never written down. After a
restart the site draws another, and what was in flight under the old one is sent again, like anything that was lost.

The nonce holds the frame's own hash: one (key, nonce) never seals two different frames, also where a state is cut into
other frames than before. The receiver knows the hash from the manifest, before the chunk.
"""

from __future__ import annotations

import struct
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from shared.errors import RefusedError
from shared.manifest import Manifest
from shared.messages import Chunk, chunk_header
from shared.trust.envelope import derive

UPDATE_DOMAIN = "mailboat update v1"
STATE_DOMAIN = "mailboat state v1"
TAG_BYTES = 16

_V = TypeVar("_V")


class Recent(Generic[_V]):
    """The values used last, at most `limit` of them; from any thread."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._values: OrderedDict[str, _V] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, name: str) -> _V | None:
        """The value of this name, if it is among them."""
        with self._lock:
            if name in self._values:
                self._values.move_to_end(name)
            return self._values.get(name)

    def put(self, name: str, value: _V) -> None:
        """Keep a value; the one that was not used for longest goes."""
        with self._lock:
            self._values[name] = value
            self._values.move_to_end(name)
            if len(self._values) > self._limit:
                self._values.popitem(last=False)

    def get_or_make(self, name: str, make: Callable[[], _V]) -> _V:
        """The value of this name, made now if need be."""
        value = self.get(name)
        if value is None:
            value = make()
            self.put(name, value)
        return value


def cipher(key: bytes, domain: str, transfer_id: str) -> ChaCha20Poly1305:
    """The cipher of one transfer's chunks."""
    return ChaCha20Poly1305(derive(key, bytes.fromhex(transfer_id), domain))


def seal_chunk(by: ChaCha20Poly1305, manifest: Manifest, index: int, frame: bytes) -> bytes:
    """Return the packet of one frame: 28 bytes of header, ciphertext, tag."""
    header = chunk_header(manifest.transfer_id, index, len(frame) + TAG_BYTES)
    return header + by.encrypt(_nonce(manifest, index), frame, header)


def open_chunk(by: ChaCha20Poly1305, manifest: Manifest, chunk: Chunk) -> bytes | None:
    """Return a chunk's frame, None when it was not sealed by this cipher, for this transfer and this index.

    RefusedError(rule='frame-index') when the manifest has no such frame.
    """
    if not 0 <= chunk.index < manifest.frames:
        raise RefusedError(f"frame {chunk.index} of a transfer of {manifest.frames}", rule="frame-index")
    header = chunk_header(chunk.transfer_id, chunk.index, len(chunk.frame))
    try:
        return by.decrypt(_nonce(manifest, chunk.index), chunk.frame, header)
    except InvalidTag:
        return None


def _nonce(manifest: Manifest, index: int) -> bytes:
    return struct.pack(">I", index) + manifest.frame_hash(index)[:8]
