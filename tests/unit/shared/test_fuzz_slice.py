"""A slice of the fuzz campaign: every decoder of foreign bytes, a few thousand spoilt inputs, always the same."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from shared.errors import MailboatError
from tests.fuzz.__main__ import execute, input_of
from tests.fuzz.target import Target
from tests.fuzz.targets import TARGETS

ROOT = Path(__file__).parents[3]
RUNS = 4000
"""Over all targets, by their shares: some seconds."""


@pytest.mark.parametrize("name", TARGETS)
def test_spoilt_bytes_are_refused_and_never_crash(name: str) -> None:
    """Whatever the bytes, the decoder returns or raises an error of the project's own, in bounded time."""
    target = TARGETS[name]
    count = max(20, RUNS * target.share // sum(each.share for each in TARGETS.values()))
    found = [(number, told) for number in range(count) if (told := execute(target, input_of(target, 1, number)))]
    assert found == [], f"again: python -m tests.fuzz --target {name} --seed 1 --only {found[0][0]}"


DIGEST = """
import hashlib
from tests.fuzz.__main__ import input_of
from tests.fuzz.targets import TARGETS
for name, target in TARGETS.items():
    print(name, hashlib.sha256(b"".join(input_of(target, 1, number) for number in range(20))).hexdigest())
"""


def test_an_input_is_the_same_in_any_process() -> None:
    """What was found is found again: no key that is drawn anew, and no order of a set, has a part in it."""
    told = []
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-c", DIGEST]
        told.append(
            subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
        )
    assert told[0].splitlines() == told[1].splitlines()
    assert len(told[0].splitlines()) == len(TARGETS)


@pytest.mark.parametrize("name", TARGETS)
def test_the_samples_are_sound(name: str) -> None:
    """What is mutated gets in deep: the sample itself is taken, or refused for a reason behind its structure."""
    target = TARGETS[name]
    rules = set()
    for sample in target.samples:
        try:
            target.run(sample)
        except MailboatError as error:
            rules.add(getattr(error, "rule", ""))
    assert rules & {"bad-envelope", "bad-message", "bad-manifest", "header-json", "bad-document", "bad-chunk"} == set()


def test_a_decoder_that_crashes_is_found() -> None:
    """An error of a library, one that nobody declared, is told with its place."""

    def careless(data: bytes) -> None:
        if data[:1] != b"{":
            raise KeyError("t")

    target = Target("careless", [b"{}"], lambda data, rng: rng.randbytes(1) + data, careless)
    told = [execute(target, input_of(target, 0, number)) for number in range(5)]
    assert any(each and "KeyError" in each for each in told)
    assert random.Random("a").random() == random.Random("a").random()
