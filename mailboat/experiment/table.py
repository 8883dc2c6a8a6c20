"""The table of an experiment as Markdown, and all its numbers as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from mailboat.console import measure_title
from mailboat.experiment.cells import Experiment
from mailboat.experiment.summary import (
    Row,
    Stat,
    code_note,
    device_note,
    measures,
    reference,
    targets,
    versions_to_nearly,
)

MEGA = 1e6
NOTHING = "-"


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the table; left out where no row has anything in it."""

    title: str
    text: Callable[[Row], str]


def markdown(experiment: Experiment, found: Sequence[Row]) -> str:
    """Return the whole page: what is asked, a table for each base, and how to read it."""
    section = experiment.section
    lines = [f"# {section.title}", "", section.question, ""]
    lines += [f"`mailboat experiment run {experiment.name}`; seeds {', '.join(map(str, section.seeds))}.", ""]
    for name, base in experiment.bases.items():
        own = [row for row in found if row.base == name]
        if not own:
            continue
        if len(experiment.bases) > 1:
            lines += [f"## {base.title}", ""]
        lines += [*_table(own, _columns(own)), ""]
    lines += [*_notes(found), ""]
    return "\n".join(lines)


def _table(found: Sequence[Row], columns: Sequence[Column]) -> Iterator[str]:
    texts = [[column.text(row) for column in columns] for row in found]
    used = [place for place in range(len(columns)) if any(line[place] != NOTHING for line in texts)]
    yield f"| {' | '.join(columns[place].title for place in used)} |"
    yield f"|{'|'.join('---' if place == 0 else '---:' for place in used)}|"
    for line in texts:
        yield f"| {' | '.join(line[place] for place in used)} |"


def _columns(found: Sequence[Row]) -> list[Column]:
    base = found[0].base
    against = reference(found, base)
    goals = targets(against) if against is not None else {}
    return [
        Column("method", lambda row: row.name + _state(row)),
        *(
            Column(measure_title(name), lambda row, name=name: told(row.score(name), 100, 1))  # type: ignore[misc]
            for name in measures(found)
        ),
        Column("versions", lambda row: told(_several(row, row.of("versions")), 1, 0)),
        Column("versions to 98 %", lambda row: told(row.to_nearly, 1, 1)),
        Column("epsilon", lambda row: told(row.metric("epsilon"), 1, 2)),
        Column("hours", lambda row: told(row.of("clock_s") if row.clocked else None, 1 / 3600, 1)),
        Column("hours to the reference's score", lambda row: _reached(row, goals)),
        Column("MB up a version", lambda row: told(_sent(row, row.a_version("up")), 1 / MEGA, 3)),
        Column("MB down a version", lambda row: told(_sent(row, row.a_version("down")), 1 / MEGA, 3)),
        Column("MB in all", lambda row: told(_sent(row, _both(row)), 1 / MEGA, 2)),
        Column("saved up", lambda row: _saved(row, against, lambda one: one.of("up"))),
        Column("saved both ways", lambda row: _saved(row, against, _both)),
        Column("saved up, against uncompressed", _saved_plain),
        Column("CPU s a training", lambda row: told(row.of("train_s"), 1, 2)),
        Column("trained", _trained),
        Column("the paper", lambda row: row.section.paper or NOTHING),
    ]


def told(stat: Stat | None, factor: float, digits: int) -> str:
    """Mean and spread in a cell of the table."""
    if stat is None:
        return NOTHING
    mean = f"{stat.mean * factor:.{digits}f}"
    return mean if stat.spread is None or not stat.spread else f"{mean} ± {stat.spread * factor:.{digits}f}"


def _state(row: Row) -> str:
    if row.problem:
        return " (not known here)"
    return "" if row.complete else f" ({len(row.results)} of {row.seeds} seeds)"


def _several(row: Row, stat: Stat | None) -> Stat | None:
    return None if row.section.method in {"centralized", "alone"} or row.section.zero_shot else stat


def _sent(row: Row, stat: Stat | None) -> Stat | None:
    """Bytes mean nothing where nothing has to travel."""
    return _several(row, stat)


def _both(row: Row) -> Stat | None:
    return Stat.of(float(result.up + result.down) for _, result in row.results)


def _saved(row: Row, against: Row | None, of: Callable[[Row], Stat | None]) -> str:
    here = _sent(row, of(row))
    there = of(against) if against is not None else None
    if here is None or there is None or row is against:
        return NOTHING
    return f"{100 * (1 - here.mean / there.mean):.2f} %"


def _saved_plain(row: Row) -> str:
    """Against four bytes for each parameter of the model and each training, as if sent as they are."""
    here = _sent(row, row.of("up"))
    plain = Stat.of(4.0 * result.total_parameters * result.trainings for _, result in row.results)
    if here is None or plain is None or not plain.mean:
        return NOTHING
    return f"{100 * (1 - here.mean / plain.mean):.2f} %"


def _reached(row: Row, goals: dict[int, float]) -> str:
    if not row.clocked or not goals:
        return NOTHING
    stat = row.hours_to(goals)
    return told(stat, 1, 1) if stat is not None else "not by all seeds"


def _trained(row: Row) -> str:
    if not row.results:
        return NOTHING
    result = row.results[0][1]
    return f"{100 * result.trained_parameters / result.total_parameters:.1f} %"


def _notes(found: Sequence[Row]) -> Iterator[str]:
    yield (
        "Scores are percent on held-out notes that nobody trained on, mean ± sample standard deviation over the seeds; "
        "a seed is another draw of notes, head and batches. Bytes are whole PUBLISH packets of all sites, with "
        "manifests and control messages. CPU seconds are those of one site's training for one version, on a machine "
        "that may have been busy."
    )
    alone = [result for row in found if row.section.method == "alone" for _, result in row.results]
    if alone:
        scores = [100 * next(iter(said.values())) for result in alone for said in result.sites.values()]
        yield ""
        yield (
            "The best single site is chosen by its score on the held-out notes, which flatters it; "
            f"all sites alone have {sum(scores) / len(scores):.1f} on average."
        )
    for note in (device_note(found), code_note(found)):
        if note:
            yield from ("", note)
    problems = {row.name: row.problem for row in found if row.problem}
    if problems:
        yield from ("", "Not known here:", "")
        yield from (f"- {name}: {problem}" for name, problem in problems.items())


# -- CSV ---


def cells_csv(found: Sequence[Row]) -> str:
    """One line for each cell: all its numbers, scores 0 to 1, sizes in bytes, times in seconds."""
    names = measures(found)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    numbers = ("versions", "up", "down", "trainings", "train_s", "cpu_s", "clock_s", "trained_parameters")
    head = ("base", "method", "name", "series", "x", "seed", *names, *numbers, "total_parameters", "versions_to_98")
    writer.writerow((*head, "settings", "code", "software", "device"))
    for row in found:
        for cell, result in row.results:
            said = row.section
            writer.writerow(
                (
                    *(row.base, said.method, row.name, said.series, "" if said.x is None else said.x, cell.seed),
                    *(_short(result.scores.get(name)) for name in names),
                    *(_short(getattr(result, name)) for name in numbers),
                    result.total_parameters,
                    _short(versions_to_nearly(result)),
                    *(result.settings_sha256[:24], result.code_sha256[:12], result.software, result.device),
                )
            )
    return out.getvalue()


def curves_csv(found: Sequence[Row]) -> str:
    """One line for each scored version."""
    names = measures(found)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("base", "name", "seed", "version", "at_s", "up", "down", *names))
    for row in found:
        for cell, result in row.results:
            for point in result.curve:
                scores = (_short(point.scores.get(name)) for name in names)
                writer.writerow(
                    (row.base, row.name, cell.seed, point.version, _short(point.at_s), point.up, point.down, *scores)
                )
    return out.getvalue()


def _short(value: float | None) -> str:
    return "" if value is None else str(round(value, 6))
