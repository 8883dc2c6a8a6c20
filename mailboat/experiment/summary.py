"""The rows of an experiment's table: each cell's results over the seeds, as mean and spread."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mailboat.experiment.cells import Cell, Experiment
from mailboat.experiment.results import Cabinet, Result, is_current
from mailboat.experiment.spec import CellSection

NEARLY = 0.98
"""A run counts as having arrived at this share of its final score."""


@dataclass(frozen=True, slots=True)
class Stat:
    """Mean and sample standard deviation (None of a single value) over the seeds."""

    mean: float
    spread: float | None

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Stat | None:
        """None when any value is missing, or there is none."""
        found = list(values)
        known = [value for value in found if value is not None]
        if not known or len(known) < len(found):
            return None
        return cls(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None)


@dataclass(frozen=True, slots=True)
class Row:
    """What is known of one line of the table."""

    base: str
    name: str
    section: CellSection
    results: tuple[tuple[Cell, Result], ...]
    """By seed, those that are there."""
    seeds: int
    problem: str

    @property
    def complete(self) -> bool:
        """Whether each seed has its result."""
        return len(self.results) == self.seeds

    @property
    def clocked(self) -> bool:
        """Whether its versions have times that mean something."""
        return any(cell.settings is not None and cell.settings.clock is not None for cell, _ in self.results)

    @property
    def x(self) -> float | None:
        """Where it stands on a plot."""
        return None if self.section.x is None else float(self.section.x)

    def score(self, measure: str) -> Stat | None:
        """Of a measure on the held-out notes."""
        return Stat.of(result.scores.get(measure) for _, result in self.results)

    def of(self, field: str) -> Stat | None:
        """Of a number of the result."""
        return Stat.of(float(getattr(result, field)) for _, result in self.results)

    def a_version(self, field: str) -> Stat | None:
        """Of a number of the result, divided by its versions."""
        return Stat.of(getattr(result, field) / max(1, result.versions) for _, result in self.results)

    @property
    def to_nearly(self) -> Stat | None:
        """Versions until 98 % of the final score."""
        return Stat.of(versions_to_nearly(result) for _, result in self.results)

    def hours_to(self, targets: dict[int, float]) -> Stat | None:
        """Virtual hours until a score, by seed; None when one never reached it."""
        return Stat.of(_hours_to(result, targets.get(cell.seed)) for cell, result in self.results)

    def metric(self, name: str) -> Stat | None:
        """The largest among the sites of a number that they reported last."""
        return Stat.of(
            max((said[name] for said in result.metrics.values() if name in said), default=None)
            for _, result in self.results
        )


def rows(experiment: Experiment, cabinet: Cabinet) -> list[Row]:
    """Return the lines of the table, those without results too."""
    found: dict[tuple[str, str], list[Cell]] = {}
    for cell in experiment.cells:
        found.setdefault(cell.row, []).append(cell)
    return [_row(cells, cabinet) for cells in found.values()]


def _row(cells: Sequence[Cell], cabinet: Cabinet) -> Row:
    kept = ((cell, cabinet.get(cell.settings.digest)) for cell in cells if cell.settings is not None)
    results = tuple((cell, result) for cell, result in kept if result is not None)
    first = cells[0]
    return Row(first.base, first.name, first.section, results, len(cells), first.problem)


def measures(found: Iterable[Row]) -> list[str]:
    """Names of the measures that the results have, the one that models are compared by first."""
    return list(dict.fromkeys(name for row in found for _, result in row.results for name in result.scores))


def versions_to_nearly(result: Result) -> float | None:
    """The first scored version with 98 % of the final score; None for a run of one version, which has no curve."""
    if result.versions < 2:
        return None
    goal = NEARLY * _main(result.scores)
    return next(float(point.version) for point in result.curve if _main(point.scores) >= goal)


def _hours_to(result: Result, target: float | None) -> float | None:
    if target is None:
        return None
    return next((point.at_s / 3600 for point in result.curve if _main(point.scores) >= target), None)


def _main(scores: dict[str, float]) -> float:
    return next(iter(scores.values()))


def reference(found: Iterable[Row], base: str) -> Row | None:
    """The row that savings, and hours, are counted against."""
    return next((row for row in found if row.base == base and row.section.reference and row.results), None)


def targets(row: Row) -> dict[int, float]:
    """The final score of each seed."""
    return {cell.seed: _main(result.scores) for cell, result in row.results}


def code_note(found: Iterable[Row]) -> str:
    """Say of which sources the results are; empty when all are of those that are here."""
    older = sum(not is_current(result) for row in found for _, result in row.results)
    return f"{older} results were made by other sources than those beside this table." if older else ""


def device_note(found: Iterable[Row]) -> str:
    """Say which results a GPU computed; empty when none."""
    devices = [result.device for row in found for _, result in row.results]
    of_gpu = sorted({device for device in devices if device != "cpu"})
    if not of_gpu:
        return ""
    count = sum(device != "cpu" for device in devices)
    return f"{count} of {len(devices)} results were computed on a GPU: {', '.join(of_gpu)}."


def to_plain(experiment: Experiment, found: Sequence[Row]) -> dict[str, Any]:
    """JSON-able values; scores 0 to 1, sizes in bytes."""

    def plain(stat: Stat | None) -> dict[str, float | None] | None:
        return None if stat is None else {"mean": stat.mean, "spread": stat.spread}

    return {
        "experiment": experiment.name,
        "title": experiment.section.title,
        "rows": [
            {
                "base": row.base,
                "name": row.name,
                "results": len(row.results),
                "seeds": row.seeds,
                "problem": row.problem,
                "scores": {name: plain(row.score(name)) for name in measures(found)},
                **{name: plain(row.of(name)) for name in ("versions", "up", "down", "train_s", "cpu_s", "clock_s")},
                "versions_to_98_percent": plain(row.to_nearly),
            }
            for row in found
        ],
    }
