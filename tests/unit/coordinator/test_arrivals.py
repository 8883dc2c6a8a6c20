"""How much of the disk one site's unfinished updates may take."""

from __future__ import annotations

import asyncio
from pathlib import Path

from coordinator.arrivals import sender
from shared.messages import Chunk
from shared.spooler import Spooler
from shared.store import FrameStore
from tests.factories import make_federation, make_plan, make_state, make_update, update_id_of
from tests.helpers import run_async, until
from tests.unit.shared.transfers import tensors_of, transfer_of

PLAN = make_plan(make_federation())
STATE = make_state(PLAN, 0)


def test_who_offers_without_end_has_disk_space_for_one(tmp_path: Path) -> None:
    """The newest offer of a site takes the place of its own before it, also after a restart, and of nobody else's."""
    ids = [update_id_of("north", f"update {number}") for number in range(5)]
    south = make_update(PLAN, "south", STATE)

    async def offer(*update_ids: str) -> None:
        async with Spooler(
            FrameStore(tmp_path),
            open_chunk=lambda _manifest, chunk: chunk.frame,
            stored=lambda _id, _indices: None,
            refused=lambda _chunk, _rule: None,
            sender=sender,
        ) as spooler:
            for update_id in update_ids:
                await spooler.open(make_update(PLAN, "north", STATE, update_id=update_id))
            await spooler.open(south)

    for update_ids in (ids[:3], ids[3:]):
        run_async(offer(*update_ids))
        assert FrameStore(tmp_path).partial_ids() == sorted((update_ids[-1], south.transfer_id))
    assert len(list(tmp_path.glob("*.frames"))) == 2


def test_what_has_arrived_is_not_displaced(tmp_path: Path) -> None:
    """An update that became whole, in this process or before it, stays when its site sends the next."""
    store = FrameStore(tmp_path)
    manifest, frames = transfer_of(tensors_of())
    whole = manifest.model_copy(update={"facts": make_update(PLAN, "north", STATE).facts})

    async def work() -> None:
        async with Spooler(
            store,
            open_chunk=lambda _manifest, chunk: chunk.frame,
            stored=lambda _id, indices: arrived.update(indices),
            refused=lambda _chunk, _rule: None,
            sender=sender,
        ) as spooler:
            await spooler.open(whole)
            for index, frame in enumerate(frames):
                spooler.put(Chunk(whole.transfer_id, index, memoryview(frame)))
            running = asyncio.create_task(spooler.run())
            await until(lambda: len(arrived) == whole.frames)
            await spooler.finish(whole.transfer_id)
            running.cancel()
            await spooler.open(make_update(PLAN, "north", STATE))

    arrived = set[int]()
    run_async(work())
    assert store.ids() == [whole.transfer_id]
