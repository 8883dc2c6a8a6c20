"""`mailboat data`: synthetic notes to try things with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from mailboat import console

app = typer.Typer(help="Notes to try things with; none of them is about a real patient.", no_args_is_help=True)


@app.command()
def make(
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write; must be new or empty.")],
    sites: Annotated[int, typer.Option(help="How many hospitals: folders site-1, site-2, ...")] = 4,
    notes: Annotated[int, typer.Option(help="Notes of each hospital.")] = 60,
    heldout: Annotated[int, typer.Option(help="Notes kept apart for testing, drawn from all hospitals.")] = 100,
    alpha: Annotated[
        float, typer.Option(help="How alike the hospitals are: 0.1 very different, 100 nearly the same (Dirichlet).")
    ] = 0.5,
    seed: Annotated[int, typer.Option(help="The same seed writes the same notes.")] = 0,
    task: Annotated[
        str, typer.Option(help="What they are for: ner, or classification or multilabel, which share the same notes.")
    ] = "ner",
    as_json: Annotated[bool, typer.Option("--json", help="Print what was written as JSON.")] = False,
) -> None:
    """Write synthetic discharge notes: marked problems, treatments and tests (i2b2/VA 2010 layout), or coded stays.

    Coded stays have ICD-9 codes of what they name, in the layout of MIMIC-III. `labels` for federation.toml is printed.
    """
    from mailboat.demo.tasks import find_task

    chosen = find_task(task)
    report = chosen.make(out, sites=sites, notes=notes, alpha=alpha, seed=seed, heldout=heldout)
    if as_json:
        folders = {
            name: {"notes": made.notes, "tokens": made.tokens, "labels": dict(made.labels)}
            for name, made in report.folders.items()
        }
        console.print_json({"out": str(report.out), "folders": folders})
        return
    for name, made in report.folders.items():
        kinds = ", ".join(f"{count} {label}" for label, count in made.labels.items())
        console.result().print(
            f"{report.out / name}: {made.notes} notes, {made.tokens} words, marked: {kinds}", markup=False
        )
    console.say(f"in federation.toml: [task] kind = {json.dumps(task)}, labels = {json.dumps(chosen.section.labels)}")
