"""Pictures of what was measured: `python -m bench.plots` reads docs/results/*.json and draws docs/img/bench-*.png."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RESULTS, IMAGES = Path("docs/results"), Path("docs/img")
MINE, THEIRS, SECOND, THIRD = "#1b6ca8", "#9e9e9e", "#8fc1e3", "#c77700"
MEGA = 1e6
WANTED_MS = 5.0
"""What an update may cost the coordinator, at most."""

Results = Mapping[str, Any]


def draw_round(found: Results, figure: Figure) -> None:
    """A round beside the peers: seconds, processor seconds, and what the server held."""
    runs: dict[str, list[Results]] = {}
    for one in found["runs"]:
        if one["place"] == "tmpfs":
            runs.setdefault(one["run"], []).append(one)
    names = list(runs)
    of: list[tuple[str, Callable[[Results], list[float]]]] = [
        ("seconds a round", lambda one: one["seconds"]),
        ("processor seconds a round", lambda one: [sum(one["cpu_s"].values())]),
        ("MB at the server, above idle", lambda one: [one["server_mb"]]),
    ]
    for axes, (title, found_in) in zip(figure.subplots(1, len(of), sharey=True), of, strict=True):
        values = [statistics.median([each for one in runs[name] for each in found_in(one)]) for name in names]
        bars = axes.barh(names, values, color=[MINE if name.startswith("mailboat") else THEIRS for name in names])
        axes.bar_label(bars, fmt="{:,.3g}" if max(values) < 100 else "{:,.0f}", padding=3, fontsize=8)
        axes.set_xlim(right=1.2 * max(values))
        axes.set_title(title, fontsize=10)
        axes.invert_yaxis() if axes is figure.axes[0] else None
    settings = found["settings"]
    figure.suptitle(f"{settings['parameters']:g} M parameters, {settings['sites']} sites, all on tmpfs", fontsize=11)


def draw_sites(found: Results, figure: Figure) -> None:
    """The coordinator by number of sites: its processor time for an update, and its memory."""
    time, memory = figure.subplots(1, 2)
    sites = [run["sites"] for run in found["runs"]]
    for key, label, colour in (
        ("coordinator_ms_per_update", "until accepted", MINE),
        ("coordinator_ms_per_update_with_merge", "with its share of the merge", SECOND),
    ):
        time.plot(sites, [run[key] for run in found["runs"]], "o-", color=colour, label=label)
    time.axhline(WANTED_MS, color=THEIRS, linewidth=1, label="wanted")
    time.set_ylabel("coordinator, processor ms an update")
    for role, colour in (("coordinator", MINE), ("broker", THIRD)):
        memory.plot(sites, [run["peak_bytes"][role] / MEGA for run in found["runs"]], "o-", color=colour, label=role)
    memory.set_ylabel("most memory, MB")
    for axes in (time, memory):
        _by_number(axes, "sites, all at once")
    figure.suptitle(f"A buffered round of updates of {found['mb']:g} MB", fontsize=11)


def draw_local(found: Results, figure: Figure) -> None:
    """Local training: seconds an epoch and the most memory, way by way."""
    summary: Results = found["summary"]
    for row, (model, told) in zip(figure.subplots(len(summary), 2, squeeze=False), summary.items(), strict=True):
        ways: Results = told["ways"]
        for axes, key, title in zip(row, ("epoch_s", "peak_mb"), ("seconds an epoch", "peak MB"), strict=True):
            values = [way[key] for way in ways.values()]
            bars = axes.barh(list(ways), values, color=[MINE if "cached" in name else THEIRS for name in ways])
            axes.bar_label(bars, fmt="{:,.3g}" if key == "epoch_s" else "{:,.0f}", padding=3, fontsize=8)
            axes.set_xlim(right=1.2 * max(values))
            axes.set_title(f"{model}: {title}", fontsize=10)
            axes.invert_yaxis()
        row[1].set_yticklabels([])


def draw_merge(found: Results, figure: Figure) -> None:
    """The merge alone, by number of updates and codec."""
    axes = figure.subplots()
    codecs = dict.fromkeys(run["codec"] for run in found["runs"])
    for codec, colour in zip(codecs, (MINE, SECOND, THIRD), strict=False):
        runs = [run for run in found["runs"] if run["codec"] == codec]
        rates = [run["parameters_per_s"] / MEGA for run in runs]
        axes.plot([run["updates"] for run in runs], rates, "o-", color=colour, label=codec)
    axes.set_ylabel("million parameters a processor second")
    _by_number(axes, "updates merged at once")
    axes.set_title("Merging, hashing and expanding included", fontsize=10)


def _by_number(axes: Axes, label: str) -> None:
    axes.set_xscale("log")
    axes.set_xlabel(label)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)


PLOTS: Mapping[str, tuple[Callable[[Results, Figure], None], tuple[float, float]]] = MappingProxyType(
    {
        "round": (draw_round, (12, 3.2)),
        "sites": (draw_sites, (10, 3.6)),
        "local": (draw_local, (11, 5.2)),
        "merge": (draw_merge, (6.5, 3.6)),
    }
)


def main() -> int:
    """Draw them all."""
    for path in draw_all(RESULTS, IMAGES):
        sys.stdout.write(f"{path}\n")
    return 0


def draw_all(results: Path, images: Path) -> Iterator[Path]:
    """Draw each picture of the results in one folder into the other, and yield its path."""
    for name, (draw, size) in PLOTS.items():
        figure = Figure(figsize=size, dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        draw(json.loads((results / f"{name}.json").read_text()), figure)
        path = images / f"bench-{name}.png"
        figure.savefig(path)
        yield path


if __name__ == "__main__":
    sys.exit(main())
