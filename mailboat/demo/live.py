"""How a demonstration looks: a live picture on a terminal, one line per event anywhere else."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mailboat.console import measure_title
from mailboat.demo.facts import Facts
from mailboat.demo.screen import Screen, build, clock, narrate, summary, told

REFRESHES_PER_S = 4
QUIET_S = 8.0
"""Longest silence of the lines while something goes on."""
BAR_WIDTH = 32
CURVE_WIDTH = 48
_BARS = " ▁▂▃▄▅▆▇█"


class View(Protocol):
    """What the run tells the person."""

    def headline(self, text: str) -> None:
        """A new part of the run begins."""
        ...

    def say(self, text: str, *, style: str = "") -> None:
        """One thing happened that the facts do not tell."""
        ...

    def progress(self, text: str) -> None:
        """How far something is; only the newest word on it matters."""
        ...

    def show(self, facts: Facts) -> None:
        """The facts as they are now."""
        ...


class Lines:
    """For pipes and files: each event is one line, printed as it happens."""

    def __init__(self, console: Console, *, now: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._now = now
        self._began = self._said_at = now()
        self._shown = Facts()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def headline(self, text: str) -> None:
        """See View."""
        self.say(f"== {text}")

    def say(self, text: str, *, style: str = "") -> None:
        """See View; a pipe has no colours."""
        self._said_at = self._now()
        self._console.print(
            f"{clock(self._said_at - self._began):>5}  {text}", markup=False, style=style, soft_wrap=True
        )

    def progress(self, text: str) -> None:
        """See View; told when there was nothing else to tell for a while."""
        if self._now() - self._said_at >= QUIET_S:
            self.say(text)

    def show(self, facts: Facts) -> None:
        """See View."""
        for line in narrate(self._shown, facts):
            self.say(line)
        self.progress(summary(facts))
        self._shown = facts


class Picture:
    """For a terminal: the whole state in place, with the last few events below."""

    def __init__(self, console: Console, target: int, *, now: Callable[[], float] = time.monotonic) -> None:
        self._target = target
        self._now = now
        self._began = now()
        self._facts = Facts()
        self._headline = self._progress = ""
        self._news: tuple[str, ...] = ()
        self._live = Live(
            console=console, get_renderable=self._render, refresh_per_second=REFRESHES_PER_S, redirect_stderr=False
        )

    def __enter__(self) -> Self:
        self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def headline(self, text: str) -> None:
        """See View."""
        self._headline, self._progress = text, ""

    def progress(self, text: str) -> None:
        """See View."""
        self._progress = f": {text}"

    def say(self, text: str, *, style: str = "") -> None:
        """See View; what has a style is important enough to stay above the picture."""
        if style:
            self._live.console.print(text, style=style, markup=False)
        else:
            self._tell(text)

    def show(self, facts: Facts) -> None:
        """See View."""
        for line in narrate(self._facts, facts):
            self._tell(line)
        self._facts = facts

    def _tell(self, line: str) -> None:
        self._news = (*self._news, f"{clock(self._now() - self._began):>5}  {line}")

    def _render(self) -> RenderableType:
        elapsed = self._now() - self._began
        return render(
            build(
                self._facts,
                headline=self._headline + self._progress,
                target=self._target,
                news=self._news,
                elapsed_s=elapsed,
            )
        )


def render(screen: Screen) -> RenderableType:
    """Return the picture of a screen; before there are sites it is the news alone."""
    run = (_progress(screen), _site_table(screen), _curve(screen)) if screen.rows else (f"elapsed {screen.elapsed}",)
    return Panel(
        Group(*run, *_news(screen)), title=f"mailboat demo · {screen.headline}", title_align="left", border_style="blue"
    )


def _progress(screen: Screen) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    bar = ProgressBar(total=screen.target, completed=screen.version, width=BAR_WIDTH)
    grid.add_row(f"version {screen.version} of {screen.target}", bar, f"elapsed {screen.elapsed}")
    return grid


def _site_table(screen: Screen) -> RenderableType:
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    for title in ("site", "state", "has", "merged in"):
        table.add_column(title, no_wrap=True)
    for title in ("local", "up", "down", "drops"):
        table.add_column(title, no_wrap=True, justify="right")
    for row in screen.rows:
        state = Text(row.state, style=row.tone)
        table.add_row(row.name, state, row.version, row.last_update, row.score, row.up, row.down, row.reconnects)
    return table


def _curve(screen: Screen) -> RenderableType:
    if not screen.scores:
        return Text("held-out notes: the base model is being scored", style="dim")
    newest, score = screen.scores[-1]
    bars = "".join(_BARS[round(each.main * (len(_BARS) - 1))] for _, each in screen.scores[-CURVE_WIDTH:])
    return Text.assemble(
        (f"{measure_title(score.name)} on the held-out notes  ", ""),
        (bars, "green"),
        (f"  {told(score)} at version {newest}", "bold"),
    )


def _news(screen: Screen) -> list[RenderableType]:
    return [Text(line, style="dim", no_wrap=True, overflow="ellipsis") for line in screen.news]
