"""A hostile member: how much longer the others' rounds take, and what memory the coordinator needs.

Two honest sites and a coordinator run a sealed federation over a real Mosquitto, once alone and once beside a third
member that floods its own topics as fast as its link allows, for the whole run:

    data      packets of 64 KiB for updates that nobody asked for, and garbage
    control   offers, wants and hellos, each sealed with its own valid keys and repeated for ever, garbage, presence
    mixed     both in turns
    pulls     a fresh want every 20 ms, each for the newest state from its beginning, with the largest window: cheap for
              it, and what it asks for is dear

It speaks MQTT by hand, with QoS 0, so that no acknowledgement slows it down; `--mbit` is the rate of its link, kept at
the sender. Measured are the times from version to version in the coordinator's journal, and the peak memory of the
coordinator and of the broker. A muted member is listened to again after one minute, then after two: the run lasts long
enough for both, and the rounds of those moments are told by themselves. Runs alone and beside take turns. `make
bench-hostile`; times need a quiet machine.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime as dt
import itertools
import json
import math
import os
import secrets
import socket
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from broker.launcher import run_broker
from coordinator.journal import Journal
from coordinator.records import Opened, VersionCommitted
from coordinator.views import JOURNAL
from shared.config import FederationConfig, SiteConfig
from shared.configfile import load_config
from shared.ids import new_session_id, new_update_id
from shared.manifest import manifest_from_bytes
from shared.messages import Hello, Message, Offer, Presence, Want, chunk_header
from shared.plan import SealedPlan
from shared.topics import Channel, topic
from shared.trust.choose import site_guard
from shared.trust.guard import SitesGuard
from tests.chaos.results import machine
from tests.factories import make_state, make_update
from tests.toys import write_toy

NAME = "toy"
HOSTILE = "site-3"
PARAMETERS = 2_000_000
GARBAGE_BYTES = 64 * 1024
SEALED = 200
"""Messages of each kind that are sealed beforehand."""
PIECE_BYTES = 16 * 1024
"""What is sent between two looks at the clock, at least."""
VERSIONS = 300
"""Rounds of some 0.8 s: the member is listened to again after one minute, and after two more, and there is a rest."""
SENT = "hostile-bytes"
LOG = "coordinator.log"
PULLS_S = 0.02
"""Between two wants: slow enough that their number alone is no flood."""
KINDS = ("data", "control", "mixed", "pulls")


def _member(root: Path) -> tuple[SealedPlan, SitesGuard]:
    """The plan, and what makes the hostile site's messages those of a member."""
    config = load_config(root / f"{HOSTILE}.toml", SiteConfig)
    federation = load_config(config.federation, FederationConfig)
    plan = SealedPlan.model_validate_json((root / "coordinator" / "plan.json").read_bytes())
    storage = root / "hostile-storage"
    return plan, site_guard(federation, config.trust, site=HOSTILE, fingerprint=plan.fingerprint, storage=storage)


def packets(root: Path, kind: str) -> list[bytes]:
    """What the hostile site sends, over and over: whole PUBLISH packets of MQTT 3.1.1, QoS 0."""
    plan, guard = _member(root)
    control = [
        _publish(channel, guard.seal(message, channel, HOSTILE, time.time()))
        for _ in range(SEALED)
        for channel, message in _messages(plan)
    ]
    control += [_publish(Channel.UP_CTL, secrets.token_bytes(300)) for _ in range(SEALED)]
    data = [_publish(Channel.UP_DATA, secrets.token_bytes(GARBAGE_BYTES)) for _ in range(8)]
    data += [
        _publish(Channel.UP_DATA, chunk_header(secrets.token_hex(16), 0, GARBAGE_BYTES) + each[-GARBAGE_BYTES:])
        for each in data
    ]
    if kind == "mixed":
        return [*itertools.chain.from_iterable(zip(itertools.cycle(data), control, strict=False))]
    return {"data": data, "control": control}[kind]


def pulls(root: Path) -> Iterator[bytes]:
    """Wants without end, from the moment in which there is a state."""
    _, guard = _member(root)
    while not any((root / "coordinator").glob("updates/*.manifest")):  # so there is a version that they started from
        time.sleep(PULLS_S)
    while True:
        with Journal.open_read(root / "coordinator" / JOURNAL) as reader:
            versions = [each for each in reader.replay() if isinstance(each, Opened | VersionCommitted)]
        newest = manifest_from_bytes(versions[-1].state).transfer_id
        for _ in range(round(1 / PULLS_S)):
            want = Want(transfer_id=newest, have=b"", window=4096, restart=True)
            yield _publish(Channel.UP_CTL, guard.seal(want, Channel.UP_CTL, HOSTILE, time.time()))
            time.sleep(PULLS_S)


def _messages(plan: SealedPlan) -> Iterator[tuple[Channel, Message]]:
    base, session = make_state(plan, 0), new_session_id()
    yield Channel.UP_CTL, Offer(manifest=make_update(plan, HOSTILE, base, update_id=new_update_id(HOSTILE)))
    yield Channel.UP_CTL, Want(transfer_id=secrets.token_hex(16), have=b"", window=4096, restart=True)
    yield (
        Channel.UP_CTL,
        Hello(
            site=HOSTILE,
            session=session,
            fingerprint=plan.fingerprint,
            config_sha256=plan.config_sha256,
            frozen_sha256=plan.frozen_sha256,
            software="hostile",
            clock=time.time(),
        ),
    )
    yield Channel.PRESENCE, Presence(site=HOSTILE, session=session, online=True)


def _varint(value: int) -> bytes:
    head, rest = value & 0x7F, value >> 7
    return bytes([head | 0x80]) + _varint(rest) if rest else bytes([head])


def _publish(channel: Channel, payload: bytes) -> bytes:
    name = topic(NAME, channel, HOSTILE).encode()
    body = struct.pack("!H", len(name)) + name + payload
    return b"\x30" + _varint(len(body)) + body


def flood(root: Path, port: int, kind: str, mbit: float) -> None:
    """Send until killed; in a process of its own."""
    pieces = pulls(root) if kind == "pulls" else itertools.cycle(map(b"".join, _batches(packets(root, kind))))
    client_id = HOSTILE.encode()
    connect = struct.pack("!H4sBBHH", 4, b"MQTT", 4, 2, 0, len(client_id)) + client_id
    with socket.create_connection(("127.0.0.1", port)) as link:
        link.sendall(b"\x10" + _varint(len(connect)) + connect)
        link.recv(4)
        sent, due, counter = 0, time.monotonic(), os.open(root / SENT, os.O_CREAT | os.O_WRONLY)
        for piece in pieces:
            due = max(due, time.monotonic() - 0.1)
            time.sleep(max(0.0, due - time.monotonic()))
            link.sendall(piece)
            sent += len(piece)
            due += len(piece) * 8 / (mbit * 1e6)
            os.pwrite(counter, struct.pack("<Q", sent), 0)  # whole, whenever we are killed


def _batches(all_packets: list[bytes]) -> Iterator[list[bytes]]:
    batch: list[bytes] = []
    for packet in all_packets:
        batch.append(packet)
        if sum(map(len, batch)) >= PIECE_BYTES:
            yield batch
            batch = []
    if batch:
        yield batch


async def measure(kind: str | None, versions: int, mbit: float) -> dict[str, Any]:
    """One run: seconds of each round, memory in MiB, megabytes of the flood; `kind` is None without one."""
    with tempfile.TemporaryDirectory(prefix="mailboat-hostile-") as folder:
        root = Path(folder)
        async with run_broker("mosquitto", root / "broker") as broker:
            write_toy(
                root, broker.url, sites=3, versions=versions, quorum=2, parameters=PARAMETERS, sealed=True, link=""
            )
            hostile = None
            if kind is not None:
                port = broker.url.rpartition(":")[2]
                hostile = await _start("-m", "bench.hostile", "--flood", str(root), port, kind, str(mbit))
            parties = [
                await _start(
                    *("-m", "mailboat", "coordinator", "run", "-c", str(root / "coordinator.toml")), log=root / LOG
                ),
                *[await _start("-m", "tests.toys", "site", str(root / f"site-{number}.toml")) for number in (1, 2)],
            ]
            memory: dict[str, float] = {}
            watching = asyncio.create_task(_watch({"coordinator": parties[0].pid, "broker": broker.pid}, memory))
            codes = [await party.wait() for party in parties]
            watching.cancel()
            assert codes == [0, 0, 0], codes
            if hostile is not None:
                assert hostile.returncode is None, "the hostile site gave up"
                hostile.kill()
                await hostile.wait()
        with Journal.open_read(root / "coordinator" / "journal.sqlite") as journal:
            times = [record.at for record in journal.replay() if isinstance(record, VersionCommitted)]
        rounds, again = list(itertools.pairwise(times)), listened_again((root / LOG).read_text())
        return {
            "rounds": [after - before for before, after in rounds],
            "listened_again": sum(begin < times[-1] for begin, _end in again),
            "listening": [after - before for before, after in rounds if _meets((before, after), again)],
            "mib": memory,
            "hostile_mb": int.from_bytes((root / SENT).read_bytes(), "little") / 1e6 if kind else 0.0,
        }


def listened_again(log: str) -> list[tuple[float, float]]:
    """From when to when, in unix seconds, a member that had been muted was listened to, as the coordinator's log tells.

    The end is that of its next muting; the last one may have none.
    """
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    mutings = [
        (dt.datetime.fromisoformat(line["timestamp"]).timestamp(), line["seconds"])
        for line in lines
        if line["event"].startswith("a site floods")
    ]
    ends = [at for at, _seconds in mutings[1:]] + [math.inf]
    return [(at + seconds, end) for (at, seconds), end in zip(mutings, ends, strict=True)] if mutings else []


def _meets(one: tuple[float, float], others: list[tuple[float, float]]) -> bool:
    return any(one[0] < end and begin < one[1] for begin, end in others)


async def _start(*command: str, log: Path | None = None) -> asyncio.subprocess.Process:
    """A process of this Python; its log goes to a file, or to our own standard error."""
    quiet = asyncio.subprocess.DEVNULL
    with log.open("wb") if log else contextlib.nullcontext() as file:
        return await asyncio.create_subprocess_exec(sys.executable, *command, stdout=quiet, stderr=file)


async def _watch(pids: dict[str, int], peaks: dict[str, float]) -> None:
    """Keep the peak memory of processes in `peaks`, in MiB, until cancelled."""
    while True:
        for name, pid in pids.items():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                    if line.startswith("VmHWM:"):
                        peaks[name] = int(line.split()[1]) / 1024
        await asyncio.sleep(0.2)


async def compare(kinds: list[str], versions: int, turns: int, mbit: float) -> dict[str, Any]:
    """Runs in turns, and how much the median round, and all rounds together, grew over those alone."""
    orders: list[str | None] = [None, *kinds]
    runs: dict[str | None, list[dict[str, Any]]] = {kind: [] for kind in orders}
    for turn in range(turns):
        for kind in orders if turn % 2 == 0 else reversed(orders):
            runs[kind].append(await measure(kind, versions, mbit))
            _say(f"[hostile] {kind or 'alone'}: {statistics.median(runs[kind][-1]['rounds']):.2f} s a round")
    return {
        "machine": machine(),
        "settings": {"versions": versions, "turns": turns, "mbit": mbit, "parameters": PARAMETERS},
        "runs": [{"flood": kind or "none", **_summary(runs[kind], runs[None])} for kind in orders],
    }


def _summary(some: list[dict[str, Any]], alone: list[dict[str, Any]]) -> dict[str, float]:
    rounds, usual = (list(itertools.chain.from_iterable(run["rounds"] for run in each)) for each in (some, alone))
    return {
        "median_s": round(statistics.median(rounds), 3),
        "worst_s": round(max(rounds), 3),
        "growth_of_median": round(statistics.median(rounds) / statistics.median(usual) - 1, 3),
        "growth_of_sum": round(sum(rounds) / sum(usual) - 1, 3),
        "listened_again": sum(run["listened_again"] for run in some),
        **_while_listening(list(itertools.chain.from_iterable(run["listening"] for run in some)), usual),
        "coordinator_mib": round(max(run["mib"]["coordinator"] for run in some)),
        "broker_mib": round(max(run["mib"]["broker"] for run in some)),
        "hostile_mb": round(sum(run["hostile_mb"] for run in some)),
    }


def _while_listening(rounds: list[float], usual: list[float]) -> dict[str, float]:
    """The rounds that had to bear a flood which was listened to again; nothing where there was none."""
    if not rounds:
        return {}
    return {
        "rounds_then": len(rounds),
        "worst_then_s": round(max(rounds), 3),
        "growth_of_median_then": round(statistics.median(rounds) / statistics.median(usual) - 1, 3),
    }


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


def main() -> None:
    """Print the comparison, and write it where told."""
    parser = argparse.ArgumentParser(prog="python -m bench.hostile", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--versions", type=int, default=VERSIONS)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--mbit", type=float, default=100.0, help="rate of the hostile site's link")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--flood", nargs=4, metavar=("ROOT", "PORT", "KIND", "MBIT"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.flood:
        root, port, kind, mbit = given.flood
        flood(Path(root), int(port), kind, float(mbit))
        return
    found = asyncio.run(compare(given.kinds, given.versions, given.turns, given.mbit))
    sys.stdout.write(json.dumps(found, indent=1) + "\n")
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
