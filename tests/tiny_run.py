"""A federation with a tiny real model: real coordinator, agents, broker and disks; each worker in this process.

What a method does to real tensors is seen in seconds this way: torch is loaded once, and nothing else is false.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from coordinator.service import run_coordinator
from edge_client import pipe
from edge_client.agent import Agent
from edge_client.layout import LOCK
from edge_client.outbox import Outbox
from edge_client.privacy.ledger import Charge, Limit
from edge_client.privacy.metered import metered
from edge_client.session import Identity
from edge_client.states import States
from edge_client.training import Standing
from edge_client.worker import Worker
from edge_client.worker_client import load_request
from mailboat.sealing import INITIAL, seal
from shared import durable
from shared.config import CoordinatorConfig, FederationConfig, SiteConfig
from shared.configfile import load_config
from shared.ids import new_session_id
from shared.lock import FolderLock
from shared.store import FrameStore
from shared.tensorfile import F32Array
from tests.helpers import run_async
from tests.toys import HASTY
from tests.unit.edge_client import tiny

_ONE_AT_A_TIME = threading.Lock()
"""Torch's generator is this process's only one, and transformers loads models through settings of the process."""


class WorkerHere:
    """The real worker of one site, called directly instead of through a pipe; `loaded` is what it found."""

    standing = Standing()

    def __init__(self, config: SiteConfig, federation: FederationConfig, own: Callable[[], Path | None]) -> None:
        self._worker = Worker(lambda _: None)
        self._own = own
        initial = config.storage / "initial.safetensors" if federation.codec.steps else None
        with _ONE_AT_A_TIME:
            found = self._worker.handle(load_request(config, federation).model_copy(update={"initial": initial}))
        assert isinstance(found, pipe.Loaded), found
        self.loaded = found
        if initial is not None:  # what steps are added to
            States(config.storage / "states", federation, found.plan.fingerprint).begin(initial)

    async def train(
        self,
        state: Path,
        base_version: int,
        delta: Path,
        *,
        on_progress: Callable[[float, float], None],
        so_far: tuple[Charge, ...] = (),
        limits: tuple[Limit, ...] = (),
    ) -> pipe.Trained:
        """As the worker's client."""
        request = pipe.Train(
            state=state, base_version=base_version, out=delta, own=self._own(), so_far=so_far, limits=limits
        )
        answer = await asyncio.to_thread(self._handle, request)
        assert isinstance(answer, pipe.Trained), answer
        on_progress(1.0, answer.metrics["loss"])
        return answer

    def _handle(self, request: pipe.Train) -> pipe.Answer:
        with _ONE_AT_A_TIME:
            return self._worker.handle(request)


def write_tiny(
    root: Path,
    url: str,
    *,
    sites: int = 2,
    mode: str = "sync",
    versions: int = 2,
    task: str = "max_length = 32\n",
    federation: str = "",
    codec: str = 'down = "f32"',
    locals_: Mapping[str, str] | None = None,
) -> None:
    """Write model, notes and configuration files below `root`.

    `task` is the section of that name, `codec` ends its own; `federation` follows the sections that any federation
    has, `locals_` those of a site, by name.
    """
    tiny.save_model(root / "model", "llama")
    (root / "federation.toml").write_text(
        f'[federation]\nname = "tiny"\nversions = {versions}\nseed = 5\n[model]\nbase = "{root / "model"}"\n'
        f'[task]\n{task}[codec]\nup = "f32"\n{codec}\n'
        f'[aggregation]\nmode = "{mode}"\nquorum = {sites}\n{federation}'
    )
    broker = f'[broker]\nurl = "{url}"\n[link]\n{HASTY}'
    (root / "coordinator.toml").write_text(
        f'federation = "federation.toml"\nstorage = "coordinator"\nexit_when_done = true\nmin_free_mib = 1\n{broker}'
    )
    for number in range(1, sites + 1):
        name = f"site-{number}"
        tiny.write_conll(root / f"{name}.conll", tiny.notes(8, seed=number))
        (root / f"{name}.toml").write_text(
            f'name = "{name}"\nfederation = "federation.toml"\nstorage = "{name}"\nmin_free_mib = 1\nthreads = 1\n'
            f'{broker}[data]\nnotes = "{name}.conll"\n{(locals_ or {}).get(name, "")}'
        )


def run_tiny(root: Path, *, sites: int = 2) -> dict[str, pipe.Loaded]:
    """Seal and run the whole federation, and return what each site's worker found."""
    config = load_config(root / "coordinator.toml", CoordinatorConfig)
    federation = load_config(config.federation, FederationConfig)
    durable.make_folder(config.storage)
    plan = seal(config.storage, federation)
    found: dict[str, pipe.Loaded] = {}

    async def everybody() -> None:
        # Models are loaded one after the other, and a buffered round would not wait for the last one.
        ready = [await _loaded(root / f"site-{number}.toml", federation) for number in range(1, 1 + sites)]
        found.update((site.name, worker.loaded) for site, _outbox, worker in ready)
        async with asyncio.TaskGroup() as group:
            group.create_task(run_coordinator(config, federation, plan, config.storage / INITIAL))
            for site in ready:
                group.create_task(_take_part(federation, *site))

    run_async(everybody(), timeout_s=90)
    return found


async def _loaded(path: Path, federation: FederationConfig) -> tuple[SiteConfig, Outbox, WorkerHere]:
    """A site whose worker has model and notes."""
    config = load_config(path, SiteConfig)
    durable.make_folder(config.storage)
    outbox = Outbox(config.storage)
    return config, outbox, await asyncio.to_thread(WorkerHere, config, federation, outbox.own.newest)


async def _take_part(federation: FederationConfig, config: SiteConfig, outbox: Outbox, worker: WorkerHere) -> None:
    """What `mailboat site run` does after loading the model."""
    plan = worker.loaded.plan
    identity = Identity(
        site=config.name,
        session=new_session_id(),
        fingerprint=plan.fingerprint,
        config_sha256=plan.config_sha256,
        frozen_sha256=plan.frozen_sha256,
        software="tiny",
    )
    with FolderLock(config.storage / LOCK, holder="site"):
        await Agent(config, federation, identity, outbox, metered(worker, outbox, config, federation)).run()


def updates_of(root: Path) -> dict[tuple[str, int], dict[str, F32Array]]:
    """The tensors of each update that the coordinator keeps, by site and base version."""
    store = FrameStore(root / "coordinator" / "updates")
    found = {}
    for each in store.ids():
        stored = store.get(each)
        assert stored is not None
        facts = stored.manifest.update
        with stored.open_tensors(verify=True) as reader:
            found[facts.site, facts.base_version] = dict(reader.tensors())
    return found


def metrics_of(root: Path) -> dict[tuple[str, int], dict[str, float]]:
    """What each update says of itself, by site and base version."""
    store = FrameStore(root / "coordinator" / "updates")
    kept = [stored.manifest.update for each in store.ids() if (stored := store.get(each))]
    return {(facts.site, facts.base_version): facts.metrics for facts in kept}
