"""`mailboat status`: where a run stands, from the coordinator's journal and its live view."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mailboat import console

if TYPE_CHECKING:
    from rich.table import Table

    from mailboat.overview import Overview


def status(
    *,
    config: Annotated[Path, typer.Option("--config", "-c", help="The coordinator's configuration file.")] = Path(
        "coordinator.toml"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say where the run stands: version, who is present and doing what, and what the coordinator waits for.

    Works on the coordinator's machine, whether or not the coordinator runs.
    """
    from mailboat.overview import load_overview
    from shared.config import CoordinatorConfig, FederationConfig
    from shared.configfile import load_config

    coordinator = load_config(config, CoordinatorConfig)
    federation = load_config(coordinator.federation, FederationConfig)
    overview = load_overview(coordinator.storage, federation, now=time.time())
    if as_json:
        console.print_json(_plain(overview))
        return
    out = console.result()
    out.print(f"federation  {overview.federation}", markup=False)
    out.print(f"version     {overview.version} of {overview.target}, {overview.mode}", markup=False)
    out.print(f"coordinator {overview.coordinator}", markup=False)
    out.print(f"waiting for {overview.waiting_for}", markup=False)
    if overview.chosen is not None:
        out.print(f"blocks      {', '.join(map(str, overview.chosen))}, chosen by importance", markup=False)
    if overview.held:
        out.print(f"held        no update is taken: {overview.held}", markup=False, style="bold red")
    out.print(f"pending     {overview.pending} updates accepted and not yet merged", markup=False)
    if overview.quarantined:
        count = f"{overview.quarantined} update{'s' if overview.quarantined > 1 else ''}"
        out.print(f"quarantine  {count} kept apart: `mailboat quarantine list`", markup=False, style="yellow")
    if overview.renewals:
        out.print(f"renewals    not taken yet by {', '.join(overview.renewals)}", markup=False)
    if overview.sites:
        out.print(_table(overview))


def _plain(overview: Overview) -> dict[str, Any]:
    return dataclasses.asdict(overview)


def _table(overview: Overview) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("site", "here", "doing"):
        table.add_column(name, no_wrap=True)
    shallow = any(site.blocks is not None for site in overview.sites)
    private = any(site.epsilon is not None for site in overview.sites)
    counts = ("merged", "waiting", "refused", "outbox", "up MB", "down MB")
    for name in ("version", *["blocks"] * shallow, *counts, *["epsilon"] * private):
        table.add_column(name, justify="right", no_wrap=True)
    for site in overview.sites:
        doing = site.phase or "-"
        if site.phase in {"training", "pulling", "uploading"}:
            doing += f" {site.progress:.0%}"
        table.add_row(
            site.site,
            "yes" if site.present else "no",
            doing,
            "-" if site.version is None else str(site.version),
            *(["all" if site.blocks is None else str(site.blocks)] if shallow else []),
            *(str(count) for count in (site.merged, site.waiting, site.rejected + site.dropped, site.outbox)),
            f"{site.bytes_up / 1e6:.1f}",
            f"{site.bytes_down / 1e6:.1f}",
            *["-" if site.epsilon is None else f"{site.epsilon:.3g}"] * private,
        )
    return table
