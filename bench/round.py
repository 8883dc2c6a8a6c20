"""One federated round, from one published model to the next: `python -m bench.round --json FILE`.

    python -m bench.round --runs "mailboat f32" flare flower --turns 2

A server and sites as processes of their own on one machine, over loopback; training adds known noise at once, so that
all the time goes to moving, storing and merging. Runs take turns, and each ratio is one of medians of the same call.
A round is the time between the moments at which the last site began to train on two models in a row; so it holds the
state's way out, training, the update's way in, the merge and, with Mailboat, every fsync. The ledger in the last model
(bench/peers/work.py) shows that each update went into it once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.peers.frameworks import Flare, Flower, Framework, environment, until, version_of
from bench.peers.own import Mailboat
from bench.peers.pages import Touched
from bench.peers.stage import Stage, isolate, loopback_bytes
from bench.peers.work import Work, events
from shared.manifest import manifest_from_bytes
from tests.chaos.results import machine

TENSORS = 12
WARM_UP = 3
"""Rounds before the measured ones: from the fourth version on Mailboat writes its large files over older ones."""
MAILBOAT = ("mailboat f32", "mailboat bf16", "mailboat int8")
SEALED = " sealed"
ALL_MAILBOAT = (*MAILBOAT, *(run + SEALED for run in MAILBOAT))
PEERS = ("flare", "flower")
PATIENCE_S = 600.0
WRITE_BYTES = 1 << 20
LEDGER_TOLERANCE = 0.02
"""int8 rounds the ledger as it rounds everything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """What one run took for a round; seconds and megabytes."""

    run: str
    version: str
    place: str
    seconds: list[float]
    """Each round."""
    cpu_s: dict[str, float]
    """Processor seconds of a round, by role; all sites together."""
    server_mb: float
    """The most that the server's processes held together, above what they held before the first site came."""
    server_anonymous_mb: float
    """The same without pages of mapped files."""
    server_idle_mb: float
    site_mb: float
    """The most that one site's processes held together, in all."""
    broker_mb: float
    loopback_mb: float
    """Everything that crossed the loopback interface in a round; a broker's bytes cross it twice."""
    wire_mb: dict[str, float]
    """One update and one state as they travel, where the framework says."""
    plain_s: float | None
    """What a plain writer takes to write and sync the bytes that a round makes durable, one file after the other."""


def make(run: str, work: Work, stage: Stage) -> Framework:
    """The framework of a run."""
    name, _, codec = run.removesuffix(SEALED).partition(" ")
    match name:
        case "mailboat":
            return Mailboat(work, stage, codec=codec, quorum=work.sites, sealed=run.endswith(SEALED))
        case "flower":
            return Flower(work, stage)
        case "flare":
            return Flare(work, stage)
    raise AssertionError(run)


def measure(run: str, place: str, folder: Path, options: argparse.Namespace) -> Round:
    """One run in a folder of its own below `folder`."""
    root = Path(tempfile.mkdtemp(prefix="mailboat-round-", dir=folder.resolve()))
    work = Work(str(root), options.sites, round(options.parameters * 1e6), TENSORS, WARM_UP + options.rounds + 1, 0.0)
    try:
        memory = Touched(work.rounds, 0 if options.untouched else _kept_most(work))
        if run in PEERS:  # they keep nothing from round to round, and find all of it at once
            memory.keep(0)
        work.save()
        with Stage(root, environment(work)) as stage:
            found = _play(run, place, work, stage, memory)
        # Only when nothing else of the run is left to write.
        plain = _plain_writer(root, _synced(root, work)) if run.startswith("mailboat") else None
        return dataclasses.replace(found, plain_s=plain)
    finally:
        shutil.rmtree(root)


def _kept_most(work: Work) -> int:
    """Bytes that a round may keep: each site's update and the state, uncompressed."""
    return (work.sites + 1) * work.model_bytes


def _play(run: str, place: str, work: Work, stage: Stage, memory: Touched) -> Round:
    def models() -> int:
        found = len(_received(work))
        memory.keep(work.rounds - 1 - found)
        return found

    framework = make(run, work, stage)
    memory.keep(work.rounds - 1)
    framework.start_server()
    stage.mark_idle()
    for number in range(1, work.sites + 1):
        framework.start_site(number, framework.port)
    framework.begin()
    first, last = WARM_UP, work.rounds - 1
    until(lambda: models() > first, "the first models", PATIENCE_S)
    before, crossed = _cpu(work, stage), loopback_bytes()
    until(lambda: models() > last, "the last models", PATIENCE_S)
    after, crossed = _cpu(work, stage), loopback_bytes() - crossed
    rounds = last - first
    _check(work)
    times = [max(times) for times in _received(work)]
    server = stage.usage["server"]
    return Round(
        run=run,
        version="this tree" if run.startswith("mailboat") else version_of(run),
        place=place,
        seconds=[round(times[at + 1] - times[at], 3) for at in range(first, last)],
        cpu_s={role: round((after[role] - before[role]) / rounds, 2) for role in after},
        server_mb=round((server.peak_bytes - server.idle_bytes) / 1e6, 1),
        server_anonymous_mb=round((server.anonymous_bytes - server.idle_anonymous_bytes) / 1e6, 1),
        server_idle_mb=round(server.idle_bytes / 1e6, 1),
        site_mb=round(max(stage.usage[f"site-{number}"].peak_bytes for number in range(1, work.sites + 1)) / 1e6, 1),
        broker_mb=round(stage.usage["broker"].peak_bytes / 1e6, 1) if "broker" in stage.usage else 0.0,
        loopback_mb=round(crossed / rounds / 1e6, 1),
        wire_mb=_wire(Path(work.root)),
        plain_s=None,
    )


def _received(work: Work) -> list[list[float]]:
    """For each model that all sites have received: when each of them did."""
    models: dict[int, list[float]] = {}
    for event in events(Path(work.root)):
        if event["what"] == "received":
            models.setdefault(int(event["round"]), []).append(event["at"])
    return [times for _, times in sorted(models.items()) if len(times) == work.sites]


def _check(work: Work) -> None:
    """The last model holds each site's update of each round once."""
    newest = max((event for event in events(Path(work.root)) if event["what"] == "received"), key=lambda e: e["round"])
    expected = (work.rounds - 1) / work.sites
    if any(abs(value - expected) > LEDGER_TOLERANCE * work.rounds for value in newest["ledger"]):
        msg = f"the ledger says {newest['ledger']}, not {expected} for each site"
        raise AssertionError(msg)


def _cpu(work: Work, stage: Stage) -> dict[str, float]:
    sites = sum(stage.cpu_s(f"site-{number}") for number in range(1, work.sites + 1))
    found = {"server": stage.cpu_s("server"), "sites": sites}
    if "broker" in stage.usage:
        found["broker"] = stage.cpu_s("broker")
    return found


def _wire(root: Path) -> dict[str, float]:
    found = {}
    for name, folder in (("update", "updates"), ("state", "states")):
        for manifest in sorted((root / "coordinator" / folder).glob("*.manifest"))[:1]:
            found[name] = round(manifest_from_bytes(manifest.read_bytes()).wire_bytes / 1e6, 2)
    return found


def _synced(root: Path, work: Work) -> list[int]:
    """Sizes of the files that one round makes durable: updates and states at both ends, and the master."""
    wire = {name: round(size * 1e6) for name, size in _wire(root).items()}
    return [wire["update"]] * (2 * work.sites) + [wire["state"]] * (1 + work.sites) + [work.model_bytes]


def _plain_writer(root: Path, sizes: list[int]) -> float:
    """Seconds to write and sync files of these sizes, one after the other."""
    block = os.urandom(WRITE_BYTES)
    began = time.monotonic()
    for number, size in enumerate(sizes):
        with (root / f"plain-{number}").open("wb", buffering=0) as file:
            for at in range(0, size, WRITE_BYTES):
                file.write(block[: min(WRITE_BYTES, size - at)])
            os.fsync(file.fileno())
    return round(time.monotonic() - began, 3)


def median_s(found: list[Round], run: str, place: str) -> float | None:
    """The median round of a run."""
    seconds = [one for each in found if (each.run, each.place) == (run, place) for one in each.seconds]
    return statistics.median(seconds) if seconds else None


def processor_s(found: list[Round], run: str, place: str) -> float:
    """The median of all roles' processor seconds for a round."""
    return statistics.median(sum(each.cpu_s.values()) for each in found if (each.run, each.place) == (run, place))


def ratios(found: list[Round]) -> dict[str, float]:
    """Each run's median round, in that of each peer and of the same run open; on the disk, in what it may take there.

    What sealing costs is told in processor seconds as well, which a busy machine spoils less than times.
    """
    told = {}
    for run in ALL_MAILBOAT:
        for place in sorted({each.place for each in found}):
            mine = median_s(found, run, place)
            if mine is None:
                continue
            for peer in PEERS:
                theirs = median_s(found, peer, place)
                if theirs is not None:
                    told[f"{run} / {peer}, {place}"] = round(mine / theirs, 3)
            bare = run.removesuffix(SEALED)
            bare_s = median_s(found, bare, place)
            if run.endswith(SEALED) and bare_s is not None:
                told[f"{run} / {bare}, {place}"] = round(mine / bare_s, 3)
                if (spent := processor_s(found, bare, place)) > 0:  # a tiny round may take less than the kernel counts
                    told[f"{run} / {bare}, {place}, processor"] = round(processor_s(found, run, place) / spent, 3)
            memory = median_s(found, run, "tmpfs")
            plain = [each.plain_s for each in found if (each.run, each.place) == (run, place) and each.plain_s]
            if place == "disk" and plain:
                least = max(memory or 0.0, statistics.median(plain))
                told[f"{run} / the larger of tmpfs and plain writer, disk"] = round(mine / least, 3)
    return told


def main() -> int:
    """Measure in turns; print and keep what was found after each run."""
    parser = argparse.ArgumentParser(prog="python -m bench.round", description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", nargs="+", choices=(*ALL_MAILBOAT, *PEERS), default=list(MAILBOAT))
    parser.add_argument("--parameters", type=float, default=60.0, help="millions")
    parser.add_argument("--sites", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3, help=f"rounds measured, after {WARM_UP} to warm up")
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--tmpfs", type=Path, default=Path("/dev/shm"))  # noqa: S108 - where Linux keeps it
    parser.add_argument("--disk", type=Path, help="a folder on a disk: measure there as well")
    parser.add_argument("--untouched", action="store_true", help="memory as a virtual machine's host gives it")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was started is ended
    isolate()
    places = {"tmpfs": options.tmpfs, **({"disk": options.disk} if options.disk else {})}
    found: list[Round] = []
    for _ in range(options.turns):
        for place, folder in places.items():
            for run in options.runs:
                found.append(measure(run, place, folder, options))
                sys.stdout.write(json.dumps(dataclasses.asdict(found[-1])) + "\n")
                sys.stdout.flush()
    told: dict[str, Any] = {
        "machine": {**machine(), "load at the end": os.getloadavg()[0]},
        "settings": {key: getattr(options, key) for key in ("parameters", "sites", "rounds", "turns", "untouched")},
        "ratios": ratios(found),
        "runs": [dataclasses.asdict(each) for each in found],
    }
    sys.stdout.write(json.dumps(told["ratios"], indent=1) + "\n")
    if options.json is not None:
        options.json.write_text(json.dumps(told, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
