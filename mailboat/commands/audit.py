"""`mailboat audit`: what has happened, line by line, and the life of one update."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mailboat import console
from mailboat.commands import audit_proof
from shared import durable
from shared.errors import ConfigError

if TYPE_CHECKING:
    from coordinator.views import UpdateLife
    from shared.manifest import Manifest

app = typer.Typer(
    help="What has happened to each update and version, from the coordinator's journal.", no_args_is_help=True
)

_CONFIG = typer.Option("--config", "-c", help="The coordinator's configuration file.")
_JSON = typer.Option("--json", help="Print JSON.")
_DEFAULT = Path("coordinator.toml")

POLL_S = 0.2


@app.command()
def tail(
    *,
    config: Annotated[Path, _CONFIG] = _DEFAULT,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with new lines until Ctrl-C.")] = False,
    version: Annotated[int | None, typer.Option(help="Only what made this version, or started from it.")] = None,
    site: Annotated[
        str | None, typer.Option(help="Only this site's updates, and the versions they are part of.")
    ] = None,
    rule: Annotated[
        str | None, typer.Option(help="Only what was rejected, dropped or put into quarantine under this rule.")
    ] = None,
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Print the audit trail: each update accepted or rejected, each version, one line each, times in UTC."""
    from mailboat.follow import follow_lines, read_lines
    from shared.audit import Query, render, select

    path = _storage(config) / "audit.jsonl"
    if not follow and not path.exists():
        raise ConfigError(f"{path.parent}: no run has begun there", hint="start one with: mailboat coordinator run")
    lines = follow_lines(path, lambda: time.sleep(POLL_S)) if follow else read_lines(path)
    out = console.result()
    for line in select(lines, Query(version=version, site=site, rule=rule)):
        if as_json:
            out.file.write(json.dumps(dict(line), separators=(",", ":"), ensure_ascii=False) + "\n")
            out.file.flush()
        else:
            out.print(render(line), markup=False, style=_STYLES.get(line["kind"], ""))


_STYLES = {"rejected": "yellow", "dropped": "yellow", "committed": "bold", "finished": "bold green"}


@app.command()
def show(
    update_id: Annotated[str, typer.Argument(metavar="UPDATE_ID", help="An update's id, or its first digits.")],
    *,
    config: Annotated[Path, _CONFIG] = _DEFAULT,
    extract: Annotated[
        Path | None, typer.Option(help="Also write the update's tensors to this safetensors file, verified.")
    ] = None,
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Tell the life of one update: where it came from, when it was decided, and which version it is part of."""
    from coordinator.views import find_update, load_run
    from shared.store import FrameStore

    storage = _storage(config)
    life = find_update(load_run(storage), update_id)
    frames = storage / "updates" / f"{life.update_id}.frames"
    stored = FrameStore(storage / "updates").get(life.update_id) if frames.exists() else None
    if extract is not None:
        if stored is None:
            raise ConfigError(
                f"the bytes of update {life.update_id[:8]} are not kept",
                hint="those of rejected updates are not, nor those that were pruned",
            )
        if extract.exists():
            raise ConfigError(f"{extract} is already there", hint="name a new file")
        durable.write_once(extract, stored.plain())
    manifest = stored.manifest if stored is not None else None
    if as_json:
        console.print_json({**dataclasses.asdict(life), "manifest": _facts(manifest) if manifest else None})
        return
    for label, text in _story(life, manifest):
        console.result().print(f"{label:<12s} {text}", markup=False)
    if extract is not None:
        console.say(f"tensors written to {extract}")


audit_proof.register(app)


def _storage(config: Path) -> Path:
    from shared.config import CoordinatorConfig
    from shared.configfile import load_config

    return load_config(config, CoordinatorConfig).storage


def _facts(manifest: Manifest) -> dict[str, object]:
    return {
        "metrics": dict(manifest.update.metrics),
        "codec": manifest.codec,
        "file_size": manifest.file_size,
        "wire_bytes": manifest.wire_bytes,
        "chunks": manifest.frames,
        "created": manifest.created,
    }


def _story(life: UpdateLife, manifest: Manifest | None) -> Iterator[tuple[str, str]]:
    yield "update", life.update_id
    yield "site", life.site
    if life.base_version is not None:
        yield "trained", f"from version {life.base_version} on {life.examples} examples; delta norm {life.norm:.4g}"
    if manifest is not None:
        yield "sealed", f"{_time(manifest.created)} by the site's clock"
        yield "sent", f"{manifest.wire_bytes} bytes in {manifest.frames} chunks, codec {manifest.codec}"
        metrics = manifest.update.metrics
        if {"epsilon", "delta"} <= metrics.keys():
            yield "privacy", f"epsilon {metrics['epsilon']:.4g} at delta {metrics['delta']:g} by then, as its site says"
        if metrics:
            yield "metrics", ", ".join(f"{name} {value:.4g}" for name, value in sorted(metrics.items()))
    yield "manifest", f"sha256 {life.manifest_sha256}"
    if life.file_digest is not None:
        yield "file", f"blake3 {life.file_digest}"
    if life.fate == "rejected":
        yield "rejected", f"{_time(life.decided_at)}  {life.rule}: {life.detail}"
        return
    yield "accepted", _time(life.decided_at)
    if life.loss is not None:
        yield "measured", f"loss {life.loss:.4g} on the coordinator's notes"
    if life.settled_at is None:
        yield "waiting", "for the round to close"
    elif life.fate == "quarantined":
        yield "quarantine", f"{_time(life.settled_at)}  {life.rule}: {life.detail}"
    elif life.fate == "dropped":
        yield "dropped", f"{_time(life.settled_at)}  {life.rule}"
    else:
        part = f"late by {life.staleness}, weight {life.weight:.4g}"
        into = f"into version {life.version}" if life.weight else f"with version {life.version}, which left it out"
        yield "merged", f"{_time(life.settled_at)}  {into}, {part}"


def _time(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(at))
