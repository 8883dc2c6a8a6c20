"""Many worlds over hours: what was run so far stands in a file, so that a stop loses nothing and a result is complete.

A campaign belongs to one commit. Seeds are given to the workers in ranges; after each range the file is replaced, and
the next start leaves out what it says is done. A failing seed is written down and the campaign goes on, until there are
too many of them to be chance.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import structlog

from tests.sim.disk import KilledError
from tests.sim.weather import scenario
from tests.sim.world import World, run_world

RANGE = 50
REPORT_S = 30.0
FAILURES_MAX = 20
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Failure:
    """A seed whose world broke a promise, or broke down."""

    seed: int
    what: str
    where: str

    def __str__(self) -> str:
        return f"seed {self.seed}: {self.what}\n  {self.where}\n  {scenario(self.seed)}\n  replay: {replay(self.seed)}"


def replay(seed: int) -> str:
    """The command that runs one world again, exactly."""
    return f"python -m tests.sim --seed {seed} --trace"


def try_seed(seed: int) -> Failure | World:
    """Run one world; the world itself when it held."""
    try:
        return run_world(seed)
    except (Exception, KilledError) as error:  # noqa: BLE001 - whatever breaks a world is a finding, and is reported
        last = traceback.extract_tb(error.__traceback__)[-1]
        return Failure(seed, f"{type(error).__name__}: {error}", f"{last.filename}:{last.lineno}")


@dataclass(slots=True)
class Result:
    """What came of some worlds; `ranges` are the seeds that were run, first and last, in order."""

    commit: str
    ranges: list[tuple[int, int]] = field(default_factory=list)
    worlds: Counter[str] = field(default_factory=Counter)
    """By closing rule."""
    faults: Counter[str] = field(default_factory=Counter)
    versions: int = 0
    updates: Counter[str] = field(default_factory=Counter)
    """By what became of them; those whose site went away for ever may have no outcome."""
    cpu_s: float = 0.0
    virtual_s: float = 0.0
    failures: list[Failure] = field(default_factory=list)

    @property
    def count(self) -> int:
        """Worlds that were run."""
        return sum(last - first + 1 for first, last in self.ranges)

    def take(self, other: Result) -> None:
        """Add what came of other worlds."""
        assert other.commit == self.commit, "worlds of one commit"
        self.ranges = _joined([*self.ranges, *other.ranges])
        for mine, others in (
            (self.worlds, other.worlds),
            (self.faults, other.faults),
            (self.updates, other.updates),
        ):
            mine.update(others)
        self.versions += other.versions
        self.cpu_s += other.cpu_s
        self.virtual_s += other.virtual_s
        self.failures = sorted([*self.failures, *other.failures], key=lambda failure: failure.seed)

    def plain(self) -> dict[str, Any]:
        """JSON-able values."""
        return {
            "commit": self.commit,
            "ranges": self.ranges,
            "worlds": dict(sorted(self.worlds.items())),
            "versions": self.versions,
            "updates": dict(sorted(self.updates.items())),
            "faults": dict(sorted(self.faults.items())),
            "virtual_s": round(self.virtual_s),
            "cpu_s": round(self.cpu_s, 1),
            "failures": [asdict(failure) for failure in self.failures],
        }


def from_plain(told: dict[str, Any]) -> Result:
    """Inverse of `Result.plain`."""
    return Result(
        commit=told["commit"],
        ranges=[(first, last) for first, last in told["ranges"]],
        worlds=Counter(told["worlds"]),
        faults=Counter(told["faults"]),
        versions=told["versions"],
        updates=Counter(told["updates"]),
        cpu_s=told["cpu_s"],
        virtual_s=told["virtual_s"],
        failures=[Failure(**failure) for failure in told["failures"]],
    )


def _joined(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if joined and first == joined[-1][1] + 1:
            joined[-1] = (joined[-1][0], last)
        else:
            joined.append((first, last))
    return joined


@contextlib.contextmanager
def many_worlds() -> Iterator[None]:
    """Look for no cycles while worlds run, a tenth of their time, and leave the log to what is an error."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.collect()
        structlog.reset_defaults()


def run_range(commit: str, first: int, last: int) -> Result:
    """Run the worlds of some seeds in a row, `last` included."""
    result, began = Result(commit), time.process_time()
    with many_worlds():
        for seed in range(first, last + 1):
            plan = scenario(seed)
            stepped = plan.federation.codec.steps > 0
            result.worlds[f"{plan.federation.aggregation.mode}{', sealed' * plan.sealed}{', steps' * stepped}"] += 1
            ended = try_seed(seed)
            if isinstance(ended, Failure):
                result.failures.append(ended)
                continue
            result.faults.update(ended.faults)
            result.versions += ended.witness.version
            result.updates.update(ended.witness.outcomes)
            result.virtual_s += ended.clock.now
    result.ranges = [(first, last)]
    result.cpu_s = time.process_time() - began
    return result


def open_ranges(seeds: range, done: list[tuple[int, int]], size: int = RANGE) -> Iterator[tuple[int, int]]:
    """Ranges of at most `size` of the seeds that are in none of the ranges `done`."""
    at = seeds.start
    for first, last in [*_joined(done), (seeds.stop, seeds.stop)]:
        while at < min(first, seeds.stop):
            upto = min(at + size, first, seeds.stop)
            yield at, upto - 1
            at = upto
        at = max(at, last + 1)


def current_commit() -> str:
    """The commit of this checkout, with a word about changes that are in no commit."""
    git = shutil.which("git")

    def asked(*words: str) -> str:
        return subprocess.run([git or "", *words], cwd=ROOT, check=False, capture_output=True, text=True).stdout.strip()

    if git is None or not (commit := asked("rev-parse", "HEAD")):
        return "unknown"
    return f"{commit} and changes" if asked("status", "--porcelain") else commit


def load(path: Path, commit: str) -> Result:
    """The campaign in a file, or a new one; SystemExit when the file belongs to another commit."""
    if not path.exists():
        return Result(commit)
    result = from_plain(json.loads(path.read_bytes()))
    if result.commit != commit:
        sys.exit(f"[sim] {path} is a campaign of commit {result.commit}, this is {commit}; move it away to begin anew")
    return result


def save(path: Path, told: dict[str, Any]) -> None:
    """Replace a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.new")
    temporary.write_text(json.dumps(told, indent=1) + "\n")
    temporary.replace(path)


def run(seeds: Sequence[range], workers: int, path: Path, commit: str) -> Result:
    """Run what is not done of `seeds`; SIGINT ends it, and the next call goes on."""
    result = load(path, commit)
    todo = chain.from_iterable([open_ranges(some, result.ranges) for some in seeds])
    told_at, waiting = time.monotonic(), set[Future[Result]]()
    _say(f"{result.count} worlds are done in {path}; commit {commit}, {workers} workers")
    with ProcessPoolExecutor(workers) as pool:
        try:
            while True:
                waiting |= {pool.submit(run_range, commit, *each) for each in islice(todo, 2 * workers - len(waiting))}
                if not waiting or len(result.failures) >= FAILURES_MAX:
                    break
                ended, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in ended:
                    some = future.result()
                    for failure in some.failures:
                        _say(str(failure))
                    result.take(some)
                save(path, result.plain())
                if time.monotonic() - told_at > REPORT_S:
                    told_at = time.monotonic()
                    _say(_standing(result))
        finally:
            pool.shutdown(cancel_futures=True)
    _say(_standing(result))
    return result


def published(result: Result) -> dict[str, Any]:
    """The result as docs/results keeps it."""
    return {
        "machine": {
            "date": time.strftime("%Y-%m-%d"),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.release()}",
        },
        **result.plain(),
    }


def _standing(result: Result) -> str:
    seeds = ", ".join(f"{first} to {last}" for first, last in result.ranges[:4])
    each = 1000 * result.cpu_s / max(1, result.count)
    return (
        f"{result.count} worlds, {len(result.failures)} failed; {result.cpu_s:.0f} CPU s, {each:.0f} ms each; "
        f"seeds {seeds}{' ...' if len(result.ranges) > 4 else ''}"
    )


def _say(words: str) -> None:
    print(f"[sim] {time.strftime('%H:%M:%S')} {words}", flush=True)  # noqa: T201 - a command's progress
