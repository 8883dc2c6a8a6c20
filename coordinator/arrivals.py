"""What the shell does with an update on its way, from an open spool to a verdict; each answer is an event for the core.

Nothing was promised yet: an update that our own disk spoils is thrown away, and its site, which has it still, sends it
again.
"""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor

import structlog

from coordinator import admission
from coordinator import decisions as d
from coordinator.disk import Disk
from shared.errors import CorruptError, NoRoomError, RefusedError
from shared.manifest import Manifest
from shared.plan import SealedPlan
from shared.spooler import Spooler

VERIFIED_AT_ONCE = 4
"""Updates, and no more than there are processors: each takes one, and some megabytes, however many arrive together."""

DAMAGED_RETRY_S = 1.0
"""When a site offers an update again that our disk spoilt."""

log = structlog.get_logger("coordinator")


def sender(manifest: Manifest) -> str:
    """The site that an offered update is from, for `Spooler`.

    A site sends one after the other, and the next when it knows what became of the one before; so an honest one loses
    nothing when its next displaces it, and who offers without end has disk space for one.
    """
    return manifest.update.site


class Arrivals:
    """Opens and verifies; `no_room_s` is how long a site waits that found no room. Use as a context manager."""

    def __init__(self, spooler: Spooler, disk: Disk, plan: SealedPlan, *, no_room_s: float) -> None:
        self._spooler = spooler
        self._disk = disk
        self._plan = plan
        self._no_room_s = no_room_s
        self._admission = ThreadPoolExecutor(min(VERIFIED_AT_ONCE, os.cpu_count() or 1), "admission")

    def __enter__(self) -> None:
        """Threads start when they have work."""

    def __exit__(self, *_exc: object) -> None:
        self._admission.shutdown()

    async def open(self, manifest: Manifest) -> d.UploadEvent:
        """Open the spool of an offered update, or say why it is not taken."""
        update_id = manifest.transfer_id
        try:
            return d.SpoolOpened(update_id, await self._spooler.open(manifest))
        except RefusedError as error:
            return d.VerifyFailed(update_id, error.rule, error.message)
        except NoRoomError as error:
            self._disk.hold(error, manifest.wire_bytes)
            return d.Postponed(update_id, "no-room", error.message, self._no_room_s)
        except CorruptError as error:
            return await self._begin_anew(update_id, error)

    async def verify(self, update_id: str) -> d.UploadEvent:
        """Move a complete update into the store and check what its bytes must satisfy."""
        stored = await self._spooler.finish(update_id)
        verifying = asyncio.get_running_loop().run_in_executor(self._admission, admission.verify, stored, self._plan)
        try:
            return d.Verified(update_id, (await verifying).norm)
        except RefusedError as error:
            return d.VerifyFailed(update_id, error.rule, error.message)
        except CorruptError as error:
            return await self._begin_anew(update_id, error)

    async def _begin_anew(self, update_id: str, error: CorruptError) -> d.UploadEvent:
        log.error(
            "an update was damaged on this disk; its site will send it again", update=update_id, why=error.message
        )
        await self._spooler.close(update_id, delete=True)
        detail = "the coordinator's disk damaged what had arrived"
        return d.Postponed(update_id, "damaged-at-rest", detail, DAMAGED_RETRY_S)
