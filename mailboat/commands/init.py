"""`mailboat init`: the configuration files of a federation, every setting explained in them."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Annotated

import typer

from mailboat import console
from mailboat.files import making
from shared.errors import ConfigError

TEMPLATES = Path(__file__).parent.parent / "templates"
SHIPPED_MODEL = Path(__file__).parent.parent / "assets" / "base-llama-16"


def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write into; it is made when missing.")],
    *,
    name: Annotated[str, typer.Option(help="Name of the federation: lower-case letters, digits, - and _.")] = "demo",
    model: Annotated[
        str | None,
        typer.Option(help="Base model: a folder, or an id on the Hugging Face hub; default: the shipped one."),
    ] = None,
    broker: Annotated[str, typer.Option(help="Where the broker is: mqtt://host:port or mqtts://host:port.")] = (
        "mqtt://127.0.0.1:1883"
    ),
    sites: Annotated[
        int,
        typer.Option(min=1, max=64, help="Write site-1.toml, site-2.toml, ... to try several sites on one machine."),
    ] = 1,
    sealed: Annotated[
        bool,
        typer.Option("--sealed", help="Sign and encrypt everything; the files name kits that `provision` makes."),
    ] = False,
) -> None:
    """Write federation.toml, coordinator.toml and site.toml with every setting explained, and say what comes next."""
    values = {"NAME": name, "MODEL": _model(model), "BROKER": broker}
    files = {
        "federation.toml": _fill("federation.toml", values),
        "coordinator.toml": _fill("coordinator.toml", values),
        **{_site_file(number, sites): _site_text(number, values) for number in range(1, sites + 1)},
    }
    if sites > 1 and not sealed:
        files = {file: _on_one_machine(text) for file, text in files.items()}
    if sealed:
        if not broker.startswith("mqtts://"):
            raise ConfigError(
                f"{broker} has no TLS", hint="name the broker of a sealed federation as mqtts://host:8883"
            )
        files = {file: _seal(text, f"{_holder(file)}-kit") for file, text in files.items()}
    _check(files)
    _write(folder, files)
    for line in _first_sealed_steps(folder, list(files)) if sealed else _next_steps(folder, sites):
        console.result().print(line, markup=False)


def _fill(template: str, values: dict[str, str]) -> str:
    text = (TEMPLATES / template).read_text(encoding="utf-8")
    for key, value in values.items():
        text = text.replace(f"@{key}@", json.dumps(value, ensure_ascii=False))  # a JSON string is a TOML string
    return text


def _site_file(number: int, sites: int) -> str:
    return "site.toml" if sites == 1 else f"site-{number}.toml"


def _site_text(number: int, values: dict[str, str]) -> str:
    site = f"site-{number}"
    return _fill("site.toml", {**values, "SITE": site, "STORAGE": f"{site}-storage", "NOTES": f"notes/{site}"})


def _on_one_machine(text: str) -> str:
    """The same file with one thread for training: several sites that each take all cores hold one another up."""
    return re.sub(r"^# threads = 0$", "threads = 1", text, flags=re.MULTILINE)


def _holder(file: str) -> str:
    """Whose kit a file names."""
    return "site-1" if file == "site.toml" else file.removesuffix(".toml")


def _seal(text: str, kit: str) -> str:
    """The same file with the settings of a sealed federation, which stand in it as comments, in force."""
    values = {
        "mode": "sealed",
        "kit": kit,
        "ca_file": f"{kit}/ca.crt",
        "cert_file": f"{kit}/tls.crt",
        "key_file": f"{kit}/tls.key",
    }
    return re.sub(
        rf'^# ({"|".join(values)}) = ".*"$',
        lambda found: f'{found[1]} = "{values[found[1]]}"',
        text,
        flags=re.MULTILINE,
    )


def _model(given: str | None) -> str:
    """The absolute path of a model's folder, or a hub id as it was given."""
    if given is None:
        return str(SHIPPED_MODEL)
    path = Path(given).expanduser()
    if path.is_dir():
        return str(path.resolve())
    if path.is_absolute() or given.startswith((".", "~")):
        raise ConfigError(f"{given}: no such folder", hint="--model takes a model's folder or its id on the hub")
    return given


def _check(files: dict[str, str]) -> None:
    """Raise ConfigError when a value from the command line would make a file that cannot be loaded."""
    from shared.config import CoordinatorConfig, FederationConfig, Section, SiteConfig
    from shared.configfile import parse_config

    kinds: dict[str, type[Section]] = {"federation.toml": FederationConfig, "coordinator.toml": CoordinatorConfig}
    try:
        for name, text in files.items():
            parse_config(tomllib.loads(text), kinds.get(name, SiteConfig), name)
    except ConfigError as error:
        raise ConfigError(error.message, hint="nothing was written; give another --name or --broker") from None


def _write(folder: Path, files: dict[str, str]) -> None:
    there = [name for name in files if (folder / name).exists()]
    if there:
        raise ConfigError(
            f"{folder} already holds {', '.join(there)}",
            hint="nothing was written; name a new folder, or move them away",
        )
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file", hint="name a folder")
    with making(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")


def _next_steps(folder: Path, sites: int) -> list[str]:
    names = ["federation.toml", "coordinator.toml", *(_site_file(number, sites) for number in range(1, sites + 1))]
    return [
        f"Wrote {', '.join(names)} to {folder}. Each setting is explained there.",
        "",
        f"To try it on this machine, from that folder (cd {folder}), each line in a terminal of its own:",
        "",
        f"  mailboat data make --out notes --sites {sites}    # synthetic notes, once",
        "  mailboat broker run                         # or any MQTT broker that the files name",
        "  mailboat coordinator run",
        *(f"  mailboat site run --config {_site_file(number, sites)}" for number in range(1, sites + 1)),
        "",
        "and to watch it:",
        "",
        "  mailboat doctor",
        "  mailboat status",
        "  mailboat audit tail -f",
    ]


def _first_sealed_steps(folder: Path, names: list[str]) -> list[str]:
    return [
        f"Wrote {', '.join(names)} to {folder}. Each setting is explained there.",
        "",
        "federation.toml is for every machine, each other file for its own; kits of keys go beside them:",
        "",
        "  mailboat provision init authority --broker-host HOST    # here; HOST as in broker.url",
        "  mailboat site enroll --name site-1                      # at the site; the same for each",
        "",
        "Both say what to do next; the whole way is in docs/operating.md.",
    ]
