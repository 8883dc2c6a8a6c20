"""`mailboat experiment`: run what stands in `experiments/`, and write its table and pictures."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mailboat import console

if TYPE_CHECKING:
    from rich.console import Console

    from mailboat.experiment.cells import Cell, Experiment
    from mailboat.experiment.progress import Bars, Lines
    from mailboat.experiment.results import Cabinet
    from mailboat.experiment.runner import Failure

ENDED_BY_SIGTERM = 143
NICENESS = 10

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)

FolderOption = Annotated[
    Path, typer.Option("--experiments", help="Folder with the experiments' TOML files and their bases.")
]
OutOption = Annotated[Path, typer.Option("--out", help="Folder for the results of all experiments.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
NameArgument = Annotated[str, typer.Argument(help="The experiment: the name of its file without .toml.")]
ExperimentsFolder, ResultsFolder = Path("experiments"), Path("docs/results")


@app.command("list")
def list_(
    *, experiments: FolderOption = ExperimentsFolder, out: OutOption = ResultsFolder, as_json: JsonOption = False
) -> None:
    """Name the experiments, and how many of their cells have a result."""
    from mailboat.experiment.cells import read_experiment
    from mailboat.experiment.results import Cabinet
    from mailboat.experiment.spec import experiment_names

    cabinet, told = Cabinet(out), []
    for name in experiment_names(experiments):
        found = read_experiment(experiments, name)
        known = [cell for cell in found.cells if cell.settings is not None]
        done = sum(cell.settings is not None and cabinet.get(cell.settings.digest) is not None for cell in known)
        told.append(
            {
                "name": name,
                "title": found.section.title,
                "cells": len(found.cells),
                "done": done,
                "not_known_here": len(found.cells) - len(known),
            }
        )
    if as_json:
        console.print_json(told)
        return
    for each in told:
        unknown = f", {each['not_known_here']} not known here" if each["not_known_here"] else ""
        line = f"{each['name']:12s} {each['title']}: {each['done']} of {each['cells']} cells done{unknown}"
        console.result().print(line, markup=False)


@app.command()
def show(
    name: NameArgument,
    *,
    experiments: FolderOption = ExperimentsFolder,
    out: OutOption = ResultsFolder,
    as_json: JsonOption = False,
) -> None:
    """Print the table of an experiment as far as it has results."""
    from mailboat.experiment.cells import read_experiment
    from mailboat.experiment.results import Cabinet

    _print(read_experiment(experiments, name), Cabinet(out), as_json=as_json)


@app.command()
def run(  # noqa: PLR0913 - an argument for each option
    name: NameArgument,
    *,
    experiments: FolderOption = ExperimentsFolder,
    out: OutOption = ResultsFolder,
    only: Annotated[
        str | None, typer.Option(help="Run only cells whose line holds this text: a base, a name, or seed 2.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, max=64, help="Cells at a time, each a process of one thread.")] = 1,
    device: Annotated[
        str,
        typer.Option(
            help="Where cells train and score: cpu, cuda or cuda:N. On a processor a cell gives the same numbers "
            "again, on a GPU nearly. Split learning stays on the processor."
        ),
    ] = "cpu",
    accept_older: Annotated[
        bool, typer.Option("--accept-older", help="Keep results that were made by other sources than the present ones.")
    ] = False,
    scratch: Annotated[
        Path | None, typer.Option(help="Folder for notes and runs while they last; default: a temporary one.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Run the cells of an experiment that have no result yet, then write its table, CSV and pictures.

    A cell that is finished is kept in OUT/cells and not run again; Ctrl-C loses what is under way, no more.
    """
    from mailboat.experiment.cells import read_experiment
    from mailboat.experiment.results import Cabinet
    from mailboat.experiment.runner import waiting
    from shared.errors import RefusedError

    experiment, cabinet = read_experiment(experiments, name), Cabinet(out)
    chosen = [cell for cell in experiment.cells if only is None or only in cell.title]
    for row, problem in {cell.row: cell.problem for cell in chosen if cell.problem}.items():
        console.say(f"not known here: {': '.join(row)}: {problem}", style="yellow")
    left = waiting(chosen, cabinet, accept_older=accept_older)
    if device != "cpu":
        _must_be_there(device)
    with tempfile.TemporaryDirectory(prefix="mailboat-experiment-") as temporary:
        failures = _run(left, cabinet, (scratch or Path(temporary)).absolute(), jobs, device)
    for path in _write(experiment, cabinet, out / name):
        console.say(str(path))
    _print(experiment, cabinet, as_json=as_json)
    if failures:
        told = "; ".join(f"{failure.title}: {failure.why}" for failure in failures)
        raise RefusedError(f"{len(failures)} of {len(left)} cells failed: {told}", rule="cells-failed")


def _must_be_there(device: str) -> None:
    """Miss a GPU before the first cell begins, not in each."""
    from edge_client.device import find_device
    from mailboat.modelling import on_device

    find_device(on_device(device))


def _run(cells: list[Cell], cabinet: Cabinet, scratch: Path, jobs: int, device: str) -> list[Failure]:
    from mailboat import foreground
    from mailboat.experiment.runner import run_cells

    scratch.mkdir(parents=True, exist_ok=True)
    found: list[list[Failure]] = []
    niceness = max(0, NICENESS - os.nice(0))

    async def job() -> None:
        with _view(console.errors(), len(cells)) as view:
            made = run_cells(cells, cabinet, scratch, view, jobs=jobs, niceness=niceness, device=device)
            found.append(await made)

    foreground.run(job())
    if not found:
        raise typer.Exit(ENDED_BY_SIGTERM)
    return found[0]


def _view(out: Console, cells: int) -> Lines | Bars:
    from mailboat.experiment.progress import Bars, Lines

    return Bars(out, cells) if out.is_terminal else Lines(out, cells)


def _write(experiment: Experiment, cabinet: Cabinet, folder: Path) -> list[Path]:
    from mailboat.experiment.plots import draw
    from mailboat.experiment.summary import rows
    from mailboat.experiment.table import cells_csv, curves_csv, markdown
    from mailboat.files import making

    found = rows(experiment, cabinet)
    with making(folder):
        folder.mkdir(parents=True, exist_ok=True)
        texts = {
            "README.md": markdown(experiment, found),
            "cells.csv": cells_csv(found),
            "curves.csv": curves_csv(found),
        }
        for file, text in texts.items():
            (folder / file).write_text(text, encoding="utf-8")
        return [*(folder / file for file in texts), *draw(experiment, found, folder)]


def _print(experiment: Experiment, cabinet: Cabinet, *, as_json: bool) -> None:
    from mailboat.experiment.summary import rows, to_plain
    from mailboat.experiment.table import markdown

    found = rows(experiment, cabinet)
    if as_json:
        console.print_json(to_plain(experiment, found))
    else:
        console.result().print(markdown(experiment, found), markup=False)
