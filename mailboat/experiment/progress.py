"""How the progress of an experiment looks: bars on a terminal, a line for each cell anywhere else."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from mailboat.console import measure_title
from mailboat.demo.screen import clock, points
from mailboat.experiment.cells import Cell
from mailboat.experiment.results import Result


def outcome(result: Result) -> str:
    """A result in a few words."""
    name, value = next(iter(result.scores.items()))
    return f"{measure_title(name)} {points(value)}, {result.cpu_s:.0f} CPU s"


class Lines:
    """For pipes and files."""

    def __init__(self, console: Console, total: int, *, now: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._total = total
        self._now = now
        self._began = now()
        self._finished = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def begun(self, slot: int, cell: Cell) -> None:
        """See View."""

    def moved(self, slot: int, share: float, word: str) -> None:
        """See View."""

    def done(self, slot: int, cell: Cell, result: Result) -> None:
        """See View."""
        self._say(f"{cell.title}: {outcome(result)}")

    def failed(self, slot: int, cell: Cell, why: str) -> None:
        """See View."""
        self._say(f"{cell.title}: failed: {why}")

    def _say(self, text: str) -> None:
        self._finished += 1
        elapsed = clock(self._now() - self._began)
        self._console.print(f"{elapsed:>6}  {self._finished}/{self._total}  {text}", markup=False, soft_wrap=True)


class Bars:
    """For a terminal: one bar for the whole and one for each cell under way; finished cells scroll by above."""

    def __init__(self, console: Console, total: int) -> None:
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            console=console,
        )
        self._total = total
        self._finished = 0
        self._whole = self._progress.add_task(f"0 of {total} cells", total=total)
        self._slots: dict[int, TaskID] = {}
        self._titles: dict[int, str] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def begun(self, slot: int, cell: Cell) -> None:
        """See View."""
        self._titles[slot] = cell.title
        self._slots[slot] = self._progress.add_task(cell.title, total=1.0)

    def moved(self, slot: int, share: float, word: str) -> None:
        """See View."""
        self._progress.update(self._slots[slot], completed=share, description=f"{self._titles[slot]}, {word}")

    def done(self, slot: int, cell: Cell, result: Result) -> None:
        """See View."""
        self._end(slot, f"{cell.title}: {outcome(result)}")

    def failed(self, slot: int, cell: Cell, why: str) -> None:
        """See View."""
        self._end(slot, f"{cell.title}: failed: {why}", style="red")

    def _end(self, slot: int, text: str, style: str = "") -> None:
        self._finished += 1
        self._progress.remove_task(self._slots.pop(slot))
        self._progress.update(
            self._whole, completed=self._finished, description=f"{self._finished} of {self._total} cells"
        )
        self._progress.console.print(text, markup=False, style=style)
