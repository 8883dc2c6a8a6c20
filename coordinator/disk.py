"""The coordinator's disk: nothing is taken without room for it, and a full disk ends nothing.

What finds the disk full is done when there is room. Meanwhile the coordinator says so in its log and in its status.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

import structlog

from coordinator.ledger import Ledger
from coordinator.masters import check_files
from coordinator.optimizers import SLOTS
from shared import durable
from shared.config import CoordinatorConfig, FederationConfig
from shared.errors import CorruptError, NoRoomError
from shared.manifest import UpdateFacts
from shared.messages import LOST
from shared.room import MIB, POLL_S, Room
from shared.store import FrameStore
from shared.threads import in_thread

log = structlog.get_logger("coordinator")
P = ParamSpec("P")
R = TypeVar("R")


class Disk:
    """The file system that holds `updates`; `held` says why nothing more is taken, and is empty while there is room."""

    def __init__(self, config: CoordinatorConfig, updates: Path) -> None:
        self.room = Room(updates, config.min_free_mib * MIB, config.spool_mib * MIB)
        self._masters = config.storage / "masters"
        self.held = ""
        self._needed = 0

    async def given_room(self, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Do work in a thread, as often as it takes: what found the disk full is done when there is room."""
        while True:
            try:
                result = await in_thread(work, *args, **kwargs)
            except NoRoomError as error:
                self.hold(error)
                await asyncio.sleep(POLL_S)
            else:
                return result

    def hold(self, error: NoRoomError, needed: int = 0) -> None:
        """Something found no room for `needed` bytes: what is kept for the next version's files is not, then."""
        durable.remove_spares(self._masters)
        if not self.held:
            log.warning("no room on the disk; waiting for some", reason=error.message)
        self.held, self._needed = error.message, needed

    async def look(self) -> None:
        """See whether there is room again."""
        if self.held and await in_thread(self.room.lacking, self._needed) is None:
            self.held = ""
            log.info("there is room again")


def check_newest(masters: Path, ledger: Ledger, federation: FederationConfig) -> None:
    """Raise CorruptError unless the newest master on disk is the one that the journal speaks of."""
    files = ledger.files[ledger.version]
    check_files(masters, ledger.version, SLOTS[federation.aggregation.server.optimizer], files.master, files.optimizer)


def discard_rejected(updates: FrameStore, ledger: Ledger) -> list[str]:
    """Delete the bytes of updates that were rejected or given up, and return their ids; for a start after a crash."""
    rejected = [
        update_id
        for update_id in updates.ids() + updates.partial_ids()
        if (known := ledger.known.get(update_id)) and (known.outcome == "rejected" or known.rule == LOST)
    ]
    for update_id in rejected:
        updates.delete(update_id)
    return rejected


def discard_uncommitted(states: FrameStore, ledger: Ledger) -> list[str]:
    """Delete the states and steps that a merge wrote and no row published, and return their ids; for a start.

    The merge is made anew, perhaps of more updates, so that each crash would leave another. A state of a later version
    stays: a journal that was put back from a backup knows less than its files. One that cannot be read is fsck's.
    """
    uncommitted = [
        state_id
        for state_id in states.ids()
        if state_id not in ledger.transfers and _version_of(states, state_id) <= ledger.version + 1
    ]
    for state_id in uncommitted:
        states.delete(state_id)
    return uncommitted


def _version_of(states: FrameStore, state_id: str) -> float:
    try:
        stored = states.get(state_id)
    except CorruptError:
        return math.inf
    return math.inf if stored is None or isinstance(stored.manifest.facts, UpdateFacts) else stored.manifest.version
