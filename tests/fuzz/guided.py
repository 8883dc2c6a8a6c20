"""One decoder fuzzed by coverage, with atheris: `python -m tests.fuzz.guided TARGET CORPUS [-runs=N ...]`.

libFuzzer keeps the inputs that reach new lines in the folder CORPUS, which begins with the target's sound samples, and
mutates them further, half of the time with the target's own mutation, which keeps their structure. What counts as a
finding is what counts in `python -m tests.fuzz`; it is written to the current folder, to be given as CORPUS again.
atheris is no dependency of the tests: `make fuzz-guided TARGET=manifest` installs it.
"""

from __future__ import annotations

import hashlib
import random
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["shared", "coordinator", "broker", "mailboat"]):
    from shared.errors import MailboatError
    from tests.fuzz.target import Target
    from tests.fuzz.targets import TARGETS

HANG_S = 10
MEMORY_MIB = 2048
"""atheris counts what its own tables take as well."""
INPUT_MAX = 65536


def _fuzz(target: Target, arguments: list[str]) -> None:
    def run(data: bytes) -> None:
        try:
            target.run(data)
        except MailboatError:
            return

    def mutate(data: bytes, size_max: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.random() < 0.5:
            return bytes(atheris.Mutate(data, size_max))
        try:
            return target.mutate(data, rng)[:size_max]
        except (ValueError, TypeError, KeyError, IndexError, RecursionError):  # its structure is gone
            return bytes(atheris.Mutate(data, size_max))

    bounds = [f"-timeout={HANG_S}", f"-rss_limit_mb={MEMORY_MIB}", f"-max_len={INPUT_MAX}"]
    atheris.Setup([sys.argv[0], *bounds, *arguments], run, custom_mutator=mutate)
    atheris.Fuzz()


def main() -> None:
    """Seed the corpus, and fuzz until libFuzzer ends."""
    if len(sys.argv) < 3 or sys.argv[1] not in TARGETS:
        sys.stderr.write(f"usage: python -m tests.fuzz.guided TARGET CORPUS [-runs=N]; targets: {', '.join(TARGETS)}\n")
        sys.exit(2)
    target, corpus = TARGETS[sys.argv[1]], Path(sys.argv[2])
    corpus.mkdir(parents=True, exist_ok=True)
    for sample in target.samples:
        (corpus / hashlib.sha256(sample).hexdigest()[:40]).write_bytes(sample)
    _fuzz(target, [str(corpus), *sys.argv[3:]])


if __name__ == "__main__":
    main()
