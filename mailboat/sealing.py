"""Sealing: a federation resolved against its real model, written to the coordinator's storage folder.

`plan.json` says which tensors are trained; `initial.safetensors` holds them as version 0. The plan is written last, so
that a plan that is there has its tensors beside it.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from mailboat.files import making
from shared.config import CoordinatorConfig, FederationConfig
from shared.errors import ConfigError, MailboatError, UnavailableError
from shared.plan import SealedPlan, load_plan

if TYPE_CHECKING:
    from edge_client.model import State

PLAN = "plan.json"
INITIAL = "initial.safetensors"

_BLOCK = re.compile(r"\.(\d+)\.")
"""A block's number in the names of its tensors."""

NO_TORCH = (
    "pip install 'mailboat[edge]', or seal on a machine that has it and copy plan.json and initial.safetensors here"
)


def seal(storage: Path, federation: FederationConfig) -> SealedPlan:
    """Load the base model, write plan and initial tensors, and return the plan.

    Raises ConfigError when PyTorch is not installed, when model or layer plan cannot serve, or when a run has begun in
    `storage` with another plan; UnavailableError when the disk is full or the model cannot be fetched.
    """
    try:
        from edge_client.model import seal_plan
    except ModuleNotFoundError as error:
        raise ConfigError(f"the package {error.name} is not installed here", hint=NO_TORCH) from None
    plan, initial = seal_plan(federation, federation.model.base)
    write_sealed(storage, federation, plan, initial)
    return plan


def write_sealed(storage: Path, federation: FederationConfig, plan: SealedPlan, initial: State) -> None:
    """Write `plan` and the `initial` tensors to `storage`; raises what `seal` says of the folder."""
    from shared import durable

    if _begun(storage) and _sealed(storage, federation) != plan:
        raise ConfigError(
            f"{storage} holds a run with another plan", hint="give the new federation a storage folder of its own"
        )
    with making(storage):
        durable.make_folder(storage)
        _write_initial(storage, plan, initial)
        durable.replace_atomic(storage / PLAN, plan.model_dump_json(indent=1).encode())


def resolve(federation: FederationConfig, source: str | Path) -> SealedPlan:
    """Return the plan of `federation` over the model `source`, writing nothing; ModuleNotFoundError without PyTorch."""
    from edge_client.model import seal_plan

    return seal_plan(federation, source)[0]


def seal_elsewhere(config: Path, storage: Path, federation: FederationConfig) -> SealedPlan:
    """Seal in a process of its own and return the plan: PyTorch must not stay in the coordinator's memory.

    What goes wrong there is told by that process; this one then ends with the same status (typer.Exit).
    """
    command = [sys.executable, "-m", "mailboat", "coordinator", "seal", "--quiet", "--config", str(config)]
    done = subprocess.run(command, check=False, stdin=subprocess.DEVNULL)
    if done.returncode < 0:
        raise UnavailableError(
            f"sealing was ended by signal {-done.returncode}",
            hint="signal 9 is most often the system's answer to lack of memory: the model's trained part is loaded",
        )
    if done.returncode > 0:
        raise typer.Exit(done.returncode)
    return load_plan(storage / PLAN, federation)


def describe(plan: SealedPlan, federation: FederationConfig) -> Iterator[str]:
    """Yield the lines that tell a person what will be trained, and what it saves."""
    blocks = ", ".join(map(str, plan.layers))
    yield f"plan        {federation.layers.plan}: blocks {blocks} of 0 to {plan.depth - 1} in {plan.architecture}"
    if federation.adapter.used:
        adapter = federation.adapter
        linears = ", ".join(adapter.targets) or "all linear layers"
        yield f"adapters    {adapter.kind} of rank {adapter.rank} on {linears} of these blocks, times {adapter.scale:g}"
    yield (
        f"parameters  {plan.trained_parameters:,} trained of {plan.total_parameters:,}: "
        f"{plan.saving:.1%} of the model never travels"
    )
    if plan.at_once is not None:
        largest = update_parameters(plan)
        yield (
            f"importance  an update holds {plan.at_once} of these blocks, at most {largest:,} parameters: "
            f"{1 - largest / plan.total_parameters:.1%} never travels up; a state holds them all"
        )
    if plan.personal:
        count = sum(prod(shape) for shape in plan.personal.values())
        yield f"personal    {count:,} more parameters in {len(plan.personal)} tensors are trained and stay at each site"
    if plan.residuals:
        yield (
            f"residuals   {plan.residual_parameters:,} numbers more go to the sites with each version, not back: what "
            "averaging the factors loses"
        )
    lowest = plan.layers[0]
    if lowest:
        yield f"prefix      below block {lowest} all is frozen: a site computes it once for its notes"
    else:
        yield "prefix      block 0 is trained: a site runs the whole model in each epoch"
    yield f"identity    fingerprint {plan.fingerprint[:16]}, frozen weights {plan.frozen_sha256}"


def update_parameters(plan: SealedPlan) -> int:
    """Return the most parameters that a site's update holds: of the blocks only so many as are trained at a time."""
    of_block, other = dict.fromkeys(plan.layers, 0), 0
    for name, shape in plan.tensors.items():
        number = _BLOCK.search(name)
        if number and int(number[1]) in of_block:
            of_block[int(number[1])] += prod(shape)
        elif name not in plan.residuals:
            other += prod(shape)
    return other + sum(sorted(of_block.values(), reverse=True)[: plan.at_once])


def load_for(config: CoordinatorConfig, federation: FederationConfig) -> SealedPlan | None:
    """Return the plan in a coordinator's storage folder, None when there is none; ConfigError when it does not fit."""
    path = config.storage / PLAN
    return load_plan(path, federation) if path.exists() else None


def _begun(storage: Path) -> bool:
    return (storage / "journal.sqlite").exists()


def _sealed(storage: Path, federation: FederationConfig) -> SealedPlan | None:
    try:
        return load_plan(storage / PLAN, federation)
    except MailboatError:
        return None


def _write_initial(storage: Path, plan: SealedPlan, initial: State) -> None:
    from coordinator.masters import writing

    with writing(storage / INITIAL, plan.tensors, {"mailboat.fingerprint": plan.fingerprint}) as writer:
        for name in sorted(initial):
            writer.write(name, initial[name])
