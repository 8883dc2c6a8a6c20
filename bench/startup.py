"""Start-up: how long each command takes to say what it is for, and a coordinator to announce its first version.

    make bench-startup

`mailboat X --help` for every command, each run a fresh interpreter, rounds in turns; seconds are from the start of the
process to its end, memory is the most that it held. A coordinator is timed from its start, on a plan that was sealed
before, to its word that version 0 is announced over a real Mosquitto.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from bench.peers.stage import processor_s
from bench.protocol import coordinating, machine, make_load, peak_bytes
from broker.launcher import run_broker
from mailboat import cli

_HELP = """
import runpy, sys
sys.argv = ["mailboat", *sys.argv[1:], "--help"]
try:
    runpy.run_module("mailboat", run_name="__main__", alter_sys=True)
except SystemExit:
    pass
status = open("/proc/self/status").read()
sys.stderr.write(status.partition("VmHWM:")[2].split()[0])
"""
MEGABYTES = 8.0
"""Of the version that the coordinator announces; its size decides how long it takes to be read and hashed."""


Run = tuple[float, float, int]
"""Seconds, processor seconds, peak bytes."""


def commands() -> list[tuple[str, ...]]:
    """Every command, as the words after `mailboat`; the first is the program itself."""

    def walk(command: Any, words: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        yield words
        for name, each in sorted(getattr(command, "commands", {}).items()):
            yield from walk(each, (*words, name))

    return list(walk(typer.main.get_command(cli.app), ()))


def help_once(words: tuple[str, ...]) -> Run:
    """One `mailboat WORDS --help`."""
    began, worked = time.monotonic(), _children_s()
    done = subprocess.run(
        [sys.executable, "-c", _HELP, *words], check=True, capture_output=True, text=True, env=dict(os.environ)
    )
    return time.monotonic() - began, _children_s() - worked, 1024 * int(done.stderr.split()[-1])


async def announce_once(root: Path) -> Run:
    """One coordinator until it has announced version 0; the broker's start is not in it."""
    make_load(root, MEGABYTES, 'mode = "fedbuff"\nbuffer = 2')
    async with run_broker("mosquitto", root / "mosquitto") as broker:
        began = time.monotonic()
        async with coordinating(root, broker.url) as coordinator:
            return time.monotonic() - began, processor_s(coordinator), peak_bytes(coordinator)


def _children_s() -> float:
    """Processor seconds of all children that have ended."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.startup", description=__doc__)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found: dict[str, list[Run]] = {}
    for _ in range(options.turns):
        for words in commands():
            found.setdefault(" ".join(["mailboat", *words]), []).append(help_once(words))
        with tempfile.TemporaryDirectory(prefix="mailboat-startup-") as folder:
            found.setdefault("first announcement", []).append(asyncio.run(announce_once(Path(folder))))
    told = {what: _row(runs) for what, runs in found.items()}
    for what, row in sorted(told.items(), key=lambda entry: -entry[1]["median_s"]):
        print(f"{what:40s} {row['median_s']:7.3f} s  {row['processor_s']:7.3f} s  {row['peak_mb']:6.1f} MB")
    if options.json:
        result = {"machine": machine(), "turns": options.turns, "found": told}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def _row(runs: list[Run]) -> dict[str, float]:
    seconds, worked, sizes = zip(*runs, strict=True)
    return {
        "median_s": round(statistics.median(seconds), 3),
        "least_s": round(min(seconds), 3),
        "processor_s": round(min(worked), 3),
        "peak_mb": round(max(sizes) / 1e6, 1),
    }


if __name__ == "__main__":
    main()
