"""Two thousand worlds, each from its seed: what must hold at any time does, and after the faults comes the end."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from shared.transfer import Sender
from tests.sim.campaign import Failure, try_seed
from tests.sim.mutations import MUTATIONS, Mutation
from tests.sim.runner import first_failure
from tests.sim.weather import SEALED, STEPPED, Weather, scenario
from tests.sim.world import World, run_world

SEEDS = 2000
SEALED_SEEDS = 50
STEPPED_SEEDS = 300
CHUNK = 25
ROOT = Path(__file__).parents[2]
FAULTS = {
    "broker restarted",
    "chunk garbled",
    "clock jumped",
    "cut off for long",
    "disk full",
    "forged or repeated message",
    "gone for ever",
    "journal failed",
    "killed",
    "killed for long",
    "link cut",
    "link dead, unnoticed",
    "loss is no number",
    "message doubled",
    "message lost",
    "power lost",
    "queue overflowed",
    "read failed",
    "retained messages forgotten",
    "stood still",
    "stopped in good order",
    "sync failed",
    "transfer spoilt at rest",
    "write failed",
}

# A hundred milliseconds a world; but what a machine takes that does much else is not known.
pytestmark = pytest.mark.timeout(900)


@pytest.mark.parametrize(
    "first",
    [
        *range(0, SEEDS, CHUNK),
        *range(SEALED, SEALED + SEALED_SEEDS, CHUNK),
        *range(STEPPED, STEPPED + STEPPED_SEEDS, CHUNK),
    ],
)
def test_the_promises_hold_in_every_world(first: int) -> None:
    """Whatever breaks, drops, doubles, fills up, dies or comes late; see `witness.py` for what is promised."""
    failure = first_failure(range(first, first + CHUNK))
    assert failure is None, str(failure)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name.replace(" ", "-"))
def test_a_deliberate_bug_is_found(mutation: Mutation) -> None:
    """Within the number of seeds that the list states; and the code as it is holds in the world that found it."""
    with mutation.applied():
        found = first_failure(mutation.seeds)
    assert found is not None, f"{mutation.within} worlds do not notice that {mutation.name}"
    assert not isinstance(try_seed(found.seed), Failure)
    assert f"--seed {found.seed} --trace" in str(found)


def test_a_mutation_is_gone_after_its_block() -> None:
    """Or the next test would test another program."""
    before = Sender.take
    (mutation,) = [each for each in MUTATIONS if each.changes[0][:2] == (Sender, "take")]
    with mutation.applied():
        assert Sender.take is not before
    assert Sender.take is before


def test_a_seed_is_one_world_in_any_process() -> None:
    """Every byte that the broker saw is the same again, whatever order Python gives to its sets."""
    seed = 7
    told = [f"{run_world(seed).broker.digest:08x}" for _ in range(2)]
    for hash_seed in ("1", "2"):
        ran = subprocess.run(
            [sys.executable, "-m", "tests.sim", "--seed", str(seed), "--trace"],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        )
        told.append(ran.stdout.split()[-1])
        assert "Announce(" in ran.stdout
    assert len(set(told)) == 1


def test_every_kind_of_fault_and_every_mode_occurs() -> None:
    """A fault that no seed draws would be a promise that nothing tests."""
    stepped = [scenario(seed) for seed in range(STEPPED, STEPPED + 60)]
    assert {world.federation.codec.down for world in stepped} == {"int8", "int4", "topk2", "bf16"}
    assert {world.federation.codec.steps for world in stepped} == {1, 2, 3, 4, 16}
    assert {world.sealed for world in stepped} == {False, True}
    worlds = [scenario(seed) for seed in (*range(200), *range(SEALED, SEALED + 20))]
    for name in Weather.__slots__:
        assert len({getattr(world.weather, name) for world in worlds}) > 1, name
    assert {world.federation.aggregation.mode for world in worlds} == {"sync", "fedbuff", "fedasync"}
    merging = [world.federation.aggregation for world in worlds]
    assert {section.rule for section in merging} == {"mean", "ca2fl", "multi-krum"}
    assert {section.quality for section in merging} == {"none", "exp-loss", "size-exp-loss"}
    assert any(site.leaves_s is not None for world in worlds for site in world.sites)
    assert any(str(world).endswith("no faults") for world in worlds)


def test_every_kind_of_fault_befalls() -> None:
    """What the weather promises happens in some world, and is counted."""
    ended = [try_seed(seed) for seed in (*range(1, 100), SEALED + 1)]
    befell = sum((world.faults for world in ended if isinstance(world, World)), Counter[str]())
    assert befell.keys() == FAULTS
