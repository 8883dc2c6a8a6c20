"""The curves of a demonstration as a PNG."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mailboat.demo.report import Result
from mailboat.demo.screen import size

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAIN, SECOND, CENTRAL, ALONE, FULL = "#1b6ca8", "#8fc1e3", "#2e7d32", "#c77700", "#9e9e9e"
MEGA = 1e6


def draw(result: Result, path: Path) -> None:
    """Write the picture: F1 per version beside the baselines, and the bytes beside full-model FedAvg."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.8), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    curves, bars = figure.subplots(1, 2, width_ratios=(2.2, 1))
    _curves(curves, result)
    _bars(bars, result)
    started = sum(state != "absent" for state in result.facts.processes.values())
    figure.suptitle(
        f"Mailboat: {started} sites, {result.mode}, layers "
        f"{', '.join(map(str, result.layers))} trained, codec {result.codec}",
        fontsize=11,
    )
    figure.savefig(path)


def _curves(axes: Axes, result: Result) -> None:
    from matplotlib.ticker import MaxNLocator

    versions = sorted(result.facts.scores)
    scores = [result.facts.scores[version] for version in versions]
    for name, colour in zip(result.base.measures, (MAIN, SECOND), strict=False):
        values = [100 * score.measures[name] for score in scores]
        axes.plot(versions, values, "o-", color=colour, label=f"federated, {_short(name)}")
    if result.centralized is not None:
        central = result.centralized
        level = 100 * central.main
        axes.axhline(level, color=CENTRAL, linestyle="--", label=f"centralized, {_short(central.name)} ({level:.1f})")
    _alone(axes, result)
    axes.set_xlabel("version")
    axes.set_ylabel("F1 on the pooled held-out notes, %")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.legend(loc="best", fontsize=8)


def _alone(axes: Axes, result: Result) -> None:
    best = result.best_alone
    others_named = False
    for site, score in sorted(result.local_only.items()):
        level = 100 * score.main
        if best is not None and site == best[0]:
            label = f"best single site alone, {_short(score.name)} ({level:.1f})"
            axes.axhline(level, color=ALONE, linestyle="--", label=label)
            continue
        axes.axhline(level, color=ALONE, linestyle=":", alpha=0.6, label=None if others_named else "other sites alone")
        others_named = True


def _short(name: str) -> str:
    """The word that tells a measure from the others: strict for strict_f1; the axis says that it is an F1."""
    return name.removesuffix("_f1")


def _bars(axes: Axes, result: Result) -> None:
    wire = result.wire
    axes.set_axisbelow(True)
    axes.grid(alpha=0.25, axis="y")
    axes.bar(["Mailboat"], [wire.up / MEGA], color=MAIN, label="up")
    ours = axes.bar(["Mailboat"], [wire.down / MEGA], bottom=[wire.up / MEGA], color=SECOND, label="down")
    theirs = axes.bar(["full-model\nFedAvg"], [wire.full_fedavg / MEGA], color=FULL)
    axes.bar_label(ours, [size(wire.up + wire.down)])
    axes.bar_label(theirs, [size(wire.full_fedavg)])
    axes.set_ylabel("MB on the wire, all sites")
    axes.set_title(f"{wire.saving:.1%} fewer bytes", fontsize=10)
    axes.margins(y=0.12)
    axes.legend(loc="upper left", fontsize=8)
