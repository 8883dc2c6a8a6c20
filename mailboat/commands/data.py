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
        str, typer.Option(help="What they are for: ner or extraction, or classification or multilabel.")
    ] = "ner",
    as_json: Annotated[bool, typer.Option("--json", help="Print what was written as JSON.")] = False,
) -> None:
    """Write synthetic discharge notes: marked problems, treatments and tests (i2b2/VA 2010 layout), or coded stays.

    Coded stays have ICD-9 codes of what they name, in the layout of MIMIC-III. `labels` for federation.toml is printed.
    """
    from mailboat.synth import find_synthetic
    from shared.config import TaskSection
    from shared.durable import storage_errors

    chosen = find_synthetic(task)
    with storage_errors(out):
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
    if TaskSection(kind=task, labels=chosen.labels) != TaskSection():
        console.say(f"in federation.toml: [task] kind = {json.dumps(task)}, labels = {json.dumps(chosen.labels)}")


@app.command()
def labels(
    folder: Annotated[Path, typer.Argument(help="A folder with DIAGNOSES_ICD.csv of MIMIC-III, gzipped or not.")],
    *,
    top: Annotated[int, typer.Option(min=1, help="How many codes: the most frequent ones.")] = 50,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with the number of stays of each code.")] = False,
) -> None:
    """Print the most frequent ICD-9 codes, as the labels of federation.toml."""
    from edge_client.data.mimic import top_codes

    found = top_codes(folder, top)
    if as_json:
        console.print_json(dict(found))
    else:
        console.result().print(f"labels = {json.dumps([code for code, _ in found])}", markup=False, soft_wrap=True)


@app.command()
def split(
    notes: Annotated[Path, typer.Argument(help="Notes of one place, in any format of the federation's task.")],
    *,
    federation: Annotated[Path, typer.Option(help="federation.toml: it names the task and the labels.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write; must be new or empty.")],
    sites: Annotated[int, typer.Option(min=1, help="How many parts: folders site-1, site-2, ...")] = 4,
    heldout: Annotated[float, typer.Option(min=0, max=0.9, help="Share of the patients kept apart for testing.")] = 0.1,
    seed: Annotated[int, typer.Option(help="The same seed divides in the same way.")] = 0,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out notes that cannot be read, and count them.")
    ] = False,
) -> None:
    """Divide notes that have labels as a whole among folders, by patient, as JSON lines.

    To try a federation on data that lies in one place, such as MIMIC-III. What is written are the notes themselves:
    the folder is as confidential as they are.
    """
    from edge_client.tasks import ANY_LABELS, ONE_LABEL
    from edge_client.tasks.registry import load_task
    from mailboat.portion import divide
    from shared.config import FederationConfig
    from shared.configfile import load_config
    from shared.errors import ConfigError

    section = load_config(federation, FederationConfig).task
    task = load_task(section)
    if task.head not in {ONE_LABEL, ANY_LABELS}:
        raise ConfigError(
            f"notes for the task {section.kind} cannot be divided: they have no labels as a whole",
            hint="divide the files among folders yourself; each note is in its own",
        )
    written = divide(
        task.read(notes),
        out,
        one_label=task.head == ONE_LABEL,
        sites=sites,
        heldout=heldout,
        seed=seed,
        skip_bad=skip_bad,
    )
    for name, count in written.notes.items():
        console.result().print(f"{out / name}: {count} notes", markup=False)
    if written.skipped:
        console.say(f"{written.skipped} left out as unreadable")
