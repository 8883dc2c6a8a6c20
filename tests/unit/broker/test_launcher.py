"""What the launcher decides before and around a broker process; tests/integration/test_broker.py runs real ones."""

from __future__ import annotations

import asyncio
import os
import re
import socket
from importlib import util
from pathlib import Path
from typing import Literal

import pytest

from broker import launcher
from broker.embedded import configuration
from broker.launcher import BrokerKind, choose_kind, run_broker
from shared.errors import ConfigError, UnavailableError
from tests.helpers import run_async

Wanted = Literal["auto", "mosquitto", "amqtt"]


def install(monkeypatch: pytest.MonkeyPatch, *, mosquitto: bool, amqtt: bool) -> None:
    """Make the launcher see a machine with these brokers installed."""
    monkeypatch.setattr(launcher, "find_mosquitto", lambda: Path("/usr/sbin/mosquitto") if mosquitto else None)
    monkeypatch.setattr(util, "find_spec", lambda _name: object() if amqtt else None)


@pytest.mark.parametrize(
    ("wanted", "mosquitto", "amqtt", "chosen"),
    [
        ("auto", True, True, "mosquitto"),
        ("auto", True, False, "mosquitto"),
        ("auto", False, True, "amqtt"),
        ("mosquitto", True, True, "mosquitto"),
        ("amqtt", True, True, "amqtt"),
        ("amqtt", False, True, "amqtt"),
    ],
)
def test_the_real_broker_is_preferred(
    monkeypatch: pytest.MonkeyPatch, wanted: Wanted, mosquitto: bool, amqtt: bool, chosen: BrokerKind
) -> None:
    """Mosquitto runs where it is installed, the embedded broker where it is asked for or alone."""
    install(monkeypatch, mosquitto=mosquitto, amqtt=amqtt)
    assert choose_kind(wanted) == chosen


@pytest.mark.parametrize(
    ("wanted", "mosquitto", "amqtt", "message"),
    [
        ("auto", False, False, "no broker is installed.*apt-get install mosquitto"),
        ("mosquitto", False, True, "Mosquitto is not installed.*apt-get install mosquitto"),
        ("amqtt", True, False, r"amqtt is not installed.*mailboat\[demo\]"),
    ],
)
def test_a_missing_broker_is_named(
    monkeypatch: pytest.MonkeyPatch, wanted: Wanted, mosquitto: bool, amqtt: bool, message: str
) -> None:
    """What is wanted and not installed is unavailable (exit 4), and the hint says how to get it."""
    install(monkeypatch, mosquitto=mosquitto, amqtt=amqtt)
    with pytest.raises(UnavailableError, match=message) as caught:
        choose_kind(wanted)
    assert caught.value.exit_code == 4


def test_mosquitto_is_found_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An executable on PATH wins over the usual places."""
    program = tmp_path / "mosquitto"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert launcher.find_mosquitto() == program


def test_the_embedded_broker_stays_on_this_machine() -> None:
    """The embedded broker refuses an address that other machines can reach."""
    assert configuration("127.0.0.1", 7)["listeners"]["default"]["bind"] == "127.0.0.1:7"
    with pytest.raises(ConfigError, match="may not listen on"):
        configuration("0.0.0.0", 7)  # noqa: S104 - refused


async def start(folder: Path, port: int | None = None, host: str = "127.0.0.1") -> None:
    """Enter and leave a broker's block."""
    async with run_broker("mosquitto", folder, port, host):
        pass


def pretend(monkeypatch: pytest.MonkeyPatch, *command: str) -> None:
    """Run this command where Mosquitto would run."""
    install(monkeypatch, mosquitto=True, amqtt=True)
    program = launcher._Program("mosquitto", command, re.compile("I serve"))
    monkeypatch.setattr(launcher, "_program", lambda *_arguments: program)


def test_other_machines_are_refused_before_anything_starts(tmp_path: Path) -> None:
    """A public address is a configuration error (exit 2), whatever is installed, and nothing is written."""
    with pytest.raises(ConfigError, match="may not listen on 192"):
        run_async(start(tmp_path / "new", host="192.168.1.5"))
    assert not (tmp_path / "new").exists()


def test_a_broker_that_ends_at_once_is_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last line of the log is the reason that the user reads, and the log's path the hint."""
    pretend(monkeypatch, "/bin/sh", "-c", "echo first; echo Error: no luck today; exit 3")
    with pytest.raises(UnavailableError, match=r"did not start: Error: no luck today .*mosquitto\.log"):
        run_async(start(tmp_path))


def test_a_silent_failure_is_said_to_be_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A broker that ends without a word is reported in words all the same."""
    pretend(monkeypatch, "/bin/sh", "-c", "exit 3")
    with pytest.raises(UnavailableError, match="did not start: it said nothing"):
        run_async(start(tmp_path))


def test_a_broker_that_never_serves_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the longest wait the child is gone and the message says how long it was waited for."""
    pretend(monkeypatch, "/bin/sh", "-c", "exec sleep 60")
    monkeypatch.setattr(launcher, "START_S", 0.5)
    stop, started = launcher._stop, list[int]()

    async def noted(process: asyncio.subprocess.Process) -> None:
        started.append(process.pid)
        await stop(process)

    monkeypatch.setattr(launcher, "_stop", noted)
    with pytest.raises(UnavailableError, match="did not serve within"):
        run_async(start(tmp_path))
    (pid,) = started
    assert not alive(pid)


def test_a_broker_deaf_to_the_signal_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that ignores SIGTERM is killed after the grace, not waited for."""
    pretend(monkeypatch, "/bin/sh", "-c", f"trap '' TERM; echo $$ > {tmp_path}/pid; echo I serve; exec sleep 60")
    monkeypatch.setattr(launcher, "STOP_S", 0.1)
    monkeypatch.setattr(launcher, "_version", lambda *_arguments: "0")
    run_async(start(tmp_path))  # within half of its sleep
    assert not alive(int((tmp_path / "pid").read_text()))


def test_a_given_port_in_use_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A taken port is unavailable (exit 4), tried once, and named together with what to do."""
    pretend(monkeypatch, "/bin/sh", "-c", f"echo x >> {tmp_path}/tries; echo Error: Address already in use; exit 1")
    with pytest.raises(UnavailableError, match=r"port 4711 on 127\.0\.0\.1 is in use.*another port") as caught:
        run_async(start(tmp_path, 4711))
    assert caught.value.exit_code == 4
    assert (tmp_path / "tries").read_text().count("x") == 1


def test_a_drawn_port_in_use_is_drawn_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody may take the drawn port before the broker does; then another is drawn, a few times."""
    pretend(monkeypatch, "/bin/sh", "-c", f"echo x >> {tmp_path}/tries; echo Error: Address already in use; exit 1")
    with pytest.raises(UnavailableError, match="is in use"):
        run_async(start(tmp_path))
    assert (tmp_path / "tries").read_text().count("x") == launcher.PORT_ATTEMPTS


def test_drawn_ports_are_free() -> None:
    """A drawn port can be bound."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", launcher._free_port("127.0.0.1")))


def alive(pid: int) -> bool:
    """Whether a process of this id exists."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
