"""Starts a real broker for this machine, waits until it serves, and ends it.

    async with run_broker("auto", folder) as broker:
        connect(broker.url)

Mosquitto where it is found; otherwise the embedded one, which says of itself that it is for demonstrations. Either runs
as a child process on a loopback address, with its configuration and its log in a folder of the caller's. The readiness
line in the log is waited for, not merely an open port: that port may be somebody else's.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import socket
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from importlib import metadata, util
from pathlib import Path
from typing import Literal

from broker.config import EMBEDDED_READY, local_config, require_loopback
from shared.errors import UnavailableError

BrokerKind = Literal["mosquitto", "amqtt"]

START_S = 15.0
"""Longest wait for readiness; Mosquitto needs 0.1 s, amqtt 1 s or 2 on a busy machine."""
STOP_S = 5.0
"""Grace between SIGTERM and SIGKILL; a broker holds nothing that would be worth a longer wait."""
POLL_S = 0.02
PORT_ATTEMPTS = 5
"""How often a free port is drawn; another process may take it between the draw and the broker's start."""

EMBEDDED_NOTICE = (
    "embedded broker (amqtt): for demonstrations on this machine only; install Mosquitto for anything else"
)
INSTALL_HINT = "install it, for example with: apt-get install mosquitto"


@dataclass(frozen=True, slots=True)
class RunningBroker:
    """A broker that serves now; `url` is what the other parts connect to."""

    url: str
    kind: BrokerKind
    version: str
    pid: int
    log: Path
    notice: str
    """What the user must be told about this broker; empty for Mosquitto."""
    _process: asyncio.subprocess.Process = field(repr=False)

    async def wait(self) -> int:
        """The exit status, once the broker has ended; nobody but `run_broker` ends it on purpose."""
        return await self._process.wait()


@dataclass(frozen=True, slots=True)
class _Program:
    """How to start one kind of broker and how to see that it serves."""

    kind: BrokerKind
    command: tuple[str, ...]
    ready: re.Pattern[str]


class _PortTakenError(Exception):
    """Somebody else listens on the port."""


def find_mosquitto() -> Path | None:
    """Mosquitto's program file, also where packages put it but an ordinary user's PATH does not lead."""
    for candidate in (shutil.which("mosquitto"), "/usr/sbin/mosquitto", "/usr/local/sbin/mosquitto"):
        if candidate is not None and os.access(candidate, os.X_OK):
            return Path(candidate)
    return None


def choose_kind(wanted: Literal["auto", "mosquitto", "amqtt"]) -> BrokerKind:
    """The kind that will run here; UnavailableError when what is wanted is not installed."""
    mosquitto = find_mosquitto()
    embedded = util.find_spec("amqtt") is not None
    if wanted == "mosquitto" and mosquitto is None:
        raise UnavailableError("Mosquitto is not installed", hint=INSTALL_HINT)
    if wanted == "amqtt" and not embedded:
        raise UnavailableError("the embedded broker amqtt is not installed", hint="pip install 'mailboat[demo]'")
    if mosquitto is None and not embedded:
        raise UnavailableError("no broker is installed, neither Mosquitto nor amqtt", hint=INSTALL_HINT)
    if wanted == "auto":
        return "mosquitto" if mosquitto is not None else "amqtt"
    return wanted


@contextlib.asynccontextmanager
async def run_broker(
    kind: Literal["auto", "mosquitto", "amqtt"],
    workdir: Path,
    port: int | None = None,
    host: str = "127.0.0.1",
) -> AsyncIterator[RunningBroker]:
    """A broker that serves on a loopback address while the block runs; a free port is drawn when none is given.

    Enter it on a thread that lives as long as the broker shall, such as the main one: Linux ends the broker together
    with the thread that started it. Raises UnavailableError when it is not installed, does not start, or the port is
    taken; ConfigError when `host` can be reached from other machines.
    """
    require_loopback(host)
    chosen = choose_kind(kind)
    workdir.mkdir(parents=True, exist_ok=True)
    process, taken_port = await _start_on_some_port(chosen, workdir, host, port)
    log = _log_path(chosen, workdir)
    try:
        yield RunningBroker(
            url=f"mqtt://{f'[{host}]' if ':' in host else host}:{taken_port}",
            kind=chosen,
            version=_version(chosen, log),
            pid=process.pid,
            log=log,
            notice=EMBEDDED_NOTICE if chosen == "amqtt" else "",
            _process=process,
        )
    finally:
        await _stop(process)


async def _start_on_some_port(
    kind: BrokerKind, workdir: Path, host: str, port: int | None
) -> tuple[asyncio.subprocess.Process, int]:
    """The running process and its port: the one given, or one of several draws."""
    for _ in range(PORT_ATTEMPTS if port is None else 1):
        candidate = port if port is not None else _free_port(host)
        with contextlib.suppress(_PortTakenError):
            return await _start(_program(kind, workdir, host, candidate), workdir), candidate
    raise UnavailableError(
        f"port {candidate} on {host} is in use",
        hint="another broker may be running already (`ss -ltnp` shows who); stop it, use it, or choose another port",
    )


async def _start(program: _Program, workdir: Path) -> asyncio.subprocess.Process:
    """Start the program and return when its log says that it serves."""
    log = _log_path(program.kind, workdir)
    tether = Path(__file__).with_name("tether.py")
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-E", "-S", str(tether), str(os.getpid()), *program.command),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            # Ctrl-C is sent to every process of the terminal's group; the broker is ended last, by us.
            start_new_session=True,
        )
    async with contextlib.AsyncExitStack() as undo:
        undo.push_async_callback(_stop, process)
        try:
            async with asyncio.timeout(START_S):
                while not program.ready.search(_read(log)):
                    if process.returncode is not None:
                        raise _failure(program.kind, log)
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            raise UnavailableError(
                f"{program.kind} did not serve within {START_S:.0f} s", hint=f"its log is {log}"
            ) from None
        undo.pop_all()  # it serves: from now on its end is the caller's
    return process


def _failure(kind: BrokerKind, log: Path) -> Exception:
    """What to raise for a broker that ended instead of serving."""
    text = _read(log)
    if "address already in use" in text.lower():
        return _PortTakenError()
    last = text.strip().splitlines()[-1] if text.strip() else "it said nothing"
    return UnavailableError(f"{kind} did not start: {last}", hint=f"its log is {log}")


async def _stop(process: asyncio.subprocess.Process) -> None:
    """End this one child: asked first, killed when it does not answer."""
    if process.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        async with asyncio.timeout(STOP_S):
            await process.wait()
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def _program(kind: BrokerKind, workdir: Path, host: str, port: int) -> _Program:
    """The command line for one broker; Mosquitto's configuration is written to `workdir`."""
    if kind == "amqtt":
        command = (sys.executable, "-m", "broker.embedded", host, str(port))
        return _Program("amqtt", command, re.compile(re.escape(EMBEDDED_READY)))
    binary = find_mosquitto()
    assert binary is not None, "choose_kind found it"
    config = workdir / "mosquitto.conf"
    config.write_text(local_config(host, port), encoding="utf-8")
    return _Program("mosquitto", (str(binary), "-c", str(config)), _MOSQUITTO_READY)


_MOSQUITTO_READY = re.compile(r"mosquitto version (\S+) running")


def _version(kind: BrokerKind, log: Path) -> str:
    """The version that the running broker reports of itself."""
    if kind == "amqtt":
        return metadata.version("amqtt")
    found = _MOSQUITTO_READY.search(_read(log))
    assert found is not None, "readiness was seen in this very line"
    return found[1]


def _free_port(host: str) -> int:
    """A port that nobody listens on at this moment."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _log_path(kind: BrokerKind, workdir: Path) -> Path:
    """Where a broker of this kind writes its log."""
    return workdir / f"{kind}.log"


def _read(log: Path) -> str:
    """The log so far; a broker may write what is not UTF-8."""
    return log.read_text(encoding="utf-8", errors="replace")
