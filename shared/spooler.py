"""Chunks from the link onto the disk: written in a thread of its own, synced once a batch, then reported.

While one batch is being synced the next one gathers, so a slow disk makes batches larger, not queues of syncs longer.
The memory held here is what has arrived and is not yet written; whoever puts chunks waits for `caught_up` in between,
so that it does not grow with the number of senders.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Self, TypeVar

from shared.errors import NoRoomError, RefusedError
from shared.manifest import Manifest
from shared.messages import Chunk
from shared.room import Room
from shared.store import FrameStore, Partial, Stored
from shared.transfer import Bitmap

BACKLOG_BYTES = 2 * 1024 * 1024
"""Unwritten bytes above which nobody should put more: a batch for the disk while the next one gathers."""

_R = TypeVar("_R")


class Spooler:
    """Arriving transfers of one store; an async context manager.

    `open_chunk(manifest, chunk)` returns a chunk's frame, or raises RefusedError; it is called in the thread.
    `stored(transfer_id, indices)` is called on the loop when chunks are durable; `refused(chunk, rule)` when one was
    not what its manifest says (it is dropped; the sender will be asked for it again). `room` bounds what is begun.
    Where `sender(manifest)` tells whom a transfer is from, one of each sender arrives at a time: what began to arrive
    goes when another one is opened.
    """

    def __init__(
        self,
        store: FrameStore,
        *,
        open_chunk: Callable[[Manifest, Chunk], bytes | memoryview],
        stored: Callable[[str, tuple[int, ...]], None],
        refused: Callable[[Chunk, str], None],
        room: Room | None = None,
        sender: Callable[[Manifest], str] | None = None,
    ) -> None:
        self._store = store
        self._open_chunk = open_chunk
        self._stored = stored
        self._refused = refused
        self._room = room
        self._sender = sender
        self._begun: dict[str, set[str]] | None = None
        """By sender, what began to arrive, what an earlier process left of it too; None until it is asked for."""
        self._open: dict[str, Partial] = {}
        self._arrived: list[Chunk] = []
        self._wake = asyncio.Event()
        self._unwritten = 0
        self._written = asyncio.Event()
        # One thread: a Partial belongs to one, and the order of open, write and finish is kept for free.
        self._thread = ThreadPoolExecutor(1, "spooler")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self._run(self._close_all)
        self._thread.shutdown()

    async def open(self, manifest: Manifest) -> bytes:
        """Begin or resume a transfer and return the bitmap of what is there; full when it is whole already.

        NoRoomError when the disk has no room, or `room` says so; CorruptError when what is there of it is damaged,
        which `close` with `delete` mends; RefusedError(rule='manifest-changed') when the id began to arrive,
        or has arrived, under another manifest.
        """
        return await self._run(self._open_now, manifest)

    def put(self, chunk: Chunk) -> None:
        """Queue one chunk for writing; it keeps its packet in memory until then."""
        self._arrived.append(chunk)
        self._unwritten += len(chunk.frame)
        self._wake.set()

    async def caught_up(self) -> None:
        """Return when more chunks may be put, which is at once unless the disk is slower than the network."""
        while self._unwritten > BACKLOG_BYTES:
            self._written.clear()
            await self._written.wait()

    async def finish(self, transfer_id: str) -> Stored:
        """Make a complete transfer whole and return it."""
        return await self._run(self._finish, transfer_id)

    async def close(self, transfer_id: str, *, delete: bool = False) -> None:
        """Release a transfer's file; what is there stays for the next attempt, or goes with `delete`."""
        await self._run(self._close, transfer_id, delete)

    async def run(self) -> None:
        """Write until cancelled; UnavailableError when the disk does not take it."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            batch, self._arrived = self._arrived, []
            written, refused = await self._run(self._write, batch)
            self._unwritten -= sum(len(chunk.frame) for chunk in batch)
            self._written.set()
            for chunk, rule in refused:
                self._refused(chunk, rule)
            for transfer_id, indices in written.items():
                self._stored(transfer_id, tuple(indices))

    async def _run(self, work: Callable[..., _R], *args: object) -> _R:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *args)

    # -- in the thread ---

    def _open_now(self, manifest: Manifest) -> bytes:
        whole = self._store.get(manifest.transfer_id)
        if whole is not None:
            if whole.manifest != manifest:
                raise RefusedError("this id has arrived under another manifest", rule="manifest-changed")
            return Bitmap(manifest.frames, range(manifest.frames)).to_bytes()
        self._close(manifest.transfer_id, delete=False)
        self._displace(manifest)
        # One that began to arrive has had its room since then.
        if self._room is not None and not self._store.begun(manifest.transfer_id):
            lacking = self._room.lacking(manifest.wire_bytes)
            if lacking is not None:
                raise NoRoomError(f"no room for transfer {manifest.transfer_id}: {lacking}", hint="make room")
        partial = self._open[manifest.transfer_id] = self._store.open_partial(manifest)
        return partial.have.to_bytes()

    def _displace(self, manifest: Manifest) -> None:
        """What else is arriving from the same sender goes."""
        if self._sender is None:
            return
        if self._begun is None:
            self._begun = {}
            for begun in self._store.arriving():
                self._begun.setdefault(self._sender(begun), set()).add(begun.transfer_id)
        sender = self._sender(manifest)
        for other_id in self._begun.get(sender, set()) - {manifest.transfer_id}:
            if self._store.begun(other_id):  # it has not become whole since
                self._close(other_id, delete=True)
        self._begun[sender] = {manifest.transfer_id}

    def _write(self, batch: list[Chunk]) -> tuple[dict[str, list[int]], list[tuple[Chunk, str]]]:
        written: dict[str, list[int]] = {}
        refused: list[tuple[Chunk, str]] = []
        for chunk in batch:
            partial = self._open.get(chunk.transfer_id)
            if partial is None:
                continue  # closed since it was queued
            try:
                partial.write(chunk.index, self._open_chunk(partial.manifest, chunk))
            except RefusedError as error:
                refused.append((chunk, error.rule))
            else:
                written.setdefault(chunk.transfer_id, []).append(chunk.index)
        for transfer_id in written:
            self._open[transfer_id].sync()
        return written, refused

    def _finish(self, transfer_id: str) -> Stored:
        partial = self._open.pop(transfer_id, None)
        stored = partial.finish() if partial is not None else self._store.get(transfer_id)
        assert stored is not None, f"transfer {transfer_id} is neither open nor whole"
        return stored

    def _close(self, transfer_id: str, delete: bool) -> None:  # noqa: FBT001 - passed on by position
        partial = self._open.pop(transfer_id, None)
        if partial is not None:
            partial.close()
        if delete:
            self._store.delete(transfer_id)

    def _close_all(self) -> None:
        for transfer_id in list(self._open):
            self._close(transfer_id, delete=False)
