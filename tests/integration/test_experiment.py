"""`mailboat experiment` as its users meet it: real processes, killed and stopped."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import signal
import time
from pathlib import Path

import pytest

from mailboat.experiment.cells import read_experiment
from mailboat.experiment.spec import experiment_names
from tests.commands import call, refused, running
from tests.unit.edge_client import tiny

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(900)]

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
RUN_S = 800.0

CELLS = """
title = "Small"
question = "Does it go on where it was stopped?"
bases = ["tiny"]
seeds = [1]
[[cells]]
name = "top {x}"
vary = [1, 2, 3]
federation.layers.plan = "top:{x}"
[[cells]]
name = "of tomorrow"
federation.layers.depth = 3
"""
BASE = """
title = "Tiny"
model = "MODEL"
[notes]
sites = 2
notes = 2
heldout = 2
[federation.federation]
versions = 2
[federation.task]
max_length = 32
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three small cells and one that this release does not know."""
    model = tiny.save_model(tmp_path / "model", "llama")
    (tmp_path / "experiments" / "bases").mkdir(parents=True)
    (tmp_path / "experiments" / "small.toml").write_text(CELLS)
    (tmp_path / "experiments" / "bases" / "tiny.toml").write_text(BASE.replace("MODEL", str(model)))
    return tmp_path


def run_words(*more: str) -> tuple[str, ...]:
    """The command that runs the small experiment."""
    return ("experiment", "run", "small", "--out", "results", *more)


def workers_of(pid: int) -> list[int]:
    """Processes that a run has started."""
    with contextlib.suppress(FileNotFoundError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def wait_until_gone(pids: list[int], within_s: float = 20.0) -> None:
    """None of these processes runs any more."""
    until = time.monotonic() + within_s
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < until, f"still there: {pids}"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    """Whether a process runs; one that is dead and not waited for does not."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_a_run_goes_on_where_it_was_killed(folder: Path) -> None:
    """SIGKILL takes the workers along and loses no finished cell; the next run does the rest, the third nothing."""
    with running(folder, module=["tests.stuck", *run_words()]) as first:
        first.wait_for("1/3", RUN_S)
        workers = workers_of(first.process.pid)
        first.end(signal.SIGKILL)
    assert len(workers) == 1
    wait_until_gone(workers)
    kept = {path.name: path.read_bytes() for path in (folder / "results" / "cells").iterdir()}
    assert len(kept) == 1
    done = call(folder, *run_words("--jobs", "2"), timeout_s=RUN_S)
    assert done.returncode == 0, done.stderr
    assert "2/2" in done.stderr
    assert all((folder / "results" / "cells" / name).read_bytes() == data for name, data in kept.items())
    assert "of tomorrow: federation: unknown key layers.depth" in done.stderr
    again = call(folder, *run_words("--json"), timeout_s=RUN_S)
    assert "/3" not in again.stderr
    told = json.loads(again.stdout)
    assert [row["results"] for row in told["rows"]] == [1, 1, 1, 0]
    assert "not known here" in call(folder, "experiment", "show", "small", "--out", "results").stdout
    (listed,) = json.loads(call(folder, "experiment", "list", "--out", "results", "--json").stdout)
    assert (listed["name"], listed["cells"], listed["done"], listed["not_known_here"]) == ("small", 4, 3, 1)


def test_ctrl_c_leaves_nothing_behind(folder: Path) -> None:
    """Status 130, one word, no traceback, no process, no half-written result."""
    with running(folder, module=["tests.stuck", *run_words()]) as started:
        started.wait_for("1/3", RUN_S)
        workers = workers_of(started.process.pid)
        assert started.end(signal.SIGINT) == 130
        said = started.text()
    wait_until_gone(workers)
    assert "stopped" in said
    assert "Traceback" not in said
    assert all(json.loads(path.read_text())["versions"] == 2 for path in (folder / "results" / "cells").iterdir())


def test_only_some_cells(folder: Path) -> None:
    """--only runs the cells whose line holds the text, and the table says what is missing."""
    done = call(folder, *run_words("--only", "top 2"), timeout_s=RUN_S)
    assert done.returncode == 0, done.stderr
    assert "1/1" in done.stderr
    assert "top 1 (0 of 1 seeds)" in done.stdout


def test_a_cell_that_fails_is_told_and_the_others_go_on(folder: Path) -> None:
    """A plan that the model cannot have ends its own cell; the run ends with status 3 and names it."""
    path = folder / "experiments" / "small.toml"
    path.write_text(path.read_text().replace("vary = [1, 2, 3]", "vary = [9, 1]"))
    said = refused(folder, *run_words(), status=3, timeout_s=RUN_S)
    assert "1 of 2 cells failed: tiny: top 9, seed 1" in said
    assert len(list((folder / "results" / "cells").iterdir())) == 1


def test_a_gpu_that_is_not_there_is_missed_before_the_first_cell(folder: Path) -> None:
    """`--device` is a machine's word as in site.toml; nobody who asks for a GPU is given the processor in silence."""
    said = refused(folder, *run_words("--device", "cuda:77"), status=2, timeout_s=RUN_S)
    assert 'device = "cuda:77"' in said
    assert not (folder / "results").exists()


def test_an_experiment_that_there_is_not(folder: Path) -> None:
    """A wrong name is an error of use that lists the right ones."""
    assert "there are: small" in refused(folder, "experiment", "run", "smal", status=2)


def test_the_shipped_experiments_can_be_read() -> None:
    """Each file of `experiments/` is sound, and each cell that is not known here says why."""
    names = experiment_names(EXPERIMENTS)
    assert {"main", "layers", "noniid", "pilot", "smoke"} <= set(names)
    for name in names:
        found = read_experiment(EXPERIMENTS, name)
        assert all(cell.settings is not None or cell.problem for cell in found.cells)
    pilot = {seed for cell in read_experiment(EXPERIMENTS, "pilot").cells for seed in [cell.seed]}
    reported = {cell.seed for name in names if name != "pilot" for cell in read_experiment(EXPERIMENTS, name).cells}
    assert not pilot & reported, "what a rate was chosen on is not reported"


def test_smoke(tmp_path: Path) -> None:
    """Every method, clock and picture of the smoke experiment runs to its end on the shipped model."""
    done = call(
        EXPERIMENTS.parent, "experiment", "run", "smoke", "--out", str(tmp_path), "--jobs", "2", timeout_s=RUN_S
    )
    assert done.returncode == 0, done.stderr
    written = {path.name for path in (tmp_path / "smoke").iterdir()}
    assert written == {
        *("README.md", "cells.csv", "curves.csv"),
        *("1-bars.png", "2-bytes.png", "3-line.png", "4-rounds.png", "5-clock.png"),
    }
    lines = list(csv.DictReader(io.StringIO((tmp_path / "smoke" / "cells.csv").read_text())))
    assert len(lines) == len(read_experiment(EXPERIMENTS, "smoke").cells)
    for exact, more in (("strict_f1", "lenient_f1"), ("micro_f1", "macro_f1")):
        scored = [(float(line[exact]), float(line[more])) for line in lines if line[exact]]
        assert scored
        assert all(0 <= value <= 1 for pair in scored for value in pair)
    assert all(bool(line["strict_f1"]) != bool(line["micro_f1"]) for line in lines)
    assert all(float(line["strict_f1"]) <= float(line["lenient_f1"]) for line in lines if line["strict_f1"])
    sent = {line["name"]: int(line["up"]) for line in lines}
    assert sent["int8 up"] < sent["top 2 of 16"] < sent["full-model FedAvg"]
