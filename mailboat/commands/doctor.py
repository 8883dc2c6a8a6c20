"""`mailboat doctor`: whether this machine can take part, and what to do where it cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mailboat import console

_STYLES = {"OK": "green", "WARN": "yellow", "FAIL": "bold red"}


def doctor(
    *,
    config: Annotated[
        list[Path] | None,
        typer.Option(
            "--config", "-c", help="coordinator.toml or site.toml; may be repeated. Default: those in this folder."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check this machine: versions, broker, both MQTT versions, access rules, clock, disk, model and notes.

    Changes nothing. Each line says OK, WARN or FAIL, and what to do. Returns 0 when nothing failed, 2 when a
    configuration is wrong, 3 when something was refused or is corrupt, 4 when something is not there now.
    """
    from mailboat.doctor import examine, status_of

    findings = []
    for finding in examine(config):
        findings.append(finding)
        if not as_json:
            out = console.result()
            out.print(f"{finding.level:<5s}", style=_STYLES[finding.level], end="")
            out.print(f"{finding.what:<12s} {finding.message}", markup=False)
            if finding.hint:
                out.print(f"{'':17s} -> {finding.hint}", markup=False)
    if as_json:
        console.print_json([finding.plain() for finding in findings])
    raise typer.Exit(status_of(findings))
