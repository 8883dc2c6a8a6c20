"""Chunks onto the disk, with real files: what is reported is durable, and what comes back after a crash is there."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from shared.errors import RefusedError, UnavailableError
from shared.manifest import Manifest
from shared.messages import Chunk
from shared.spooler import BACKLOG_BYTES, Spooler
from shared.store import FrameStore
from shared.transfer import Bitmap
from tests.helpers import run_async
from tests.unit.shared.transfers import ID, manifest_builder, tensors_of, transfer_of, writer_of

MANIFEST, FRAMES = transfer_of(tensors_of())
ALL = set(range(MANIFEST.frames))


def _chunk(index: int, frame: bytes | None = None, transfer_id: str = ID) -> Chunk:
    return Chunk(transfer_id, index, memoryview(FRAMES[index] if frame is None else frame))


class Desk:
    """A spooler at work over a store in a folder, and what it has reported."""

    def __init__(
        self, folder: Path, open_chunk: Callable[[Manifest, Chunk], memoryview] = lambda _manifest, chunk: chunk.frame
    ) -> None:
        self.store = FrameStore(folder)
        self.stored: list[tuple[str, tuple[int, ...]]] = []
        self.refused: list[tuple[str, str]] = []
        self.news = asyncio.Event()
        self.spooler = Spooler(self.store, open_chunk=open_chunk, stored=self._stored, refused=self._refused)

    def _stored(self, transfer_id: str, indices: tuple[int, ...]) -> None:
        self.stored.append((transfer_id, indices))
        self.news.set()

    def _refused(self, chunk: Chunk, rule: str) -> None:
        self.refused.append((chunk.transfer_id, rule))
        self.news.set()

    @property
    def durable(self) -> set[int]:
        """Every index that was reported so far."""
        return {index for _, indices in self.stored for index in indices}

    async def until_stored(self, wanted: set[int]) -> None:
        """Wait until these chunks are reported."""
        while not wanted <= self.durable:
            self.news.clear()
            await self.news.wait()


@asynccontextmanager
async def _desk(
    folder: Path, open_chunk: Callable[[Manifest, Chunk], memoryview] = lambda _manifest, chunk: chunk.frame
) -> AsyncIterator[Desk]:
    desk = Desk(folder, open_chunk)
    async with desk.spooler:
        running = asyncio.create_task(desk.spooler.run())
        try:
            yield desk
        finally:
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running


def _have(data: bytes, manifest: Manifest = MANIFEST) -> set[int]:
    return ALL - set(Bitmap.from_bytes(manifest.frames, data).missing())


def test_chunks_in_any_order_become_the_transfer_that_was_sent(tmp_path: Path) -> None:
    """Every frame is reported once it is durable, and the finished transfer holds the same bytes."""

    async def work() -> None:
        async with _desk(tmp_path) as desk:
            assert _have(await desk.spooler.open(MANIFEST)) == set()
            for index in sorted(ALL, reverse=True):
                desk.spooler.put(_chunk(index))
            await desk.until_stored(ALL)
            stored = await desk.spooler.finish(ID)
            assert [stored.read_frame(index) for index in sorted(ALL)] == FRAMES
            assert desk.refused == []

    run_async(work())


def test_a_slow_disk_holds_up_whoever_brings_more(tmp_path: Path) -> None:
    """With too much unwritten there is no room, until the disk has taken it."""
    disk, many = threading.Event(), BACKLOG_BYTES // len(FRAMES[0]) + 1

    def open_slowly(_manifest: Manifest, chunk: Chunk) -> memoryview:
        disk.wait()
        return chunk.frame

    async def work() -> None:
        async with _desk(tmp_path, open_slowly) as desk:
            await desk.spooler.open(MANIFEST)
            await desk.spooler.caught_up()
            for _ in range(many):
                desk.spooler.put(_chunk(0))
            waiting = asyncio.create_task(desk.spooler.caught_up())
            await asyncio.sleep(0)
            assert not waiting.done()
            disk.set()
            await waiting
            await desk.until_stored({0})

    run_async(work())


def test_what_arrives_together_is_synced_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sync for a batch, in the order of arrival, and the report comes after it."""
    events: list[str] = []
    sync = os.fsync

    def counted(fd: int) -> None:
        events.append("sync")
        sync(fd)

    async def work() -> None:
        async with _desk(tmp_path) as desk:
            await desk.spooler.open(MANIFEST)
            monkeypatch.setattr(os, "fsync", counted)
            for index in (2, 0, 1):
                desk.spooler.put(_chunk(index))
            await desk.until_stored({0, 1, 2})
            events.append("told")
            assert desk.stored == [(ID, (2, 0, 1))]
            assert events == ["sync", "told"]

    run_async(work())


def test_a_spooler_without_work_rests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It writes when something has arrived, and is not heard of otherwise."""
    batches: list[int] = []

    async def work() -> None:
        async with _desk(tmp_path) as desk:
            write = desk.spooler._write

            def counted(batch: list[Chunk]) -> tuple[dict[str, list[int]], list[tuple[Chunk, str]]]:
                batches.append(len(batch))
                return write(batch)

            monkeypatch.setattr(desk.spooler, "_write", counted)
            await desk.spooler.open(MANIFEST)
            desk.spooler.put(_chunk(0))
            await desk.until_stored({0})
            await asyncio.sleep(0.02)
            assert batches == [1]

    run_async(work())


def test_an_interrupted_transfer_resumes_with_what_is_there(tmp_path: Path) -> None:
    """A new process finds the chunks of the old one."""

    async def first() -> None:
        async with _desk(tmp_path) as desk:
            await desk.spooler.open(MANIFEST)
            for index in (0, 3):
                desk.spooler.put(_chunk(index))
            await desk.until_stored({0, 3})

    async def second() -> None:
        async with _desk(tmp_path) as desk:
            assert _have(await desk.spooler.open(MANIFEST)) == {0, 3}
            for index in ALL - {0, 3}:
                desk.spooler.put(_chunk(index))
            await desk.until_stored(ALL - {0, 3})
            assert (await desk.spooler.finish(ID)).read_frame(3) == FRAMES[3]

    run_async(first())
    run_async(second())


def test_opening_again_forgets_nothing(tmp_path: Path) -> None:
    """A site that offers again after a broken connection gets the bitmap of what is there."""

    async def work() -> None:
        async with _desk(tmp_path) as desk:
            await desk.spooler.open(MANIFEST)
            desk.spooler.put(_chunk(1))
            await desk.until_stored({1})
            before = desk.spooler._open[ID]
            assert _have(await desk.spooler.open(MANIFEST)) == {1}
            assert before._closed
            await desk.spooler.close(ID)
            assert _have(await desk.spooler.open(MANIFEST)) == {1}

    run_async(work())


def test_a_whole_transfer_opens_full(tmp_path: Path) -> None:
    """It arrived before the crash: nothing is wanted, and it can be finished as it is."""

    async def work() -> None:
        async with _desk(tmp_path) as desk:
            desk.store.seal(writer_of(tensors_of()), manifest_builder())
            assert _have(await desk.spooler.open(MANIFEST)) == ALL
            assert (await desk.spooler.finish(ID)).manifest == MANIFEST

    run_async(work())


@pytest.mark.parametrize("whole", [True, False])
def test_an_id_under_another_manifest_is_refused(tmp_path: Path, whole: bool) -> None:
    """Whether the first one has arrived or is arriving, its bytes are not mixed with another's."""
    other = MANIFEST.model_copy(update={"created": 7.0})

    async def work() -> None:
        async with _desk(tmp_path) as desk:
            if whole:
                desk.store.seal(writer_of(tensors_of()), manifest_builder())
            else:
                await desk.spooler.open(MANIFEST)
            with pytest.raises(RefusedError) as refused:
                await desk.spooler.open(other)
            assert refused.value.rule == "manifest-changed"

    run_async(work())


def test_a_wrong_chunk_is_refused_and_the_rest_of_the_batch_is_kept(tmp_path: Path) -> None:
    """One bad frame costs itself only; it is not reported as stored."""

    async def work() -> None:
        async with _desk(tmp_path) as desk:
            await desk.spooler.open(MANIFEST)
            flipped = bytes([FRAMES[1][0] ^ 1]) + FRAMES[1][1:]
            for chunk in (_chunk(0), _chunk(1, flipped), _chunk(2, FRAMES[2][:-1]), _chunk(3)):
                desk.spooler.put(chunk)
            await desk.until_stored({0, 3})
            assert desk.durable == {0, 3}
            assert desk.refused == [(ID, "frame-hash"), (ID, "frame-length")]
            desk.spooler.put(_chunk(1))
            await desk.until_stored({1})

    run_async(work())


def test_chunks_of_a_closed_transfer_are_dropped(tmp_path: Path) -> None:
    """They were queued before it was given up, or nobody asked for them."""

    async def work() -> None:
        async with _desk(tmp_path) as desk:
            await desk.spooler.open(MANIFEST)
            desk.spooler.put(_chunk(0, transfer_id="9" * 32))
            desk.spooler.put(_chunk(1))
            await desk.until_stored({1})
            await desk.spooler.close(ID)
            desk.spooler.put(_chunk(2))
            assert _have(await desk.spooler.open(MANIFEST)) == {1}
            assert desk.durable == {1}
            assert desk.refused == []

    run_async(work())


def test_closing_keeps_the_bytes_unless_told_to_delete_them(tmp_path: Path) -> None:
    """The next attempt begins where this one ended, or at nothing."""

    async def work() -> None:
        async with _desk(tmp_path) as desk:
            await desk.spooler.open(MANIFEST)
            desk.spooler.put(_chunk(0))
            await desk.until_stored({0})
            await desk.spooler.close(ID)
            assert desk.store.partial_ids() == [ID]
            await desk.spooler.close(ID, delete=True)
            assert list(tmp_path.iterdir()) == []
            assert _have(await desk.spooler.open(MANIFEST)) == set()

    run_async(work())


def test_leaving_closes_every_file(tmp_path: Path) -> None:
    """No descriptor outlives the spooler, however many transfers were open."""

    async def work() -> None:
        async with _desk(tmp_path) as desk:
            for digit in "123":
                await desk.spooler.open(MANIFEST.model_copy(update={"transfer_id": digit * 32}))
            partials = list(desk.spooler._open.values())
            assert [partial._closed for partial in partials] == [False] * 3
        assert [partial._closed for partial in partials] == [True] * 3

    run_async(work())


def test_a_transfer_that_was_never_opened_cannot_be_finished(tmp_path: Path) -> None:
    """A mistake of the caller, told with the transfer's id."""

    async def work() -> None:
        async with _desk(tmp_path) as desk:
            with pytest.raises(AssertionError, match=ID):
                await desk.spooler.finish(ID)

    run_async(work())


def _full(*_args: object) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_ends_the_writing_with_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator reads which folder has no room; nothing that was not written is reported."""

    async def work() -> None:
        desk = Desk(tmp_path, lambda _manifest, chunk: chunk.frame)
        async with desk.spooler:
            await desk.spooler.open(MANIFEST)
            monkeypatch.setattr(os, "pwrite", _full)
            desk.spooler.put(_chunk(0))
            with pytest.raises(UnavailableError, match="the disk is full") as full:
                await desk.spooler.run()
            assert str(tmp_path) in full.value.message
            assert desk.stored == []
            monkeypatch.undo()

    run_async(work())


def test_a_transfer_for_which_there_is_no_room_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Space for all of it is taken before the first chunk is wanted."""

    async def work() -> None:
        async with _desk(tmp_path) as desk:
            monkeypatch.setattr(os, "posix_fallocate", _full)
            with pytest.raises(UnavailableError, match=f"{MANIFEST.wire_bytes:,} bytes"):
                await desk.spooler.open(MANIFEST)
            assert list(tmp_path.iterdir()) == []

    run_async(work())
