from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path

import pytest

from mailboat.experiment import plots
from mailboat.experiment.cells import Experiment, read_experiment
from mailboat.experiment.plots import draw
from mailboat.experiment.results import Cabinet, Point, Result
from mailboat.experiment.summary import Row, Stat, reference, rows, targets, to_plain, versions_to_nearly
from mailboat.experiment.table import cells_csv, curves_csv, markdown, told

EXPERIMENT = """
title = "Small table"
question = "What is what?"
bases = ["small", "other"]
seeds = [1, 2]
[[cells]]
name = "full"
reference = true
series = "all"
x = 16
federation.layers.plan = "all"
paper = "F1 87.1"
[[cells]]
name = "top {x}"
series = "top"
vary = [1, 4]
federation.layers.plan = "top:{x}"
clock = { train_s = 60 }
[[cells]]
name = "centralized"
method = "centralized"
[[cells]]
name = "single"
method = "alone"
[[cells]]
name = "not yet"
federation.adapter.kinds = "lora"
[[plots]]
kind = "bars"
[[plots]]
kind = "bytes"
[[plots]]
kind = "line"
x_label = "blocks"
x_log = true
[[plots]]
kind = "rounds"
[[plots]]
kind = "clock"
"""


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    """Two bases, two seeds, one cell that is not known here."""
    (tmp_path / "bases").mkdir()
    for name in ("small", "other"):
        (tmp_path / "bases" / f"{name}.toml").write_text(f'title = "Base {name}"\nmodel = "org/{name}"\n')
    (tmp_path / "small.toml").write_text(EXPERIMENT)
    return read_experiment(tmp_path, "small")


@pytest.fixture
def found(experiment: Experiment, tmp_path: Path) -> list[Row]:
    """A result for each cell that is known, but for the second seed of top 4 over the other base."""
    cabinet = Cabinet(tmp_path / "out")
    for cell in experiment.cells:
        missing = (cell.base, cell.name, cell.seed) == ("other", "top 4", 2)
        if cell.settings is not None and not missing:
            cabinet.put(result(cell.name, cell.seed, cell.settings.digest))
    return rows(experiment, cabinet)


def result(name: str, seed: int, digest: str) -> Result:
    """Scores 0.70 and 0.74 by seed, a tenth less for the top blocks; bytes a tenth of the full model's."""
    part = name.startswith("top")
    score = 0.66 + 0.04 * seed - (0.1 if part else 0.0)
    size = 1_000_000 if part else 10_000_000
    several = name not in {"centralized", "single"}
    shares = (0.0, 0.5, 0.985, 1.0) if several else (1.0,)
    return Result(
        settings_sha256=digest,
        code_sha256="0" * 64,
        title=name,
        scores={"strict_f1": score, "lenient_f1": score + 0.05},
        curve=tuple(
            Point(version=n, at_s=3600.0 * n, up=n * size, down=2 * n * size, scores={"strict_f1": share * score})
            for n, share in enumerate(shares)
        ),
        versions=3 if several else 1,
        up=3 * size,
        down=6 * size,
        train_s=0.5 * seed,
        trainings=12,
        cpu_s=9.0,
        clock_s=3 * 3600.0 if part else 0.0,
        trained_parameters=25 if part else 100,
        total_parameters=100,
        sites={"site-1": {"strict_f1": 0.4}, "site-2": {"strict_f1": 0.2}} if name == "single" else {},
        machine="m",
        software="s",
    )


def row(found: list[Row], base: str, name: str) -> Row:
    """The row of that name."""
    return next(each for each in found if (each.base, each.name) == (base, name))


def test_the_table_says_what_a_gpu_computed(experiment: Experiment, tmp_path: Path) -> None:
    """Its numbers are not those that a processor gives again; the file of a cell names the device."""
    cabinet = Cabinet(tmp_path / "out")
    known = [cell for cell in experiment.cells if cell.settings is not None]
    for cell in known:
        assert cell.settings is not None
        made = result(cell.name, cell.seed, cell.settings.digest)
        there = {"device": "cuda:0 (NVIDIA H200)"} if cell.name == "top 4" else {}
        cabinet.put(made.model_copy(update=there))
    found = rows(experiment, cabinet)
    assert f"4 of {len(known)} results were computed on a GPU: cuda:0 (NVIDIA H200)." in markdown(experiment, found)
    lines = list(csv.DictReader(io.StringIO(cells_csv(found))))
    assert {line["name"] for line in lines if line["device"] != "cpu"} == {"top 4"}


def test_mean_and_spread() -> None:
    """Of 1, 2 and 6: mean 3, sample deviation sqrt(7); one value has no spread; a missing one leaves nothing."""
    stat = Stat.of([1.0, 2.0, 6.0])
    assert stat is not None
    assert stat.mean == 3
    assert stat.spread == pytest.approx(7**0.5)
    assert Stat.of([4.0]) == Stat(4.0, None)
    assert Stat.of([1.0, None]) is None
    assert Stat.of([]) is None
    assert told(Stat(0.7123, 0.0101), 100, 1) == "71.2 ± 1.0"
    assert told(Stat(2.0, 0.0), 1, 0) == "2"
    assert told(None, 1, 1) == "-"


def test_versions_to_98_percent(found: list[Row]) -> None:
    """Shares 0, 50, 98.5 and 100 % of the final score: version 2 is the first that counts; one training has none."""
    (_, first), _ = row(found, "small", "full").results
    assert versions_to_nearly(first) == 2
    (_, central), _ = row(found, "small", "centralized").results
    assert versions_to_nearly(central) is None


def test_hours_to_the_references_score(found: list[Row]) -> None:
    """A lower target is reached at the first version that has it, a higher one never."""
    top = row(found, "small", "top 4")
    assert top.hours_to({1: 0.5, 2: 0.5}) == Stat(2.0, 0.0)
    against = reference(found, "small")
    assert against is not None
    assert targets(against) == {1: pytest.approx(0.70), 2: pytest.approx(0.74)}
    assert top.hours_to(targets(against)) is None


def test_the_table_says_what_was_found(experiment: Experiment, found: list[Row]) -> None:
    """Means, spreads, savings against the reference, the paper's number, what is missing and why."""
    page = markdown(experiment, found)
    small, other = page.split("## Base other")
    full = next(line for line in small.splitlines() if line.startswith("| full"))
    assert "| 72.0 ± 2.8 | 77.0 ± 2.8 |" in full
    assert "| 2.0 |" in full
    assert "F1 87.1" in full
    top = next(line for line in small.splitlines() if line.startswith("| top 4"))
    assert "| 90.00 % | 90.00 % |" in top
    assert "25.0 %" in top
    assert "| top 4 (1 of 2 seeds) |" in other
    assert "| not yet (not known here) |" in page
    assert "- not yet: federation: unknown key adapter" in page
    assert "all sites alone have 30.0 on average" in page
    assert "were made by other sources" in page
    assert "on a GPU" not in page
    central = next(line for line in small.splitlines() if line.startswith("| centralized"))
    assert "10.0" not in central, "nothing has to travel where all notes are in one place"


def test_the_csv_has_every_number(found: list[Row]) -> None:
    """One line a cell with exact bytes, one line a scored version."""
    lines = list(csv.DictReader(io.StringIO(cells_csv(found))))
    assert len(lines) == 2 * 2 * 5 - 1
    first = lines[0]
    assert (first["base"], first["name"], first["seed"]) == ("small", "full", "1")
    assert (first["up"], first["strict_f1"], first["versions_to_98"]) == ("30000000", "0.7", "2.0")
    curves = list(csv.DictReader(io.StringIO(curves_csv(found))))
    assert len(curves) == 4 * (2 * 2 * 3 - 1) + 2 * 2 * 2
    assert curves[1]["at_s"] == "3600.0"


def test_json_has_the_same(experiment: Experiment, found: list[Row]) -> None:
    """Scores 0 to 1 by measure, with mean and spread; a row that is not known here has its problem."""
    plain = to_plain(experiment, found)
    assert plain["rows"][0]["scores"]["strict_f1"]["mean"] == pytest.approx(0.72)
    assert plain["rows"][-1]["scores"]["strict_f1"] is None
    assert plain["rows"][-1]["problem"]


def test_every_kind_of_picture_is_drawn(experiment: Experiment, found: list[Row], tmp_path: Path) -> None:
    """Five PNGs, without a warning that anything did not fit."""
    written = draw(experiment, found, tmp_path)
    assert [path.name for path in written] == ["1-bars.png", "2-bytes.png", "3-line.png", "4-rounds.png", "5-clock.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_a_picture_has_one_measure(
    experiment: Experiment, found: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row whose task is measured otherwise than the first row's is in the table, and in no picture as if it had 0."""
    stays = {"scores": {"micro_f1": 0.5}}
    mixed = [
        replace(row, results=tuple((cell, made.model_copy(update=stays)) for cell, made in row.results))
        if row.name == "top 4"
        else row
        for row in found
    ]
    assert "| 50.0 |" in markdown(experiment, mixed)
    drawn: list[Row] = []
    monkeypatch.setattr(plots, "_picture", lambda _experiment, _section, chosen, _path: drawn.extend(chosen))
    draw(experiment, mixed, tmp_path)
    assert {row.name for row in drawn} == {"full", "top 1", "centralized", "single"}


def test_nothing_is_drawn_of_nothing(experiment: Experiment, tmp_path: Path) -> None:
    """Without results there are a table of dashes and no pictures."""
    empty = rows(experiment, Cabinet(tmp_path / "empty"))
    assert draw(experiment, empty, tmp_path) == []
    assert "(0 of 2 seeds)" in markdown(experiment, empty)
