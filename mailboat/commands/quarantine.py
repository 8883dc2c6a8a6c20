"""`mailboat quarantine`: updates that are sound and out of line, and what a person decides about them."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mailboat import console
from shared.errors import ConfigError

if TYPE_CHECKING:
    from coordinator.quarantine import Verdict
    from coordinator.views import UpdateLife

app = typer.Typer(
    help="Updates that the coordinator keeps apart under [admission], until somebody has looked.", no_args_is_help=True
)

_CONFIG = Annotated[Path, typer.Option("--config", "-c", help="The coordinator's configuration file.")]
_JSON = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_ID = Annotated[str, typer.Argument(metavar="UPDATE_ID", help="An update's id, or its first digits.")]
_DEFAULT = Path("coordinator.toml")


@app.command("list")
def list_command(*, config: _CONFIG = _DEFAULT, as_json: _JSON = False) -> None:
    """List the updates that are kept apart, oldest first, each with its rule."""
    from coordinator.views import load_run

    held = [life for life in load_run(_storage(config)).updates.values() if life.fate == "quarantined"]
    if as_json:
        console.print_json([dataclasses.asdict(life) for life in held])
        return
    for life in held:
        text = f"{life.update_id[:8]}  {life.site}  from version {life.base_version}  {life.rule}: {life.detail}"
        console.result().print(text, markup=False)
    if not held:
        console.say("no update is in quarantine")


@app.command()
def show(update_id: _ID, *, config: _CONFIG = _DEFAULT, as_json: _JSON = False) -> None:
    """Show one update that is kept apart, and what others of its site and of its version look like."""
    from coordinator.views import load_run

    storage = _storage(config)
    life = _held(storage, update_id)
    others = [
        each
        for each in load_run(storage).updates.values()
        if each.norm is not None
        and each.update_id != life.update_id
        and (each.site == life.site or each.base_version == life.base_version)
    ][-10:]
    if as_json:
        console.print_json(
            {"update": dataclasses.asdict(life), "beside": [dataclasses.asdict(each) for each in others]}
        )
        return
    out = console.result()
    out.print(f"update      {life.update_id} of {life.site}, from version {life.base_version}", markup=False)
    out.print(f"quarantine  {_time(life.settled_at)}  {life.rule}: {life.detail}", markup=False)
    out.print(f"examples    {life.examples}", markup=False)
    out.print(f"norm        {life.norm:.4g}", markup=False)
    for each in others:
        text = f"{each.site}  from version {each.base_version}  examples {each.examples}  norm {each.norm:.4g}"
        out.print(f"beside      {text}  {each.fate}", markup=False)
    out.print(f"tensors     mailboat audit show {life.update_id[:8]} --extract FILE", markup=False)


@app.command()
def release(update_id: _ID, *, config: _CONFIG = _DEFAULT) -> None:
    """Let an update out: it is merged like any other, or dropped if it is too late for that by now."""
    _rule_on(config, update_id, "release")


@app.command()
def drop(update_id: _ID, *, config: _CONFIG = _DEFAULT) -> None:
    """Never merge an update; its bytes are kept as evidence, and its site is told."""
    _rule_on(config, update_id, "drop")


def _rule_on(config: Path, prefix: str, verdict: Verdict) -> None:
    from coordinator.quarantine import rule_on

    storage = _storage(config)
    life = _held(storage, prefix)
    rule_on(storage, life.update_id, verdict)
    done = "released" if verdict == "release" else "dropped"
    console.say(
        f"update {life.update_id[:8]} of {life.site} will be {done} within a second, or when the coordinator runs"
    )


def _held(storage: Path, prefix: str) -> UpdateLife:
    from coordinator.views import find_update, load_run

    life = find_update(load_run(storage), prefix)
    if life.fate != "quarantined":
        raise ConfigError(
            f"update {life.update_id[:8]} is not in quarantine, it is {life.fate}", hint="see: mailboat quarantine list"
        )
    return life


def _storage(config: Path) -> Path:
    from shared.config import CoordinatorConfig
    from shared.configfile import load_config

    return load_config(config, CoordinatorConfig).storage


def _time(at: float | None) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(at or 0))
