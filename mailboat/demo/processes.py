"""The processes of a demonstration: each a `mailboat` command with a log file, gone when this process is gone."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from broker import tether
from shared.errors import ConfigError, MailboatError, RefusedError, UnavailableError

STOP_S = 10.0
"""Grace between SIGTERM and SIGKILL: time to close a journal and an outbox in good order."""
TAIL_BYTES = 16_384

ONE_THREAD = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
"""Several trainers share this machine: each on one core is quicker than all on all."""

ERROR, ADVICE = "error: ", "hint: "
"""How `mailboat.console` begins the line that says what went wrong, and the one that says what to do."""

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(slots=True)
class Child:
    """One process that was started; `killed` when we ended it on purpose."""

    name: str
    log: Path
    process: asyncio.subprocess.Process = field(repr=False)
    killed: bool = False

    @property
    def status(self) -> int | None:
        """Exit status, negative for a signal; None while it runs."""
        return self.process.returncode

    def failure(self) -> MailboatError | None:
        """Return what to tell the person when it ended by itself and not well, else None."""
        if self.killed or not self.status:
            return None
        how = f"was ended by {signal_name(-self.status)}" if self.status < 0 else f"ended with status {self.status}"
        said, advice = last_error(tail(self.log))
        message = f"{self.name} {how}: {said}" if said else f"{self.name} {how} without a word"
        hint = f"{advice}; its log is {self.log}" if advice else f"its log is {self.log}"
        if self.status == ConfigError.exit_code:
            return ConfigError(message, hint=hint)
        if self.status == RefusedError.exit_code:
            return RefusedError(message, rule="process-failed", hint=hint)
        return UnavailableError(message, hint=hint)


class Children:
    """Starts processes and ends all of them when the block is left; enter it on the main thread (see broker.tether)."""

    def __init__(self, logs: Path, workdir: Path) -> None:
        self._logs = logs
        self._workdir = workdir
        self._children: dict[str, Child] = {}

    async def __aenter__(self) -> Self:
        self._logs.mkdir(parents=True, exist_ok=True)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop(*self._children)

    def __getitem__(self, name: str) -> Child:
        return self._children[name]

    def __contains__(self, name: str) -> bool:
        return name in self._children

    async def start(self, name: str, *arguments: str) -> Child:
        """Start `mailboat ARGUMENT...`; what it prints is appended to its log."""
        log = self._logs / f"{name}.log"
        with log.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-E", "-S", tether.__file__, str(os.getpid())),
                *(sys.executable, "-P", "-m", "mailboat", *arguments),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=self._workdir,
                env={**os.environ, **ONE_THREAD},
                # Ctrl-C is sent to every process of the terminal's group; these are ended by us, in order.
                start_new_session=True,
            )
        child = Child(name, log, process)
        self._children[name] = child
        return child

    async def kill(self, name: str) -> None:
        """End one process with SIGKILL, as a power cut would, and wait until it is gone."""
        child = self._children[name]
        child.killed = True
        with contextlib.suppress(ProcessLookupError):
            child.process.kill()
        await child.process.wait()

    async def stop(self, *names: str) -> None:
        """End these processes: asked first, all at once, killed when they do not go in time."""
        running = [self._children[name] for name in names if self._children[name].status is None]
        for child in running:
            child.killed = True
            with contextlib.suppress(ProcessLookupError):
                child.process.terminate()
        ends = [asyncio.ensure_future(child.process.wait()) for child in running]
        if not ends:
            return
        _, late = await asyncio.wait(ends, timeout=STOP_S)
        for child in running:
            if child.status is None:
                with contextlib.suppress(ProcessLookupError):
                    child.process.kill()
        if late:
            await asyncio.wait(late)

    def check(self) -> None:
        """Raise what the first process says that ended badly by itself."""
        for child in self._children.values():
            if failure := child.failure():
                raise failure


def signal_name(number: int) -> str:
    """SIGKILL for 9; the number where it has no name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def tail(log: Path) -> str:
    """Return the last lines of a log; a process may write what is not UTF-8."""
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - TAIL_BYTES))
        return stream.read().decode("utf-8", "replace")


def last_error(text: str) -> tuple[str, str]:
    """Return the line of a log that says best why the process ended, and the advice that came with it, if any.

    That line is the last error, or the last line where there is none.
    """
    lines = [line for raw in text.splitlines() if (line := _plain(raw))]
    errors = [index for index, line in enumerate(lines) if line.startswith(ERROR)]
    if not errors:
        return (lines or [""])[-1], ""
    after = lines[errors[-1] + 1] if errors[-1] + 1 < len(lines) else ""
    return lines[errors[-1]].removeprefix(ERROR), after.removeprefix(ADVICE) if after.startswith(ADVICE) else ""


def _plain(raw: str) -> str:
    """One log line without colours; of a JSON line its event, marked when it is an error."""
    line = _COLOUR.sub("", raw).strip()
    if not line.startswith("{"):
        return line
    try:
        entry = json.loads(line)
    except ValueError:
        return line
    if not isinstance(entry, dict) or "event" not in entry:
        return line
    return f"{ERROR}{entry['event']}" if entry.get("level") in {"error", "critical"} else str(entry["event"])
