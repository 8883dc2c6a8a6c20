"""`python -m tests.fuzz --runs 100000`: spoilt bytes into every decoder, from a seed, with bounds on time and memory.

    crash    an error that is not the project's own
    hang     more than HANG_S seconds of processor time for one input
    memory   the process grew beyond MEMORY_MIB

A finding is printed with target, seed and number, and `--target T --seed S --only N` does it again.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from shared.errors import MailboatError
from tests.fuzz.target import Target
from tests.fuzz.targets import TARGETS

HANG_S = 2.0
MEMORY_MIB = 512


class HangError(BaseException):
    """One input took too long; no handler of ordinary errors may catch it."""


def input_of(target: Target, seed: int, number: int) -> bytes:
    """The bytes of one execution; the same for the same three."""
    rng = random.Random(f"{target.name}/{seed}/{number}")
    data = rng.choice(target.samples)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        try:
            data = target.mutate(data, rng)
        except (
            ValueError,
            TypeError,
            KeyError,
            IndexError,
            RecursionError,
        ):  # spoilt so far that its structure is gone
            break
    return data


def execute(target: Target, data: bytes) -> str | None:
    """Run one input; the finding, or None."""
    signal.signal(signal.SIGVTALRM, _hang)
    signal.setitimer(signal.ITIMER_VIRTUAL, HANG_S)
    try:
        target.run(data)
    except MailboatError:
        return None
    except HangError:
        return "hang"
    except BaseException:  # noqa: BLE001 - whatever it is, it is what we look for
        return traceback.format_exc(limit=-4)
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    return None


def campaign(runs: int, seed: int, names: list[str]) -> Iterator[tuple[Target, int, str]]:
    """Execute `runs` inputs over all targets by their shares, and yield each finding; stops when memory is exceeded."""
    weights = [TARGETS[name].share for name in names]
    for name, weight in zip(names, weights, strict=True):
        target = TARGETS[name]
        for number in range(max(1, runs * weight // sum(weights))):
            told = execute(target, input_of(target, seed, number))
            if told is not None:
                yield target, number, told
        if peak_mib() > MEMORY_MIB:
            yield target, 0, f"memory: {peak_mib():.0f} MiB at its peak, the bound is {MEMORY_MIB}"
            return


def peak_mib() -> float:
    """The most memory that this process ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _hang(_signal: int, _frame: FrameType | None) -> None:
    raise HangError


def main(arguments: list[str] | None = None) -> int:
    """Return 0 when nothing was found, else 1."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", choices=sorted(TARGETS), action="append")
    parser.add_argument("--only", type=int, help="the number of one execution, to do it again")
    parser.add_argument("--json", type=Path, help="add a line with what was executed to this file")
    given = parser.parse_args(arguments)
    names = given.target or list(TARGETS)
    began, found = time.monotonic(), 0
    if given.only is not None:
        data = input_of(TARGETS[names[0]], given.seed, given.only)
        sys.stdout.write(f"{data[:2000]!r}\n{execute(TARGETS[names[0]], data) or 'nothing'}\n")
        return 0
    for target, number, told in campaign(given.runs, given.seed, names):
        found += 1
        sys.stdout.write(f"[fuzz] {target.name} --seed {given.seed} --only {number}\n{told}\n")
        sys.stdout.flush()
        if found >= 20:
            break
    took = time.monotonic() - began
    done: dict[str, Any] = {
        "runs": given.runs,
        "seed": given.seed,
        "found": found,
        "seconds": round(took, 1),
        "processor_s": round(time.process_time(), 1),
        "peak_mib": round(peak_mib()),
    }
    sys.stdout.write(f"[fuzz] {json.dumps(done)}\n")
    if given.json is not None:
        with given.json.open("a") as file:
            file.write(json.dumps(done) + "\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
