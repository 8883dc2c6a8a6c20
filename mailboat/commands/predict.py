"""`mailboat predict`: an exported model's findings on notes."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from mailboat import console


def predict(
    *,
    model: Annotated[Path, typer.Option(help="A folder with a model or adapters, as `mailboat export` writes.")],
    notes: Annotated[
        Path, typer.Option(help="A .txt file, a .jsonl file of id and text, or a folder of them or of i2b2's.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write, a JSON line for each note; must be new.")],
    federation_file: Annotated[
        Path | None,
        typer.Option("--federation", help="federation.toml of the model's task, for a folder without mailboat.json."),
    ] = None,
    base: Annotated[
        Path | None, typer.Option(help="The base model's folder, for adapters whose own word of it does not hold here.")
    ] = None,
    device: Annotated[
        str, typer.Option(help="cpu, cuda or cuda:N; auto: the first GPU of CUDA where there is one.")
    ] = "auto",
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out notes that cannot be read, and count them.")
    ] = False,
) -> None:
    """Write what a model finds in notes: their ids and labels or places, and never a word of them.

    Entities come with their line, counted from 1, the first word and the one behind the last, counted from 0. Relations
    are told of entities that are marked: a folder with txt/ and concept/.
    """
    from mailboat import about, predicting
    from mailboat.modelling import on_device
    from shared.config import FederationConfig
    from shared.configfile import load_config

    told = load_config(federation_file, FederationConfig) if federation_file else about.federation_of(model)
    if base is not None:
        told = told.model_copy(update={"model": told.model.model_copy(update={"base": str(base)})})
    with _counted() as count:
        done = predicting.predict(model, told, notes, out, compute=on_device(device), skip_bad=skip_bad, told=count)
    left_out = f", {done.skipped} left out as unreadable" if done.skipped else ""
    console.say(f"{done.notes} notes{left_out}: {out}")


@contextlib.contextmanager
def _counted() -> Iterator[Callable[[int], None]]:
    """Yield what shows how many notes are done, on a terminal alone."""
    from rich.progress import MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("notes"), MofNCompleteColumn())
    with Progress(*columns, console=console.errors(), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("", total=None)
        yield lambda count: bar.update(task, completed=count)
