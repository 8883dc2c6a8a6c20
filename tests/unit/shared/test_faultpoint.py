"""Commit points: inert unless asked for, deadly when asked for, and all in their places."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from shared import faultpoint
from shared.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]
PASSAGES = """
from shared.faultpoint import passing
for number in range(1, 4):
    passing("seal.before")
    passing("seal.after")
    print(number, flush=True)
"""


@pytest.mark.parametrize(
    ("wanted", "status", "said"),
    [
        (None, 0, "1 2 3"),
        ("seal.middle:1", 0, "1 2 3"),
        ("seal.before:1", -signal.SIGKILL, ""),
        ("seal.after:3", -signal.SIGKILL, "1 2"),
        ("seal.after:4", 0, "1 2 3"),
    ],
)
def test_a_process_dies_at_the_passage_that_was_named(wanted: str | None, status: int, said: str) -> None:
    """Without the variable nothing happens; with it, the named passage of the named point is the last thing done."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop(faultpoint.VARIABLE, None)
    if wanted is not None:
        environment[faultpoint.VARIABLE] = wanted
    done = subprocess.run(
        [sys.executable, "-c", PASSAGES], env=environment, check=False, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout.split()) == (status, said.split())


@pytest.mark.parametrize("text", ["seal:1", "seal.before", "seal.before:0", "seal.before:-1", "seal.before:x", ":1"])
def test_a_point_that_is_none_is_refused(text: str) -> None:
    """A misspelt variable is an error, not a test that never strikes."""
    with pytest.raises(ConfigError, match=faultpoint.VARIABLE):
        faultpoint.parse(text)


def test_this_process_has_no_fuse() -> None:
    """Tests and production run without."""
    assert faultpoint.parse(None) is None
    assert faultpoint.parse("") is None
    faultpoint.passing("seal.before")


def test_every_point_has_its_place() -> None:
    """Each registered point is passed in the sources, and what is passed there is registered."""
    sources = [path for package in ("coordinator", "edge_client", "shared") for path in (ROOT / package).rglob("*.py")]
    written = {
        found[1]
        for path in sources
        if path.name != "faultpoint.py"
        for found in re.finditer(r'passing\(f?"([^"]+)"\)', path.read_text())
    }
    patterns = [re.sub(r"\\{[^}]*\\}", "[a-z]+", re.escape(text)) for text in written]
    registered = {*faultpoint.BOTH, *faultpoint.COORDINATOR, *faultpoint.SITE}
    for point in registered:
        assert any(re.fullmatch(pattern, point) for pattern in patterns), point
    for pattern in patterns:
        assert any(re.fullmatch(pattern, point) for point in registered), pattern
