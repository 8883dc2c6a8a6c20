"""Many worlds, on all cores: python -m tests.sim --seeds 100000; one again, told step by step: --seed 7 --trace."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from tests.sim import campaign
from tests.sim.campaign import Failure, many_worlds, try_seed
from tests.sim.mutations import MUTATIONS
from tests.sim.weather import SEALED, STEPPED, scenario
from tests.sim.world import run_world


def first_failure(seeds: range) -> Failure | None:
    """Run worlds until one fails."""
    with many_worlds():
        return next((ended for seed in seeds if isinstance(ended := try_seed(seed), Failure)), None)


def find_bugs() -> dict[str, int | None]:
    """The first seed that finds each of the deliberate bugs; None where none does within the stated number."""
    found: dict[str, int | None] = {}
    for mutation in MUTATIONS:
        with mutation.applied():
            failure = first_failure(mutation.seeds)
        found[mutation.name] = None if failure is None else failure.seed
        print(f"[sim] {mutation.name}: {failure or 'NOT FOUND'}", flush=True)  # noqa: T201
    return found


def publish(path: Path, result: campaign.Result) -> None:
    """Write a result, unless the file tells of more worlds."""
    before = json.loads(path.read_bytes()) if path.exists() else {}
    if sum(before.get("worlds", {}).values()) > result.count:
        print(f"[sim] {path} tells of more worlds and stays as it is")  # noqa: T201
        return
    campaign.save(path, {**campaign.published(result), "notes": before.get("notes", [])})


def main() -> None:
    """The command line; exit status 1 when a world failed or a bug was not found."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seeds", type=int, default=2000, help="how many worlds")
    parser.add_argument("--sealed", type=int, default=0, help="how many worlds of sealed federations beside them")
    parser.add_argument("--stepped", type=int, default=0, help="how many worlds whose versions travel as steps")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--campaign", type=Path, default=Path("sim-campaign.json"), help="what was done so far")
    parser.add_argument("--json", type=Path, help="write the result there when all worlds were run")
    parser.add_argument("--seed", type=int, help="run this world alone")
    parser.add_argument("--trace", action="store_true", help="tell what happens in it")
    parser.add_argument("--bugs", action="store_true", help="look for the deliberate bugs instead")
    chosen = parser.parse_args()
    if chosen.seed is not None:
        print(scenario(chosen.seed))  # noqa: T201
        world = run_world(chosen.seed, print if chosen.trace else None)
        print(f"[sim] seed {chosen.seed} held; digest {world.broker.digest:08x}")  # noqa: T201
        return
    if chosen.bugs:
        found = find_bugs()
        if chosen.json:
            campaign.save(chosen.json, {"commit": campaign.current_commit(), "found at seed": found})
        sys.exit(None in found.values())
    seeds = [
        range(STEPPED, STEPPED + chosen.stepped),
        range(SEALED, SEALED + chosen.sealed),
        range(chosen.seeds),
    ]
    result = campaign.run(seeds, chosen.workers, chosen.campaign, campaign.current_commit())
    if chosen.json:
        publish(chosen.json, result)
    sys.exit(bool(result.failures))
