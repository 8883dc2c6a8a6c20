"""A federation without a language model: real coordinator, real site agent, real broker and disks, toy trainer.

The toy adds a known constant to every tensor, so that a test can work out each version by hand. Both ends can run as
processes of their own (`python -m tests.toys coordinator|site CONFIG`), to be killed at will.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
from blake3 import blake3
from safetensors.numpy import load_file, save_file

from coordinator.journal import Journal
from coordinator.records import Record
from coordinator.service import run_coordinator
from coordinator.validation import Validator
from edge_client.agent import Agent
from edge_client.outbox import Outbox
from edge_client.session import Identity
from edge_client.training import Standing, Trainer
from shared import durable
from shared.config import CoordinatorConfig, FederationConfig, SiteConfig
from shared.configfile import load_config
from shared.errors import MailboatError
from shared.ids import new_session_id
from shared.plan import SealedPlan, load_plan
from tests.helpers import until
from tests.kits import Kits

HASTY = "stall_s = 1.0\nbackoff_cap_s = 2.0\nwindow = 4\n"
"""[link] of tests that wait for a time-out; others measure the defaults."""
INITIAL = 1.0
"""Every value of version 0."""


@dataclass(frozen=True, slots=True)
class ToyTrained:
    """What the toy reports."""

    examples: int
    metrics: dict[str, float]
    own: Path | None = None


class ToyTrainer:
    """Adds `step` to every value, after `seconds`."""

    standing = Standing()

    def __init__(self, *, step: float, seconds: float, examples: int) -> None:
        self.step = step
        self.seconds = seconds
        self.examples = examples

    async def train(
        self, state: Path, base_version: int, delta: Path, *, on_progress: Callable[[float, float], None]
    ) -> ToyTrained:
        """Write a delta of `step` everywhere."""
        await asyncio.sleep(self.seconds)
        on_progress(1.0, 0.0)
        tensors = load_file(state)
        save_file({name: np.full(value.shape, self.step, np.float32) for name, value in tensors.items()}, delta)
        return ToyTrained(self.examples, {"loss": 1.0 / (1 + base_version)})


class Gated(ToyTrainer):
    """Trains when the test says so: until then the run stands still at version `upto` and its processes stay."""

    def __init__(self, gate: asyncio.Event, upto: int) -> None:
        super().__init__(step=1.0, seconds=0.0, examples=10)
        self.gate = gate
        self.upto = upto

    async def train(
        self, state: Path, base_version: int, delta: Path, *, on_progress: Callable[[float, float], None]
    ) -> ToyTrained:
        """As the toy, after the gate."""
        if base_version >= self.upto:
            await self.gate.wait()
        return await super().train(state, base_version, delta, on_progress=on_progress)


class InTurn(ToyTrainer):
    """Trains from a version once `may` says so of it, so that a test tells which update goes into which version.

    One of which it never says so is given up when the run is over.
    """

    def __init__(self, may: Callable[[int], bool], *, step: float) -> None:
        super().__init__(step=step, seconds=0.0, examples=10)
        self.may = may

    async def train(
        self, state: Path, base_version: int, delta: Path, *, on_progress: Callable[[float, float], None]
    ) -> ToyTrained:
        """As the toy, when its turn has come."""
        await until(lambda: self.may(base_version))
        return await super().train(state, base_version, delta, on_progress=on_progress)


class RandomTrainer(ToyTrainer):
    """Adds random numbers, so that steps round; keeps the digest of each state that it was given."""

    def __init__(self, seed: int, *, seconds: float = 0.05) -> None:
        super().__init__(step=0.0, seconds=seconds, examples=10)
        self.given: dict[int, str] = {}
        self._rng = np.random.default_rng(seed)

    async def train(
        self, state: Path, base_version: int, delta: Path, *, on_progress: Callable[[float, float], None]
    ) -> ToyTrained:
        """Write a random delta."""
        self.given[base_version] = blake3(state.read_bytes()).hexdigest()
        await asyncio.sleep(self.seconds)
        on_progress(1.0, 0.0)
        shapes = {name: values.shape for name, values in load_file(state).items()}
        save_file({name: self._rng.normal(0, 0.01, shape).astype(np.float32) for name, shape in shapes.items()}, delta)
        return ToyTrained(self.examples, {})


class ToyValidator:
    """Takes the distance of a state's first value from `ideal` as its loss, after `seconds`."""

    def __init__(self, *, ideal: float, seconds: float = 0.0) -> None:
        self.ideal = ideal
        self.seconds = seconds

    async def loss(self, state: Path) -> float:
        """See Validator."""
        await asyncio.sleep(self.seconds)
        return abs(float(load_file(state)["a.weight"][0]) - self.ideal)


def toy_plan(federation: FederationConfig, parameters: int) -> SealedPlan:
    """A plan of two tensors that have `parameters` values in all."""
    return SealedPlan(
        architecture="Toy",
        depth=2,
        layers=(1,),
        tensors={"a.weight": (parameters // 2,), "b.weight": (parameters - parameters // 2,)},
        trained_parameters=parameters,
        total_parameters=2 * parameters,
        config_sha256=federation.config_sha256,
        frozen_sha256="0" * 64,
        tokenizer_sha256="0" * 64,
        labels=federation.task.labels,
    )


def write_toy(
    root: Path,
    url: str,
    *,
    sites: int,
    versions: int,
    parameters: int = 100_000,
    mode: str = "sync",
    quorum: int = 1,
    buffer: int = 2,
    slice_kib: int = 64,
    codec: str = "f32",
    down: str | None = None,
    steps: int = 0,
    feedback: float | None = None,
    sealed: bool = False,
    link: str = HASTY,
    urls: Mapping[str, str] = MappingProxyType({}),
    extra: str = "",
) -> None:
    """Write all configuration files, the sealed plan and version 0 below `root`; with `sealed`, kits as well.

    `down` is the codec of states, where it is another; `urls` holds another broker URL for some, by name; `extra`
    follows [aggregation].
    """
    if sealed:
        kits = Kits(root, "toy")
        for number in range(1, sites + 1):
            kits.site(f"site-{number}")
        extra += '[trust]\nmode = "sealed"\n'

    owed = "" if feedback is None else f"feedback = {feedback}\n"

    def local(name: str) -> str:
        kit = f'[trust]\nkit = "{name}-kit"\n' if sealed else ""
        return f'[broker]\nurl = "{urls.get(name, url)}"\n[link]\n{link}{kit}'

    (root / "federation.toml").write_text(
        f'[federation]\nname = "toy"\nversions = {versions}\n[model]\nbase = "toy"\n'
        f'[codec]\nup = "{codec}"\ndown = "{down or codec}"\nsteps = {steps}\nslice_kib = {slice_kib}\n{owed}'
        f'[aggregation]\nmode = "{mode}"\nquorum = {quorum}\nbuffer = {buffer}\ndeadline_s = 30.0\n{extra}'
    )
    (root / "coordinator.toml").write_text(
        f'federation = "federation.toml"\nstorage = "coordinator"\nexit_when_done = true\n'
        f"min_free_mib = 1\n{local('coordinator')}"
    )
    for number in range(1, sites + 1):
        (root / f"site-{number}.toml").write_text(
            f'name = "site-{number}"\nfederation = "federation.toml"\nstorage = "site-{number}"\nmin_free_mib = 1\n'
            f"{local(f'site-{number}')}"
            f'[data]\nnotes = "none"\n'
        )
    federation = load_config(root / "federation.toml", FederationConfig)
    plan = toy_plan(federation, parameters)
    storage = root / "coordinator"
    storage.mkdir(exist_ok=True)
    (storage / "plan.json").write_text(plan.model_dump_json())
    initial = {name: np.full(shape, INITIAL, np.float32) for name, shape in plan.tensors.items()}
    save_file(initial, storage / "initial.safetensors")


async def toy_coordinator(path: Path, validator: Validator | None = None) -> None:
    """What `mailboat coordinator run` does after sealing."""
    config = load_config(path, CoordinatorConfig)
    federation = load_config(config.federation, FederationConfig)
    plan = load_plan(config.storage / "plan.json", federation)
    await run_coordinator(config, federation, plan, config.storage / "initial.safetensors", validator)


async def toy_site(
    path: Path,
    *,
    step: float = 1.0,
    seconds: float = 0.05,
    examples: int = 10,
    plan: SealedPlan | None = None,
    trainer: Trainer | None = None,
) -> None:
    """What `mailboat site run` does after loading the model.

    `plan` is what it made of that, `trainer` stands in for the toy.
    """
    config = load_config(path, SiteConfig)
    federation = load_config(config.federation, FederationConfig)
    plan = plan or load_plan(config.federation.parent / "coordinator" / "plan.json", federation)
    durable.make_folder(config.storage)
    identity = Identity(
        site=config.name,
        session=new_session_id(),
        fingerprint=plan.fingerprint,
        config_sha256=plan.config_sha256,
        frozen_sha256=plan.frozen_sha256,
        software="toy",
    )
    toy = ToyTrainer(step=step, seconds=seconds, examples=examples)
    await Agent(config, federation, identity, Outbox(config.storage), trainer or toy).run()


def toy_records(root: Path) -> list[Record]:
    """The journal of the run below `root`, from its first record."""
    return journal_records(root / "coordinator")


def journal_records(storage: Path) -> list[Record]:
    """The journal in a coordinator's storage folder, from its first record."""
    with Journal.open_read(storage / "journal.sqlite") as journal:
        return list(journal.replay())


def main(role: str, path: str) -> None:
    """Run one end until it is done; exits with the error's own code."""
    seconds = float(os.environ.get("TOY_SECONDS", "0.05"))
    try:
        asyncio.run(toy_coordinator(Path(path)) if role == "coordinator" else toy_site(Path(path), seconds=seconds))
    except MailboatError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
