"""`mailboat coordinator`: the side that merges."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mailboat import console
from mailboat.problems import tell_problems

if TYPE_CHECKING:
    from shared.config import CoordinatorConfig, FederationConfig
    from shared.plan import SealedPlan

app = typer.Typer(help="The side that takes in the sites' updates and makes new versions.", no_args_is_help=True)

_CONFIG = typer.Option("--config", "-c", help="The coordinator's configuration file.")
_DEFAULT = Path("coordinator.toml")


@app.command()
def seal(
    *,
    config: Annotated[Path, _CONFIG] = _DEFAULT,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Do not tell the plan.")] = False,
) -> None:
    """Resolve federation.toml against the base model: which tensors are trained, and from which values.

    Writes plan.json and initial.safetensors to the storage folder. `coordinator run` does this by itself where PyTorch
    is installed; a coordinator without it is given the two files.
    """
    from mailboat.sealing import seal as seal_here

    coordinator, federation = _load(config)
    plan = seal_here(coordinator.storage, federation)
    if not quiet:
        _tell_plan(plan, federation)


@app.command("run")
def run_command(
    *,
    config: Annotated[Path, _CONFIG] = _DEFAULT,
    give_up_s: Annotated[
        float | None,
        typer.Option(min=0, help="Give up when the broker is not reached in this many seconds; else never."),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Tell every step.")] = False,
    log_json: Annotated[
        bool, typer.Option("--log-json", help="Write the log as JSON lines, also on a terminal.")
    ] = False,
) -> None:
    """Coordinate a federation: take in updates, merge them, publish versions, until Ctrl-C.

    With `exit_when_done = true` it ends by itself when the run is complete and no site is waited for.
    Everything it has promised is on disk: stopping it, or pulling the plug, and starting it again loses nothing. Ended
    by Ctrl-C it returns 130, by SIGTERM 0.
    """
    from coordinator.service import run_coordinator
    from mailboat import foreground, upkeep
    from mailboat.reach import until_done
    from mailboat.sealing import INITIAL, load_for, seal_elsewhere
    from mailboat.validating import validator_for
    from shared import logs

    coordinator, federation = _load(config)
    logs.configure(verbose=verbose, as_json=True if log_json else None)
    logs.bind(federation=federation.federation.name)
    plan = load_for(coordinator, federation)
    if plan is None:
        console.say(f"resolving the layer plan against {federation.model.base} (some seconds)")
        plan = seal_elsewhere(config, coordinator.storage, federation)
    _tell_plan(plan, federation)

    async def job() -> None:
        async with validator_for(coordinator, federation, plan) as validator:
            await run_coordinator(coordinator, federation, plan, coordinator.storage / INITIAL, validator)

    upkeep.settle_in()
    foreground.run(until_done(job(), coordinator.broker, give_up_s=give_up_s))


@app.command()
def fsck(
    *,
    config: Annotated[Path, _CONFIG] = _DEFAULT,
    repair: Annotated[
        bool, typer.Option("--repair", help="Mend what can be mended; delete what crashes left over.")
    ] = False,
    drop_lost: Annotated[
        bool,
        typer.Option("--drop-lost", help="Give up accepted updates that are damaged and not merged; tell their sites."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check the journal against every file beside it, while the coordinator does not run.

    Says what is damaged and what to do; nothing that the journal needs is deleted, but for damaged updates that are not
    merged yet with --drop-lost, for when no backup has them. Returns 0 when nothing is
    damaged (any more), 3 when damage is left.
    """
    from coordinator.fsck import check
    from mailboat.sealing import PLAN
    from shared.plan import load_plan

    coordinator, federation = _load(config)
    plan = load_plan(coordinator.storage / PLAN, federation)
    checked = check(coordinator.storage, federation, plan, repair=repair, drop_lost=drop_lost)
    tell_problems(
        coordinator.storage,
        checked.problems,
        [
            f"journal   {checked.rows} rows, the last one has hash {checked.head}",
            f"run       version {checked.version}, {checked.updates} updates kept",
            *(f"pruned    {missed}" for missed in checked.pruned),
        ],
        as_json=dataclasses.asdict(checked) if as_json else None,
    )


@app.command()
def prune(
    *,
    config: Annotated[Path, _CONFIG] = _DEFAULT,
    upto: Annotated[
        int | None, typer.Option(min=1, help="Updates merged up to this version; default: the one before the newest.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Give up the bytes of old updates, for good and on record, while the coordinator does not run.

    Manifests, digests and signatures stay, and `audit verify` goes on checking them. The versions up to there can be
    computed again no more; those after it can.
    """
    from coordinator.pruning import prune as give_up
    from coordinator.pruning import survey
    from mailboat.sealing import PLAN
    from shared.errors import ConfigError
    from shared.plan import load_plan

    coordinator, federation = _load(config)
    found = survey(coordinator.storage, federation, upto)
    plan = load_plan(coordinator.storage / PLAN, federation)
    console.say(f"{found.updates} updates, {found.size / 2**20:.1f} MiB, merged up to version {found.version}")
    if not yes and not typer.confirm("Give their bytes up for good?", err=True):
        raise ConfigError("nothing was given up", hint="--yes says it without the question")
    give_up(coordinator.storage, federation, plan, upto=found.version)
    console.say("given up; their manifests and digests stay")


def _load(config: Path) -> tuple[CoordinatorConfig, FederationConfig]:
    from shared.config import CoordinatorConfig, FederationConfig
    from shared.configfile import load_config

    coordinator = load_config(config, CoordinatorConfig)
    return coordinator, load_config(coordinator.federation, FederationConfig)


def _tell_plan(plan: SealedPlan, federation: FederationConfig) -> None:
    from mailboat.sealing import describe

    for line in describe(plan, federation):
        console.say(line)
