"""A site's disk: no training without room for what it will make, and no end because the disk is full.

What finds the disk full is done when there is room. Meanwhile the site says so in its log and in its status.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

import structlog

from edge_client.sealing import RESIDUAL_CODEC
from shared import durable
from shared.config import CodecName, CodecSection, SiteConfig
from shared.errors import NoRoomError
from shared.manifest import Manifest
from shared.room import MIB, POLL_S, Room
from shared.threads import in_thread

VALUE_BITS: dict[CodecName, int] = {"f32": 32, "bf16": 16, "int8": 8, "int4": 4, "ternary": 2, "topk2x4": 1, "topk2": 1}
"""Of one value, its share of a scale left out; topk2x4 takes a third of it, topk2 a tenth."""

log = structlog.get_logger("site")
P = ParamSpec("P")
R = TypeVar("R")


class Disk:
    """The file system that holds `outbox`; `held` says why the site waits, and is empty while it does not.

    What is kept in `outbox` and `others` for the files to come goes when there is no room.
    """

    def __init__(self, config: SiteConfig, outbox: Path, *others: Path) -> None:
        self._recycled = (outbox, *others)
        self.room = Room(outbox, config.min_free_mib * MIB, config.outbox_mib * MIB)
        self.held = ""

    async def until_room(self, base: Manifest, codec: CodecSection, there: int) -> None:
        """Return when there is room to train on a state: its file, a float32 delta, the sealed update, its residual.

        State and delta are written over files that have `there` bytes.
        """
        values = base.file_size * 8 // VALUE_BITS[codec.whole]
        sealed = values * VALUE_BITS[codec.up] // 8
        residual = values * VALUE_BITS[RESIDUAL_CODEC] // 8 if codec.decay else 0
        needed = max(0, base.file_size + 4 * values - there) + sealed + residual
        try:
            while (why := await in_thread(self._lacking, needed, sealed)) is not None:
                await self._wait(why)
            self._go_on()
        finally:
            self.held = ""  # also when the run ended meanwhile

    async def given_room(self, work: Callable[P, Awaitable[R]], *args: P.args, **kwargs: P.kwargs) -> R:
        """Do work as often as it takes: what found the disk full is done when there is room."""
        while True:
            try:
                result = await work(*args, **kwargs)
            except NoRoomError as error:
                await self._wait(error.message)
            else:
                self._go_on()
                return result

    def _lacking(self, needed: int, kept: int) -> str | None:
        return self.room.lacking(needed, kept=kept)

    async def _wait(self, why: str) -> None:
        for folder in self._recycled:
            durable.remove_spares(folder)
        if not self.held:
            log.warning("no room on the disk; waiting for some", reason=why)
        self.held = why
        await asyncio.sleep(POLL_S)

    def _go_on(self) -> None:
        if self.held:
            self.held = ""
            log.info("there is room again")
