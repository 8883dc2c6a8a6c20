"""Runs the cells of an experiment that have no result yet, in so many processes, each result kept as it comes."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

from mailboat.experiment.cells import Cell, Settings
from mailboat.experiment.inputs import ROOT
from mailboat.experiment.results import Cabinet, Result, is_current

WORKER = "mailboat.experiment.worker"
LEAVE_S = 5.0
"""A worker whose input has closed leaves at once; after this long it is killed."""
LINE_MAX = 64 << 20
"""A result of a thousand scored versions is a few hundred kilobytes."""


class View(Protocol):
    """Whoever shows how far a run is."""

    def begun(self, slot: int, cell: Cell) -> None:
        """A worker begins a cell."""

    def moved(self, slot: int, share: float, word: str) -> None:
        """How far its cell is, 0 to 1."""

    def done(self, slot: int, cell: Cell, result: Result) -> None:
        """Its cell is finished, and kept."""

    def failed(self, slot: int, cell: Cell, why: str) -> None:
        """Its cell came to nothing."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A cell that came to nothing."""

    title: str
    why: str


def waiting(cells: Iterable[Cell], cabinet: Cabinet, *, accept_older: bool) -> list[Cell]:
    """Return the cells that have to be run, the first seed of all before the second of any.

    Of cells with equal settings one is enough. With `accept_older`, a result counts whatever code it was made by.
    """
    found: dict[str, Cell] = {}
    for cell in cells:
        if cell.settings is None:
            continue
        kept = cabinet.get(cell.settings.digest)
        if kept is None or not (accept_older or is_current(kept)):
            found.setdefault(cell.settings.digest, cell)
    order = {seed: place for place, seed in enumerate(dict.fromkeys(cell.seed for cell in found.values()))}
    return sorted(found.values(), key=lambda cell: order[cell.seed])


async def run_cells(
    cells: Sequence[Cell], cabinet: Cabinet, scratch: Path, view: View, *, jobs: int, niceness: int, device: str
) -> list[Failure]:
    """Carry out the cells in `jobs` processes and return those that failed, and why.

    All compute on `device`, which is named as in a site's `[training]`.
    Cancelling ends the processes at once; what was finished by then is kept.
    """
    left = list(cells)
    failures: list[Failure] = []

    async def work(slot: int) -> None:
        async with _Hand(scratch, niceness, device) as hand:
            while left:
                cell = left.pop(0)
                assert cell.settings is not None
                view.begun(slot, cell)
                answer = await hand.carry_out(cell.title, cell.settings, lambda *how: view.moved(slot, *how))
                if isinstance(answer, Result):
                    cabinet.put(answer)
                    view.done(slot, cell, answer)
                else:
                    failures.append(Failure(cell.title, answer))
                    view.failed(slot, cell, answer)

    async with asyncio.TaskGroup() as tasks:
        for slot in range(min(jobs, len(left))):
            tasks.create_task(work(slot))
    return failures


class _Hand:
    """A worker process; a fresh one in the place of one that died."""

    def __init__(self, scratch: Path, niceness: int, device: str) -> None:
        self._arguments = (str(scratch), str(niceness), device)
        self._process: Process | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        process, self._process = self._process, None
        if process is None or process.returncode is not None:
            return
        assert process.stdin is not None
        process.stdin.close()
        try:
            async with asyncio.timeout(LEAVE_S):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()

    async def carry_out(self, title: str, settings: Settings, moved: Any) -> Result | str:
        """Return the cell's result, or why there is none."""
        process = await self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        asked = {"title": title, "settings": settings.model_dump(mode="json")}
        process.stdin.write(json.dumps(asked).encode() + b"\n")
        while line := await process.stdout.readline():
            match json.loads(line):
                case {"share": float(share), "word": str(word)}:
                    moved(share, word)
                case {"result": dict(result)}:
                    return Result.model_validate(result)
                case {"failed": str(why), "hint": str(hint)}:
                    return f"{why} ({hint})" if hint else why
        status = await process.wait()
        self._process = None
        return f"its process ended with status {status}; its last words are on standard error"

    async def _running(self) -> Process:
        if self._process is None or self._process.returncode is not None:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", WORKER, *self._arguments),
                stdin=PIPE,
                stdout=PIPE,
                limit=LINE_MAX,
                env={**os.environ, **_ENVIRONMENT, "PYTHONPATH": _path()},
            )
        return self._process


def _path() -> str:
    """The tree that runs here comes first, also where another one is installed."""
    before = os.environ.get("PYTHONPATH")
    return f"{ROOT}{os.pathsep}{before}" if before else str(ROOT)


_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # a cell is one thread; --jobs says how many at a time
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
