"""What the comparison with other frameworks reads out of models and processes."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from bench.peers.frameworks import steps
from bench.peers.stage import Stage, descendants, memory_bytes
from bench.peers.work import VARIABLE, Work, events, load


def make_work(root: Path, *, sites: int = 2) -> Work:
    """A small work whose files are there."""
    work = Work(str(root), sites, 24, 3, 4, 0.0)
    work.save()
    return work


def test_only_a_sites_own_ledger_grows_by_one(tmp_path: Path) -> None:
    """Training at site 2 adds 1 to the second value, nothing to the first, and the same noise as everybody's."""
    work = make_work(tmp_path)
    first, second = work.delta(1), work.delta(2)
    assert work.ledger(work.initial()[0]) == [0.0, 0.0]
    assert work.ledger(second[0]) == [0.0, 1.0]
    assert np.array_equal(first[0, 2:], second[0, 2:])
    assert np.array_equal(first[1:], second[1:])
    assert first[1:].all()


def test_a_process_finds_the_work_by_its_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was saved is what is loaded."""
    work = make_work(tmp_path)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "work.json"))
    assert load() == work


def test_events_come_in_order_of_time(tmp_path: Path) -> None:
    """Processes write when they get to it; the order is that of the clock."""
    lines = [{"at": 2.0, "who": "b", "what": "x"}, {"at": 1.0, "who": "a", "what": "x"}]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [event["who"] for event in events(tmp_path)] == ["a", "b"]


def test_updates_are_counted_by_the_steps_of_the_ledger(tmp_path: Path) -> None:
    """A model that two sites saw counts once; a site whose part did not grow is not counted."""
    work = make_work(tmp_path)
    for ledger in ([0.0, 0.0], [0.5, 0.5], [0.5, 0.5], [0.5, 1.5]):
        work.note("site-1", "received", ledger=ledger)
    assert steps(work, [1.0, 2.0]) == [2, 3]


def test_a_stage_sees_grandchildren_and_leaves_nothing_behind(tmp_path: Path) -> None:
    """A process of a process has the role of the one that was started, also once its parent has died."""
    sleeps = "import time; time.sleep(60)"
    child = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', '{sleeps}']); {sleeps}"
    before = set(descendants(os.getpid()))
    with Stage(tmp_path, {}) as stage:
        stage.start("server", [sys.executable, "-c", child], log="x")
        deadline = time.monotonic() + 30.0
        while len(stage.pids("server")) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert all(memory_bytes(pid)[0] > 0 for pid in stage.pids("server"))
        assert len(stage.kill("server")) == 2
    assert set(descendants(os.getpid())) <= before


def test_a_stage_keeps_what_a_short_command_says(tmp_path: Path) -> None:
    """Errors of the command are part of what it says."""
    with Stage(tmp_path, {"WORD": "boat"}) as stage:
        said = stage.ask([sys.executable, "-c", "import os, sys; sys.exit(os.environ['WORD'])"])
    assert said.strip() == "boat"
