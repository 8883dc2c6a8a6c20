"""The processes of one run: started, watched from outside through /proc, killed, and none left behind.

Each belongs to a role, 'server' or a site's name, which its children inherit, also those whose parent died.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

CLONE_NEWNET = 0x40000000  # linux/sched.h
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
LOOK_S = 0.25
END_S = 5.0
ASK_S = 120.0


@dataclass(slots=True)
class Usage:
    """What the processes of one role took; bytes and seconds."""

    peak_bytes: int = 0
    """The most that they held together in memory at one look, pages of mapped files on tmpfs included."""
    anonymous_bytes: int = 0
    """The same without pages of files."""
    idle_bytes: int = 0
    """What they held together when `mark_idle` was called."""
    idle_anonymous_bytes: int = 0
    cpu_s: float = 0.0
    _cpu: dict[int, float] = field(default_factory=dict, repr=False)


def isolate() -> bool:
    """Move this process into a network of its own, where every port is free and no other traffic is; False if not root.

    Call it before any thread is started.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    if os.geteuid() != 0 or libc.unshare(CLONE_NEWNET) != 0:
        return False
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)  # noqa: S607 - wherever the system keeps it
    return True


def loopback_bytes() -> int:
    """Bytes that have crossed the loopback interface of this network."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "lo":
            return int(counters.split()[0])
    raise AssertionError("there is no loopback interface")


class Stage:
    """All processes of one run; leaving the context ends them."""

    def __init__(self, folder: Path, environment: Mapping[str, str], *, look_s: float = LOOK_S) -> None:
        self.folder = folder
        self._look_s = look_s
        self.usage: dict[str, Usage] = {}
        self._environment = {**os.environ, **environment}
        self._roles: dict[int, str] = {}
        self._children: list[subprocess.Popen[bytes]] = []
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._watch = threading.Thread(target=self._look_on, daemon=True)

    def __enter__(self) -> Self:
        """Look on from now."""
        self._watch.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End every process that began here."""
        self._over.set()
        self._watch.join()
        for number in (signal.SIGTERM, signal.SIGKILL):
            until = time.monotonic() + END_S
            for pid in descendants(os.getpid()):
                _signal(pid, number)
            while descendants(os.getpid()) and time.monotonic() < until:
                self._reap()
                time.sleep(LOOK_S)
        self._reap()

    def start(
        self, role: str, command: Sequence[str | Path], *, log: str, extra: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a program in that role; what it says goes to the end of the file `log` in the run's folder."""
        with (self.folder / f"{log}.log").open("ab") as output:
            child = subprocess.Popen(
                [str(word) for word in command],
                cwd=self.folder,
                env={**self._environment, **(extra or {})},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        with self._lock:
            self._roles[child.pid] = role
            self._children.append(child)
        return child

    def ask(self, command: Sequence[str | Path], *, extra: Mapping[str, str] | None = None) -> str:
        """What a short command says, errors included; one that says nothing for two minutes has said nothing."""
        try:
            done = self._run(command, extra)
        except subprocess.TimeoutExpired:
            return ""
        return done.stdout.decode(errors="replace")

    def _run(
        self, command: Sequence[str | Path], extra: Mapping[str, str] | None
    ) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [str(word) for word in command],
            cwd=self.folder,
            env={**self._environment, **(extra or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=ASK_S,
            check=False,
        )

    def pids(self, role: str) -> list[int]:
        """Processes of that role that run now."""
        self._look()
        alive = set(descendants(os.getpid()))
        with self._lock:
            return [pid for pid, of in self._roles.items() if of == role and pid in alive]

    def kill(self, role: str, *, spare: Sequence[str] = ()) -> list[str]:
        """SIGKILL to all processes of the role at once, but those with a word of `spare` in their command lines."""
        killed = []
        for pid in self.pids(role):
            command = command_line(pid)
            if any(word in command for word in spare):
                continue
            _signal(pid, signal.SIGKILL)
            killed.append(command)
        return killed

    def mark_idle(self) -> None:
        """Take what each role holds now as the baseline of its memory."""
        self._look()
        for role, usage in self.usage.items():
            sizes = [memory_bytes(pid) for pid in self.pids(role)]
            usage.idle_bytes = sum(size for size, _ in sizes)
            usage.idle_anonymous_bytes = sum(anonymous for _, anonymous in sizes)
            usage.peak_bytes = usage.anonymous_bytes = 0
            usage.cpu_s = -sum(usage._cpu.values())  # noqa: SLF001 - its own record

    def cpu_s(self, role: str) -> float:
        """Processor seconds of the role since `mark_idle`."""
        usage = self.usage[role]
        return usage.cpu_s + sum(usage._cpu.values())  # noqa: SLF001 - its own record

    def _look_on(self) -> None:
        while not self._over.wait(self._look_s):
            self._look()

    def _look(self) -> None:
        processes = _processes()
        held: dict[str, tuple[int, int]] = {}
        with self._lock:
            for pid in descendants(os.getpid(), processes):
                role = self._roles.get(pid) or self._roles.get(processes[pid][0])
                if role is None:
                    continue
                self._roles[pid] = role
                usage = self.usage.setdefault(role, Usage())
                with contextlib.suppress(OSError, ValueError):
                    usage._cpu[pid] = processor_s(pid)  # noqa: SLF001 - its own record
                    size, anonymous = memory_bytes(pid)
                    before = held.get(role, (0, 0))
                    held[role] = (before[0] + size, before[1] + anonymous)
            for role, (size, anonymous) in held.items():
                self.usage[role].peak_bytes = max(self.usage[role].peak_bytes, size)
                self.usage[role].anonymous_bytes = max(self.usage[role].anonymous_bytes, anonymous)

    def _reap(self) -> None:
        for child in self._children:
            child.poll()
        ours = {child.pid for child in self._children}
        # Orphans of dead parents are ours to bury; those that we started are Popen's.
        for pid, (parent, state) in _processes().items():
            if parent == os.getpid() and pid not in ours and state == "Z":
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _stat(pid: int) -> list[str]:
    """The fields behind the command's name: state, parent, ..."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _processes() -> dict[int, tuple[int, str]]:
    """Parent and state of every process."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, parent = _stat(int(entry.name))[:2]
            found[int(entry.name)] = (int(parent), state)
    return found


def descendants(root: int, processes: Mapping[int, tuple[int, str]] | None = None) -> list[int]:
    """Processes below `root` that have not ended, parents before their children."""
    processes = _processes() if processes is None else processes
    children: dict[int, list[int]] = {}
    for pid, (parent, state) in processes.items():
        if state != "Z":
            children.setdefault(parent, []).append(pid)
    found, waiting = [], [root]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def processor_s(pid: int) -> float:
    """User and system time of a process."""
    fields = _stat(pid)
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


def memory_bytes(pid: int) -> tuple[int, int]:
    """Resident bytes of a process, and those of them that are no pages of files."""
    values = {}
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            key, _, value = line.partition(":")
            if key in {"VmRSS", "RssAnon"}:
                values[key] = int(value.split()[0]) * 1024
    return values.get("VmRSS", 0), values.get("RssAnon", 0)


def command_line(pid: int) -> str:
    """What the process was started as; empty when it has gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""
