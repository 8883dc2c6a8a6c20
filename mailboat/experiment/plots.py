"""The pictures of an experiment; each base has its own axes, side by side."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from mailboat.console import measure_title
from mailboat.experiment.cells import Experiment
from mailboat.experiment.results import Point
from mailboat.experiment.spec import PlotSection
from mailboat.experiment.summary import Row, Stat, measures

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = (
    *("#1b6ca8", "#c77700", "#2e7d32", "#8e24aa", "#c62828", "#00838f", "#6d4c41", "#546e7a"),
    *("#9e9d24", "#ad1457", "#283593", "#ef6c00"),
)
"""Told apart by most of those who do not see all colours, with markers and dashes for the rest."""
MARKERS = "osD^vP*X<>hp"
DASHES = ("-", "--", "-.", ":")
MEGA, HOUR_S = 1e6, 3600.0
LEGEND_INSIDE = 5
"""Lines of a legend that fit into a picture."""
BAR_HEIGHT, PLOT_HEIGHT, WIDTH = 0.34, 4.6, 6.0
"""Inches."""


def draw(experiment: Experiment, found: Sequence[Row], folder: Path) -> list[Path]:
    """Write the pictures that have something to show, and return their paths.

    A picture has one measure, the first row's; rows of tasks that are measured otherwise are not in it.
    """
    written = []
    for number, section in enumerate(experiment.section.plots, start=1):
        chosen = _comparable(
            [row for row in found if row.results and (not section.series or row.section.series in section.series)]
        )
        if chosen:
            path = folder / f"{number}-{section.kind}.png"
            _picture(experiment, section, chosen, path)
            written.append(path)
    return written


def _comparable(found: Sequence[Row]) -> list[Row]:
    """The rows that have the first one's main measure."""
    main = measures(found)[:1]
    return [row for row in found if all(row.score(name) is not None for name in main)]


def _picture(experiment: Experiment, section: PlotSection, found: Sequence[Row], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    bases = [base for base in experiment.bases if any(row.base == base for row in found)]
    longest = max(sum(row.base == base for row in found) for base in bases)
    height = BAR_HEIGHT * longest + 1.6 if section.kind == "bars" else PLOT_HEIGHT
    figure = Figure(figsize=(WIDTH * len(bases) + 1, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    for base, axes in zip(bases, figure.subplots(1, len(bases), squeeze=False)[0], strict=True):
        own = [row for row in found if row.base == base]
        _KINDS[section.kind](axes, own, section)
        axes.set_title(experiment.bases[base].title, fontsize=10)
        axes.grid(alpha=0.25)
    _place_legends(figure.axes)
    figure.suptitle(section.title or experiment.section.title, fontsize=11)
    figure.savefig(path)


def _place_legends(all_axes: Sequence[Axes]) -> None:
    """Beside the axes where it would cover much of them; one for all that have the same lines."""
    found = [axes.get_legend_handles_labels()[1] for axes in all_axes]
    for place, (axes, labels) in enumerate(zip(all_axes, found, strict=True)):
        if len(labels) > LEGEND_INSIDE and labels not in found[place + 1 :]:
            axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
        elif 0 < len(labels) <= LEGEND_INSIDE:
            axes.legend(fontsize=8)


def _bars(axes: Axes, found: Sequence[Row], _: PlotSection) -> None:
    """Each row's main measure, the first row on top."""
    name = measures(found)[0]
    stats = [_percent(row.score(name)) for row in found]
    places = range(len(found), 0, -1)
    widths = [mean for mean, _ in stats]
    axes.barh(places, widths, xerr=[spread for _, spread in stats], color=COLOURS[0], height=0.7, capsize=3)
    for place, (mean, spread) in zip(places, stats, strict=True):
        axes.annotate(
            f"{mean:.1f}", (mean + spread, place), (4, 0), textcoords="offset points", va="center", fontsize=8
        )
    axes.set_yticks(list(places), [row.name for row in found], fontsize=8)
    axes.set_xlim(0, max(mean + spread for mean, spread in stats) * 1.12)
    axes.set_xlabel(_measure(found))
    axes.set_axisbelow(True)


def _bytes(axes: Axes, found: Sequence[Row], _: PlotSection) -> None:
    """The main measure against all bytes that travelled."""
    from matplotlib.ticker import LogLocator, NullFormatter

    name = measures(found)[0]
    sent = [row for row in found if row.section.method in {"federated", "splitnn"} and not row.section.zero_shot]
    for place, row in enumerate(sent):
        total = Stat.of((result.up + result.down) / MEGA for _, result in row.results)
        mean, spread = _percent(row.score(name))
        if total is not None:
            style = {**_style(place), "linestyle": ""}
            axes.errorbar(total.mean, mean, yerr=spread, capsize=3, label=row.name, **style)
    for row in found:
        if row.section.method == "centralized":
            axes.axhline(_percent(row.score(name))[0], color="#546e7a", linestyle="--", linewidth=1, label=row.name)
    axes.set_xscale("log")
    axes.set_xlabel("MB on the wire, both ways, all sites and versions")
    axes.set_ylabel(_measure(found))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


def _line(axes: Axes, found: Sequence[Row], section: PlotSection) -> None:
    """The main measure over x, a line for each series; rows without an x are levels."""
    name = measures(found)[0]
    for place, (series, rows) in enumerate(_by_series(found).items()):
        style = _style(place)
        pairs = sorted((row.x, _percent(row.score(name))) for row in rows if row.x is not None)
        if pairs:
            axes.errorbar(
                [x for x, _ in pairs],
                [mean for _, (mean, _) in pairs],
                yerr=[spread for _, (_, spread) in pairs],
                capsize=3,
                label=series,
                **style,
            )
        for row in rows:
            if row.x is None:
                level = _percent(row.score(name))[0]
                axes.axhline(level, color=style["color"], linestyle=style["linestyle"], label=series)
    if section.x_log:
        axes.set_xscale("log")
        ticks = sorted({row.x for row in found if row.x is not None})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    axes.set_xlabel(section.x_label)
    axes.set_ylabel(_measure(found))


def _rounds(axes: Axes, found: Sequence[Row], _: PlotSection) -> None:
    """The main measure by version, the mean over the seeds."""
    from matplotlib.ticker import MaxNLocator

    for place, row in enumerate(_with_curves(found)):
        by_version: dict[int, list[float]] = {}
        for _cell, result in row.results:
            for point in result.curve:
                by_version.setdefault(point.version, []).append(100 * _main(point))
        means = [sum(values) / len(values) for values in by_version.values()]
        axes.plot([*by_version], means, label=row.name, **_curve_style(place))
    axes.set_xlabel("version")
    axes.set_ylabel(_measure(found))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _clock(axes: Axes, found: Sequence[Row], _: PlotSection) -> None:
    """The main measure by virtual hours: what the newest version has by then, the mean over the seeds."""
    clocked = (row for row in _with_curves(found) if row.clocked)
    for place, row in enumerate(clocked):
        curves = [result.curve for _, result in row.results]
        begin = max(curve[0].at_s for curve in curves)
        moments = sorted({begin, *(point.at_s for curve in curves for point in curve if point.at_s > begin)})
        means = [fmean(100 * _by_then(curve, moment) for curve in curves) for moment in moments]
        hours = [moment / HOUR_S for moment in moments]
        axes.plot(hours, means, drawstyle="steps-post", label=row.name, **_curve_style(place))
        axes.plot(hours[-1], means[-1], color=_style(place)["color"], marker=".")
    axes.set_xlabel("hours since the run began (virtual)")
    axes.set_ylabel(_measure(found))


def _with_curves(found: Sequence[Row]) -> list[Row]:
    return [row for row in found if any(len(result.curve) > 2 for _, result in row.results)]


def _curve_style(place: int) -> dict[str, Any]:
    return {**_style(place), "marker": "", "linewidth": 1.4}


def _by_then(curve: Sequence[Point], at_s: float) -> float:
    """The main measure of the newest version at a moment; of the last one when the run has ended."""
    return _main(curve[bisect_right(curve, at_s, key=lambda point: point.at_s) - 1])


def _main(point: Point) -> float:
    return next(iter(point.scores.values()))


_KINDS: Mapping[str, Callable[[Any, Sequence[Row], PlotSection], None]] = {
    "bars": _bars,
    "bytes": _bytes,
    "line": _line,
    "rounds": _rounds,
    "clock": _clock,
}


def _style(place: int) -> dict[str, Any]:
    turn = place // len(COLOURS)
    return {
        "color": COLOURS[place % len(COLOURS)],
        "marker": MARKERS[(place + turn) % len(MARKERS)],
        "linestyle": DASHES[turn % len(DASHES)],
        "markersize": 5,
    }


def _by_series(found: Sequence[Row]) -> dict[str, list[Row]]:
    series: dict[str, list[Row]] = {}
    for row in found:
        series.setdefault(row.section.series or row.name, []).append(row)
    return series


def _percent(stat: Stat | None) -> tuple[float, float]:
    return (0.0, 0.0) if stat is None else (100 * stat.mean, 100 * (stat.spread or 0.0))


def _measure(found: Sequence[Row]) -> str:
    return f"{measure_title(measures(found)[0])} on the held-out notes, %"
