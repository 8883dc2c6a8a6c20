"""Processes under a plan: started, killed, stopped, started again at once, as a service manager would.

Each one dies with the process that started it, and carries a token in its environment by which it can be found.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from broker import tether
from shared.faultpoint import VARIABLE

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "CHAOS_TOKEN"
RESTART_S = 0.1
DISK_RESTART_S = 0.5
"""A service manager does not hammer on a full disk."""


@dataclass(frozen=True, slots=True)
class Death:
    """One process ended; times are unix seconds."""

    name: str
    at: float
    how: str
    """'kill', the commit point that it was to die at, or 'exit <status>'."""
    back_at: float | None = None
    """When it was started again."""


class Actor:
    """One program that is kept running until it ends with status 0."""

    def __init__(
        self,
        name: str,
        command: Iterable[str],
        log: Path,
        environment: Mapping[str, str],
        *,
        lives: Iterable[str] = (),
        on_death: Callable[[str], None] = lambda _name: None,
    ) -> None:
        self.name = name
        self.log = log
        self.deaths: list[Death] = []
        self.done = asyncio.Event()
        """Set when it ended with status 0, or with one that nobody asked for."""
        self.died = asyncio.Event()
        """Set when it ended otherwise, or was killed, for the first time."""
        self.up = asyncio.Event()
        self.failure: str | None = None
        self.full_until = 0.0
        """Unix seconds; to a life that began before, status 4 is an honest answer: its disk was full."""
        self._command = tuple(command)
        self._environment = dict(environment)
        self._lives = deque(lives)
        self._on_death = on_death
        self._process: asyncio.subprocess.Process | None = None
        self._killed = False
        self._back_after = 0.0
        self._welcome = asyncio.Event()
        self._welcome.set()
        self._keeper: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Start it and keep it running."""
        self._keeper = asyncio.create_task(self._keep(), name=f"keep-{self.name}")

    @property
    def pid(self) -> int | None:
        """Its process id while it runs."""
        return self._process.pid if self._process is not None and self.up.is_set() else None

    async def started_or_done(self) -> None:
        """Return when it runs, or will not run again."""
        waits = [asyncio.ensure_future(event.wait()) for event in (self.up, self.done)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    def kill(self, *, away_s: float = 0.0) -> bool:
        """End it by SIGKILL, and keep it away for so long; False when it did not run."""
        if not self._signal(signal.SIGKILL):
            return False
        self._killed, self._back_after = True, away_s
        return True

    def keep_away(self) -> None:
        """Once it dies, let it lie until `let_in`."""
        self._welcome.clear()

    def let_in(self) -> None:
        """Start it again, if it lies."""
        self._welcome.set()

    def pause(self) -> bool:
        """Stop it where it stands; False when it did not run."""
        return self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        self._signal(signal.SIGCONT)

    def kill_child(self) -> bool:
        """End its first child by SIGKILL; False when it has none."""
        pid = self.pid
        for child in children(pid) if pid is not None else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
                return True
        return False

    async def finish(self, patience_s: float) -> int | None:
        """End it by SIGTERM and return its status; None when it had to be killed."""
        process = self._process
        if process is None or self._keeper is None:
            return None
        self._keeper.cancel()
        await asyncio.wait([self._keeper])
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(patience_s):
                return await process.wait()
        except TimeoutError:
            await self.abandon()
            return None

    async def abandon(self) -> None:
        """End it, however it is."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait([self._keeper])
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()

    def _signal(self, number: signal.Signals) -> bool:
        pid = self.pid
        if pid is None:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
            return True
        return False

    async def _keep(self) -> None:
        while True:
            point = self._lives.popleft() if self._lives else ""
            started = time.time()
            if self.deaths and self.deaths[-1].back_at is None:
                last = self.deaths.pop()
                self.deaths.append(Death(last.name, last.at, last.how, started))
            status = await self._live(point)
            killed, self._killed = self._killed, False
            pause, self._back_after = max(RESTART_S, self._back_after), 0.0
            if status == 0 and not killed:
                self.done.set()
                return
            how = "kill" if killed else point if status == -signal.SIGKILL and point else f"exit {status}"
            self.deaths.append(Death(self.name, time.time(), how))
            self.died.set()
            self._on_death(self.name)
            if how.startswith("exit"):
                if not (status == 4 and started <= self.full_until):
                    self.failure = f"{self.name} ended with status {status}, which nobody asked for"
                    self.done.set()
                    return
                pause = DISK_RESTART_S
            await asyncio.sleep(pause)
            await self._welcome.wait()

    async def _live(self, point: str) -> int:
        environment = {**os.environ, **self._environment, VARIABLE: point, "PYTHONPATH": str(ROOT)}
        with self.log.open("ab") as output:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-E", "-S", tether.__file__, str(os.getpid()), *self._command),
                cwd=ROOT,
                env=environment,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        self.up.set()
        try:
            return await self._process.wait()
        finally:
            self.up.clear()


def children(pid: int) -> list[int]:
    """Process ids of the children of a process, those started by its other threads included."""
    found = []
    for listed in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [int(child) for child in listed.read_text().split()]
    return found


def with_token(token: str) -> list[int]:
    """Ids of the processes that were started with this token in their environment and still run."""
    wanted = f"{TOKEN}={token}".encode()
    found = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if wanted in environment.read_bytes().split(b"\0"):
                found.append(int(environment.parent.name))
    return found
