"""`mailboat export` and `mailboat evaluate`: a version as a model, and how good a model is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mailboat import console
from shared.errors import ConfigError

if TYPE_CHECKING:
    from mailboat.subject import Subject
    from shared.config import FederationConfig

_CONFIG = typer.Option("--config", "-c", help="The coordinator's configuration file.")
_DEFAULT = Path("coordinator.toml")
_SITE = typer.Option("--site", help="A site's configuration file instead: its newest state, and what stays there.")


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
    site: Annotated[Path | None, _SITE] = None,
) -> None:
    """Write a version as a Hugging Face model folder, for from_pretrained of transformers.

    It is the published state, as the sites have it: with codec.down = "int8", say, its trained tensors are rounded.
    Where the federation trains adapters, these alone are written, for PeftModel.from_pretrained.
    """
    from mailboat import modelling

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is not an empty folder", hint="name a new one")
    subject = _subject(config, site, version)
    if full_precision and subject.master_digest is None:
        raise ConfigError("--full-precision and --site were both given", hint="only a coordinator has the master")
    personal = modelling.export_state(subject, out, merged=merged, full_precision=full_precision)
    console.say(f"{subject.title}{subject.detail(full_precision=full_precision)} written to {out}")
    if personal:
        whose = f"{subject.site}'s own" if subject.site else "as every site began with them: each site keeps its own"
        console.say(f"{len(personal)} tensors of layers.personal, {personal[0]} first, are {whose}")


def evaluate(  # noqa: PLR0913 - an argument for each option
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
    site: Annotated[Path | None, _SITE] = None,
    device: Annotated[
        str, typer.Option(help="cpu, cuda or cuda:N; auto: the first GPU of CUDA where there is one.")
    ] = "auto",
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out notes that cannot be read, and count them.")
    ] = (False),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare a model's findings with annotated notes, by the measures of the federation's task.

    For ner these are strict F1 (exact spans) and lenient F1 (overlapping spans), for labels of whole notes micro and
    macro F1.
    """
    from mailboat import modelling
    from shared.config import CoordinatorConfig
    from shared.configfile import load_config

    if model is not None and (version is not None or site is not None):
        raise ConfigError(f"--model and --{'site' if site else 'version'} were both given", hint="give one of them")
    compute = modelling.on_device(device)
    if model is not None:
        path = federation_file or load_config(config, CoordinatorConfig).federation
        measured = modelling.score_model(model, _federation(path), notes, compute=compute, skip_bad=skip_bad)
        subject = str(model)
    else:
        chosen = _subject(config, site, version)
        measured = modelling.score_state(chosen, notes, compute=compute, skip_bad=skip_bad)
        subject = chosen.title
    if as_json:
        console.print_json({"model": subject, **measured.plain()})
        return
    for line in measured.lines(subject):
        console.result().print(line, markup=False)


def _subject(config: Path, site: Path | None, version: int | None) -> Subject:
    from mailboat.subject import of_coordinator, of_site
    from shared.config import CoordinatorConfig, SiteConfig
    from shared.configfile import load_config

    if site is None:
        return of_coordinator(load_config(config, CoordinatorConfig), version)
    if version is not None:
        raise ConfigError("--version and --site were both given", hint="a site holds its newest state alone")
    return of_site(load_config(site, SiteConfig))


def _federation(path: Path) -> FederationConfig:
    from shared.config import FederationConfig
    from shared.configfile import load_config

    return load_config(path, FederationConfig)
