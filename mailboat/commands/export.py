"""`mailboat export` and `mailboat evaluate`: a version as a model, and how good a model is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mailboat import console
from shared.errors import ConfigError

if TYPE_CHECKING:
    from shared.config import FederationConfig

_CONFIG = typer.Option("--config", "-c", help="The coordinator's configuration file.")
_DEFAULT = Path("coordinator.toml")


def export(
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write; must be new or empty.")],
    version: Annotated[int | None, typer.Option(help="Which version; the newest when not given.")] = None,
    merged: Annotated[
        bool, typer.Option("--merged", help="Fold adapters into the weights, and write the whole model.")
    ] = False,
    full_precision: Annotated[
        bool,
        typer.Option("--full-precision", help="The coordinator's float32 master, which no site was sent."),
    ] = False,
    config: Annotated[Path, _CONFIG] = _DEFAULT,
) -> None:
    """Write a version as a Hugging Face model folder, for from_pretrained of transformers.

    It is the published state, as the sites have it: with codec.down = "int8", say, its trained tensors are rounded.
    Where the federation trains adapters, these alone are written, for PeftModel.from_pretrained.
    """
    from coordinator.views import find_version, load_run
    from mailboat import modelling
    from shared.config import CoordinatorConfig
    from shared.configfile import load_config

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is not an empty folder", hint="name a new one")
    coordinator = load_config(config, CoordinatorConfig)
    federation = _federation(coordinator.federation)
    chosen = find_version(load_run(coordinator.storage), version)
    if full_precision:
        modelling.export_master(coordinator.storage, federation, chosen, out, merged=merged)
        console.say(f"version {chosen.version} in full precision (master {chosen.master_sha256[:12]}) written to {out}")
        return
    modelling.export_version(coordinator.storage, federation, chosen, out, merged=merged)
    console.say(f"version {chosen.version} (state {chosen.state.leads_to[:12]}) written to {out}")


def evaluate(
    *,
    notes: Annotated[Path, typer.Option(help="Annotated notes to compare with.")],
    version: Annotated[
        int | None, typer.Option(help="A version of this federation; the newest when not given.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="A folder instead, with a model or adapters, such as `mailboat export` writes.")
    ] = None,
    config: Annotated[Path, _CONFIG] = _DEFAULT,
    federation_file: Annotated[
        Path | None,
        typer.Option("--federation", help="With --model: federation.toml, when there is no coordinator.toml."),
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out notes that cannot be read, and count them.")
    ] = (False),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare a model's findings with annotated notes, by the measures of the federation's task.

    For ner these are strict F1 (exact spans) and lenient F1 (overlapping spans), for labels of whole notes micro and
    macro F1.
    """
    from coordinator.views import find_version, load_run
    from mailboat import modelling
    from shared.config import CoordinatorConfig
    from shared.configfile import load_config

    if model is not None and version is not None:
        raise ConfigError("--version and --model were both given", hint="give one of them")
    if model is not None:
        path = federation_file or load_config(config, CoordinatorConfig).federation
        measured = modelling.score_model(model, _federation(path), notes, skip_bad=skip_bad)
        subject = str(model)
    else:
        coordinator = load_config(config, CoordinatorConfig)
        chosen = find_version(load_run(coordinator.storage), version)
        measured = modelling.score_version(
            coordinator.storage, _federation(coordinator.federation), chosen, notes, skip_bad=skip_bad
        )
        subject = f"version {chosen.version}"
    if as_json:
        console.print_json({"model": subject, **measured.plain()})
        return
    for line in measured.lines(subject):
        console.result().print(line, markup=False)


def _federation(path: Path) -> FederationConfig:
    from shared.config import FederationConfig
    from shared.configfile import load_config

    return load_config(path, FederationConfig)
