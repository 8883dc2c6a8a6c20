"""The round benchmark runs, and its ledger comes out right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from broker.launcher import find_mosquitto

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="a network of its own needs root; elsewhere its port may be taken"),
    pytest.mark.skipif(find_mosquitto() is None, reason="Mosquitto is not installed"),
]


ROUNDS = 30
"""Of a tenth of a second or less."""


@pytest.mark.timeout(300)
def test_a_small_round_is_measured(tmp_path: Path) -> None:
    """Two sites, open and sealed: time, bytes and memory are there, and every update went in once.

    So many rounds of a few megabytes that what is counted between the first and the last takes far longer than a look.
    """
    found = tmp_path / "round.json"
    words = [
        "--runs",
        "mailboat bf16",
        "mailboat bf16 sealed",
        "--parameters",
        "1.2",
        "--sites",
        "2",
        "--rounds",
        str(ROUNDS),
    ]
    words += ["--tmpfs", str(tmp_path), "--json", str(found)]
    done = subprocess.run(
        [sys.executable, "-m", "bench.round", *words], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(found.read_text())
    assert [run["run"] for run in told["runs"]] == ["mailboat bf16", "mailboat bf16 sealed"]
    assert told["ratios"]["mailboat bf16 sealed / mailboat bf16, tmpfs"] > 0
    for run in told["runs"]:
        assert len(run["seconds"]) == ROUNDS
        assert min(run["seconds"]) > 0
        assert 1.5 < run["wire_mb"]["update"] < 2.4  # bfloat16 of 1.2 M values, compressed
        assert run["loopback_mb"] > 0
        assert run["server_mb"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["round.json"]
