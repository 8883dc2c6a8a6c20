"""How much of the disk one site's unfinished updates may take."""

from __future__ import annotations

from pathlib import Path

from coordinator.arrivals import displaces
from shared.spooler import Spooler
from shared.store import FrameStore
from tests.factories import make_federation, make_plan, make_state, make_update, update_id_of
from tests.helpers import run_async

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
            displaces=displaces,
        ) as spooler:
            for update_id in update_ids:
                await spooler.open(make_update(PLAN, "north", STATE, update_id=update_id))
            await spooler.open(south)

    for update_ids in (ids[:3], ids[3:]):
        run_async(offer(*update_ids))
        assert FrameStore(tmp_path).partial_ids() == sorted((update_ids[-1], south.transfer_id))
    assert len(list(tmp_path.glob("*.frames"))) == 2
    assert displaces(south, south.transfer_id) is False  # which goes on where it stopped
