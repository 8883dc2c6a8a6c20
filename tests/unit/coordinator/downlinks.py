"""What the tests of the downlink say to it, and what it answers."""

from __future__ import annotations

from coordinator.decisions import Decision, Serve
from coordinator.downlink import Downlink
from shared.messages import Want
from tests.cores import bits
from tests.factories import make_federation, make_plan, make_state

A, B = "a" * 32, "b" * 32
FRAMES = 8
MERGE_S, IDLE_S = 0.3, 15.0

PLAN = make_plan(make_federation())
STATES = {
    transfer_id: make_state(PLAN, version, frames=FRAMES).model_copy(update={"transfer_id": transfer_id})
    for version, transfer_id in enumerate((A, B))
}


def make_downlink(window: int = 6) -> Downlink:
    """Nobody pulls yet."""
    return Downlink(merge_s=MERGE_S, idle_s=IDLE_S, stall_s=5.0, window=window)


def want(
    downlink: Downlink,
    site: str,
    *held: int,
    state: str = A,
    window: int = 4,
    restart: bool = False,
    present: str = "xyz",
    now: float = 0.0,
) -> list[Serve]:
    """One site wants; what goes out at once."""
    out = Decision()
    message = Want(transfer_id=state, have=bits(FRAMES, *held), window=window, restart=restart)
    downlink.want(site, message, STATES[state], frozenset(present), now, out)
    return served(out)


def tick(downlink: Downlink, now: float, present: str = "xyz") -> list[Serve]:
    """Time passes; what goes out then."""
    out = Decision()
    downlink.tick(frozenset(present), now, out)
    return served(out)


def served(out: Decision) -> list[Serve]:
    """Chunks, and nothing else."""
    assert not out.records
    assert not out.sends
    return [job for job in out.jobs if isinstance(job, Serve)]
