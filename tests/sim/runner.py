"""Many worlds, on all cores: python -m tests.sim --seeds 100000; one again, told step by step: --seed 7 --trace."""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice

from tests.sim.disk import KilledError
from tests.sim.weather import scenario
from tests.sim.world import run_world

CHUNK = 25
REPORT_S = 10.0


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


def try_seed(seed: int) -> Failure | None:
    """Run one world; None when it held."""
    try:
        run_world(seed)
    except (Exception, KilledError) as error:  # noqa: BLE001 - whatever breaks a world is a finding, and is reported
        last = traceback.extract_tb(error.__traceback__)[-1]
        return Failure(seed, f"{type(error).__name__}: {error}", f"{last.filename}:{last.lineno}")
    return None


def first_failure(seeds: range) -> Failure | None:
    """Run worlds until one fails."""
    return next((failure for seed in seeds if (failure := try_seed(seed)) is not None), None)


def run_many(seeds: range, workers: int) -> tuple[int, Failure | None]:
    """Run worlds in `workers` processes until one fails; returns how many were done, and the failure."""
    done, last, waiting = 0, time.monotonic(), set[Future[Failure | None]]()
    chunks: Iterator[range] = (seeds[at : at + CHUNK] for at in range(0, len(seeds), CHUNK))
    sizes: dict[Future[Failure | None], int] = {}
    with ProcessPoolExecutor(workers) as pool:
        while True:
            for chunk in islice(chunks, 3 * workers - len(waiting)):
                future = pool.submit(first_failure, chunk)
                sizes[future] = len(chunk)
                waiting.add(future)
            if not waiting:
                return done, None
            ended, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in ended:
                failure = future.result()
                if failure is not None:
                    pool.shutdown(cancel_futures=True)
                    return done, failure
                done += sizes.pop(future)
            if time.monotonic() - last > REPORT_S:
                last = time.monotonic()
                print(f"[sim] {done} of {len(seeds)} worlds held", flush=True)  # noqa: T201 - a command's progress


def main() -> None:
    """The command line; exit status 1 when a world failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seeds", type=int, default=2000, help="how many worlds")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, help="run this world alone")
    parser.add_argument("--trace", action="store_true", help="tell what happens in it")
    chosen = parser.parse_args()
    if chosen.seed is not None:
        print(scenario(chosen.seed))  # noqa: T201
        world = run_world(chosen.seed, print if chosen.trace else None)
        print(f"[sim] seed {chosen.seed} held; digest {world.broker.digest:08x}")  # noqa: T201
        return
    started = time.monotonic()
    done, failure = run_many(range(chosen.first, chosen.first + chosen.seeds), chosen.workers)
    if failure is not None:
        sys.exit(f"[sim] {failure}")
    print(f"[sim] {done} worlds held, {done / (time.monotonic() - started):.1f} a second")  # noqa: T201
