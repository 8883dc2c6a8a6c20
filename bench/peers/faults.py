"""The same faults given to Mailboat, Flower and NVIDIA FLARE: `python -m bench.peers.faults --json FILE`.

Three sites add known noise to one model, round after round; all processes are real, all settings the defaults. Site 1
stands behind a slow link, a seeded TCP proxy; the fault strikes when two fifths of its second upload have passed it.
What is reported was seen from outside: at the proxy, in what the training functions noted, and in the ledger that
each global model carries (bench/peers/work.py).
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import fcntl
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bench.peers.frameworks import UNKNOWN, Flare, Flower, Framework, environment, until, version_of
from bench.peers.own import Mailboat
from bench.peers.stage import Stage, isolate
from bench.peers.work import Work, events
from mailboat.flaky import Conditions, FlakyProxy
from tests.chaos.results import machine

SITES = 3
RESTART_S = 5.0
"""A killed process is started again after so long, with the same command; FLARE's own scripts look as often."""
STRUCK_AT = 0.4
"""Share of the model's bytes of an upload that have passed the proxy when the fault strikes."""
LOOK_S = 1.0
ASK_S = 60.0
"""How often a framework is asked for the state of its run."""
TRAINING_S = 900.0
"""Longest wait for a training or an upload before the fault."""
STRANGE_MAX = 3
"""A server that has just been started may not answer at once."""
SILENCE_S = 900.0
"""After so long without any progress a run is watched no longer."""
FAULTS = ("none", "link down", "link silent", "server killed", "site killed")
VARIANTS = ("mailboat", "mailboat, quorum 3", "flower", "flower, --database", "flare")


class Link:
    """The proxy of site 1 in an event loop of its own."""

    def __init__(self, port: int, mbit: float) -> None:
        conditions = Conditions(latency_s=0.01, bytes_per_s=mbit * 125_000)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self.proxy = FlakyProxy("127.0.0.1", port, conditions=conditions)

    def __enter__(self) -> Self:
        """Listen."""
        self._thread.start()
        self.do(self.proxy.__aenter__())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close every connection."""
        self.do(self.proxy.__aexit__(None, None, None))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def do(self, step: Coroutine[Any, Any, Any]) -> None:
        """Run one step in the proxy's loop."""
        asyncio.run_coroutine_threadsafe(step, self._loop).result()

    def silence(self) -> None:
        """From now on nothing passes and nobody is told."""

        async def hole() -> None:
            self.proxy.hole()

        self.do(hole())


@dataclass(slots=True)
class Seen:
    """One run from outside; seconds since the fault was over, where not said otherwise."""

    framework: str
    version: str
    fault: str
    verdict: str = ""
    took_s: float = 0.0
    """From the run's begin to its end, or to when nobody watched any more."""
    rounds: float = 0.0
    """Sum of the ledger: what the global model holds, 1 for each full round."""
    trained: list[int] = dataclasses.field(default_factory=list)
    """Finished trainings of each site."""
    counted: list[int] = dataclasses.field(default_factory=list)
    """Updates of each site in the last global model."""
    ledger: list[float] = dataclasses.field(default_factory=list)
    """What they weigh in it."""
    up_mb: float = 0.0
    """Over the link of site 1, from it."""
    down_mb: float = 0.0
    moving_s: float | None = None
    """Until the first 100 kB of site 1 passed again; for a killed server, from its restart."""
    round_s: float | None = None
    """Until a site received a newer model; negative when rounds went on during the fault."""
    site_1_s: float | None = None
    """Until site 1 received a newer model."""
    during: int = 0
    """Newer models received during the fault by the other sites."""
    load: float = 0.0
    """The machine's load over the last minute when the fault struck; over the number of cores, times say little."""
    killed: int = 0
    """Processes."""


def make(variant: str, work: Work, stage: Stage) -> Framework:
    """The framework of that name."""
    match variant:
        case "mailboat":
            return Mailboat(work, stage)
        case "mailboat, quorum 3":
            return Mailboat(work, stage, quorum=SITES)
        case "flower":
            return Flower(work, stage)
        case "flower, --database":
            return Flower(work, stage, database=True)
        case "flare":
            return Flare(work, stage)
    raise AssertionError(variant)


def version(variant: str) -> str:
    """The framework's release."""
    name = variant.partition(",")[0]
    return "this tree" if name == "mailboat" else version_of(name)


class Scene:
    """One run of one framework with one fault."""

    def __init__(self, work: Work, framework: Framework, link: Link, seen: Seen, outage_s: float) -> None:
        self._outage_s = outage_s
        self._work, self._framework, self._link, self._seen = work, framework, link, seen
        self._struck_at = self._over_at = 0.0
        self._moving_at: float | None = None

    def play(self) -> None:
        """Start everything, strike, and watch until the end."""
        self._framework.start_server()
        for number in range(1, self._work.sites + 1):
            self._framework.start_site(number, self._link.proxy.port if number == 1 else self._framework.port)
        self._framework.begin()
        began = time.time()
        if self._seen.fault != "none":
            self._await_upload()
            self._say("strikes")
            self._strike()
            self._say("is over")
        self._watch()
        self._seen.took_s = round(time.time() - began, 1)
        self._sum_up()

    def _await_upload(self) -> None:
        """Return in mid-upload of site 1, of its second update or, if this process looked too late, a later one."""
        traffic, enough = self._link.proxy.traffic, STRUCK_AT * self._work.model_bytes
        for number in range(2, self._work.rounds):
            until(lambda number=number: self._trained(1) >= number, "a training of site 1", TRAINING_S)
            mark = traffic.up
            until(
                lambda number=number, mark=mark: traffic.up - mark >= enough or self._trained(1) > number,
                "an upload of site 1",
                TRAINING_S,
            )
            if traffic.up - mark >= enough and self._trained(1) == number:
                return
        raise AssertionError("no upload was seen in time")

    def _trained(self, site: int) -> int:
        noted = events(Path(self._work.root))
        return sum(event["what"] == "trained" and event["who"] == f"site-{site}" for event in noted)

    def _strike(self) -> None:
        self._struck_at = time.time()
        self._seen.load = round(os.getloadavg()[0], 1)
        match self._seen.fault:
            case "link down":
                self._link.do(self._link.proxy.down())
                time.sleep(self._outage_s)
                self._link.do(self._link.proxy.up())
            case "link silent":
                self._link.silence()
                time.sleep(self._outage_s)
                self._link.do(self._link.proxy.heal())
            case "server killed":
                self._seen.killed = len(self._framework.kill_server())
                time.sleep(RESTART_S)
                if not self._framework.is_unattended():
                    self._framework.start_server()
            case "site killed":
                self._seen.killed = len(self._framework.kill_site(1))
                time.sleep(RESTART_S)
                if not self._framework.is_unattended():
                    self._framework.start_site(1, self._link.proxy.port)
        self._over_at = time.time()

    def _watch(self) -> None:
        mark, moved_at, noted, asked_at, strange = self._link.proxy.traffic.up, time.time(), 0, 0.0, 0
        while time.time() - moved_at < SILENCE_S:
            time.sleep(LOOK_S)
            if self._moving_at is None and self._link.proxy.traffic.up - mark > 100_000:
                self._moving_at = time.time()
            now = len(events(Path(self._work.root)))
            if now != noted:
                noted, moved_at = now, time.time()
            if time.time() - asked_at > ASK_S:
                asked_at = time.time()
                self._seen.verdict = self._framework.verdict()
                strange = strange + 1 if self._seen.verdict.startswith(UNKNOWN) else 0
                if self._seen.verdict != "running" and strange in {0, STRANGE_MAX}:
                    return
        self._seen.verdict = f"{self._seen.verdict}; no progress for {SILENCE_S:.0f} s, watched no longer"

    def _sum_up(self) -> None:
        seen, noted = self._seen, events(Path(self._work.root))
        seen.trained = [self._trained(site) for site in range(1, self._work.sites + 1)]
        seen.counted = self._framework.counted()
        seen.ledger = self._framework.final() or []
        seen.rounds = round(sum(seen.ledger), 2)
        seen.up_mb = round(self._link.proxy.traffic.up / 1e6, 1)
        seen.down_mb = round(self._link.proxy.traffic.down / 1e6, 1)
        if seen.fault == "none":
            return
        received = [event for event in noted if event["what"] == "received"]
        newest = max((sum(event["ledger"]) for event in received if event["at"] < self._struck_at), default=0.0)
        newer = [event for event in received if event["at"] > self._struck_at and sum(event["ledger"]) > newest]
        seen.during = len([event for event in newer if event["at"] < self._over_at])
        seen.moving_s = _since(self._over_at, [self._moving_at] if self._moving_at else [])
        seen.round_s = _since(self._over_at, [event["at"] for event in newer])
        seen.site_1_s = _since(self._over_at, [event["at"] for event in newer if event["who"] == "site-1"])

    def _say(self, what: str) -> None:
        sys.stdout.write(f"{time.strftime('%H:%M:%S')} {self._seen.framework}: {self._seen.fault} {what}\n")
        sys.stdout.flush()


def _since(begin: float, times: list[float]) -> float | None:
    return round(min(times) - begin, 1) if times else None


def run(variant: str, fault: str, options: argparse.Namespace) -> Seen:
    """One run in a folder of its own, which is kept when `--keep` names a place for the logs."""
    root = Path(tempfile.mkdtemp(prefix="mailboat-peers-", dir=options.folder))
    work = Work(str(root), SITES, round(options.mb * 250_000), 12, options.rounds, options.training)
    work.save()
    seen = Seen(variant, version(variant), fault)
    try:
        with Stage(root, environment(work), look_s=LOOK_S) as stage:
            framework = make(variant, work, stage)
            with Link(framework.port, options.mbit) as link:
                Scene(work, framework, link, seen, options.outage).play()
    finally:
        if options.keep is not None:
            kept = options.keep / f"{variant.replace(', ', '-')}-{fault.replace(' ', '-')}"
            shutil.copytree(root, kept, ignore=_heavy, dirs_exist_ok=True)
        shutil.rmtree(root)
    return seen


def _heavy(folder: str, names: list[str]) -> list[str]:
    """What is no log: files over 4 MB, sockets, and Python's own."""
    return [
        name
        for name in names
        if not (path := Path(folder) / name).is_dir() and (not path.is_file() or path.stat().st_size > 4_000_000)
    ]


def keep(path: Path, settings: dict[str, Any], seen: Seen) -> None:
    """Write this run into the file, in the place of an earlier one of its kind; others may do so at the same time."""
    with path.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        found = merged(json.loads(file.read() or "{}"), settings, seen)
        file.truncate(0)
        file.write(json.dumps(found, indent=1) + "\n")


def merged(found: dict[str, Any], settings: dict[str, Any], seen: Seen) -> dict[str, Any]:
    """The content of the file with this run in it."""
    runs = [one for one in found.get("runs", []) if (one["framework"], one["fault"]) != (seen.framework, seen.fault)]
    runs.append(dataclasses.asdict(seen))
    runs.sort(key=lambda one: (FAULTS.index(one["fault"]), VARIANTS.index(one["framework"])))
    return {"machine": machine(), "settings": settings, "remarks": found.get("remarks", []), "runs": runs}


def main() -> int:
    """One run after the other."""
    parser = argparse.ArgumentParser(prog="python -m bench.peers.faults", description=__doc__.partition("\n")[0])
    parser.add_argument("--frameworks", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--mb", type=float, default=24.0, help="megabytes of the model as float32")
    parser.add_argument("--mbit", type=float, default=16.0, help="rate of the link of site 1, each way")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--training", type=float, default=60.0, help="seconds that one training is made to take")
    parser.add_argument("--outage", type=float, default=240.0, help="seconds that the link is cut")
    parser.add_argument("--folder", type=Path, help="where the runs' folders stand while they run")
    parser.add_argument("--keep", type=Path, help="keep the logs of each run here")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was started is ended
    if not isolate():
        sys.stderr.write("not root: ports 1883, 8000, 8002 and 9101 to 9103 must be free\n")
    settings = {
        "sites": SITES,
        **{key: getattr(options, key) for key in ("mb", "mbit", "rounds", "training", "outage")},
        "restart_s": RESTART_S,
    }
    for fault in options.faults:
        for variant in options.frameworks:
            seen = run(variant, fault, options)
            sys.stdout.write(json.dumps(dataclasses.asdict(seen)) + "\n")
            if options.json is not None:
                keep(options.json, settings, seen)
    return 0


if __name__ == "__main__":
    sys.exit(main())
