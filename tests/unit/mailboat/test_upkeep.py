"""Memory of a process that runs for long, in processes of their own: what is set holds for all that follows."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

ROUNDS = 200
FAULTS = """
import resource, sys
from concurrent.futures import ThreadPoolExecutor
from mailboat import upkeep

if sys.argv[1] == "settled":
    upkeep.settle_in()


def blocks() -> None:
    held = [bytearray(b"1") * 524_288 for _ in range(6)]
    del held


def faults() -> int:
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    for _ in range(int(sys.argv[2])):
        blocks()
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before


with ThreadPoolExecutor(1) as thread:
    thread.submit(faults).result()
    print(thread.submit(faults).result())
"""


def _run(program: str, *arguments: str) -> str:
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_what_was_freed_is_handed_out_again() -> None:
    """A thread that takes and frees the same blocks again and again asks the kernel for no more pages."""
    assert int(_run(FAULTS, "settled", str(ROUNDS))) < ROUNDS
    assert int(_run(FAULTS, "as it comes", str(ROUNDS))) > 100 * ROUNDS  # else there is nothing to settle any more


def test_modules_are_not_looked_at_again() -> None:
    """What was imported is out of the collector's sight; what comes later is not."""
    program = (
        "import gc\nfrom mailboat import upkeep\nbefore = len(gc.get_objects())\nupkeep.settle_in()\n"
        "later = [[]]\nprint(gc.get_freeze_count() >= before, any(each is later for each in gc.get_objects()))"
    )
    assert _run(program) == "True True\n"
