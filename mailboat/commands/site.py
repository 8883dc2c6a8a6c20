"""`mailboat site`: one hospital's part."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from mailboat.problems import tell_problems

app = typer.Typer(help="One hospital's part: train on local notes, send updates.", no_args_is_help=True)


@app.command("run")
def run_command(
    *,
    config: Annotated[Path, typer.Option("--config", "-c", help="The site's configuration file.")] = Path("site.toml"),
    give_up_s: Annotated[
        float | None,
        typer.Option(min=0, help="Give up when the broker is not reached in this many seconds; else never."),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Tell every step.")] = False,
    log_json: Annotated[
        bool, typer.Option("--log-json", help="Write the log as JSON lines, also on a terminal.")
    ] = False,
) -> None:
    """Take part in a federation until its run is complete, or until Ctrl-C.

    Only outgoing connections to the broker are made. When the network fails, training goes on and finished updates wait
    on disk; stopping and starting again loses nothing. Ended by Ctrl-C it returns 130, by SIGTERM 0.
    """
    from edge_client.site import run_site
    from mailboat import foreground
    from mailboat.reach import until_done
    from shared import logs
    from shared.config import FederationConfig, SiteConfig
    from shared.configfile import load_config

    site = load_config(config, SiteConfig)
    federation = load_config(site.federation, FederationConfig)
    logs.configure(verbose=verbose, as_json=True if log_json else None)
    logs.bind(federation=federation.federation.name, site=site.name)
    foreground.run(until_done(run_site(site, federation), site.broker, give_up_s=give_up_s))


@app.command()
def fsck(
    *,
    config: Annotated[Path, typer.Option("--config", "-c", help="The site's configuration file.")] = Path("site.toml"),
    repair: Annotated[
        bool, typer.Option("--repair", help="Delete what crashes left over, and states that are damaged.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check the updates that wait here, the receipts, the states and the privacy ledger, while the site does not run.

    An update without its receipt is never deleted. Returns 0 when nothing is damaged (any more), 3 when damage is left.
    """
    from edge_client.fsck import check
    from shared.config import SiteConfig
    from shared.configfile import load_config

    site = load_config(config, SiteConfig)
    checked = check(site.storage, repair=repair)
    said = [f"outbox    {checked.waiting} updates wait for their receipt", f"receipts  {checked.receipts}"]
    if checked.charges:
        said.append(f"privacy   {checked.charges} trainings charged")
    tell_problems(site.storage, checked.problems, said, as_json=dataclasses.asdict(checked) if as_json else None)
