"""A site from its two configuration files to the end of its run: the worker, the identity, the agent."""

from __future__ import annotations

from importlib.metadata import version

import structlog

from edge_client.agent import Agent
from edge_client.layout import LOCK
from edge_client.outbox import Outbox
from edge_client.privacy.metered import check_privacy, metered
from edge_client.session import Identity
from edge_client.states import States
from edge_client.worker_client import WorkerClient
from shared import durable
from shared.config import FederationConfig, SiteConfig
from shared.ids import new_session_id
from shared.lock import FolderLock
from shared.threads import in_thread

log = structlog.get_logger("site")


async def run_site(config: SiteConfig, federation: FederationConfig) -> None:
    """Take part in one federation until its run is complete; cancelling ends it in good order.

    Raises RefusedError when the coordinator or the data refuse us, ConfigError for what this machine's files get
    wrong, CorruptError for what its disk gets wrong, UnavailableError when the worker cannot be kept alive or the disk
    is full.
    """
    check_privacy(config, federation)
    durable.make_folder(config.storage)
    with FolderLock(config.storage / LOCK, holder="site"):
        outbox = Outbox(config.storage)
        worker = WorkerClient(config, federation, own=outbox.own.newest)
        await _take_part(config, federation, outbox, worker)


async def _take_part(config: SiteConfig, federation: FederationConfig, outbox: Outbox, worker: WorkerClient) -> None:
    # Where versions travel as steps, the first thing to step on from is here already: in the base model.
    initial = config.storage / "work" / "initial.safetensors" if _begins(config, federation) else None
    trainer = metered(worker, outbox, config, federation)
    log.info("loading", model=str(config.model_dir or federation.model.base))  # half a minute on a busy machine
    async with worker:
        loaded = await worker.load(initial=initial)
        log.info("loaded", examples=loaded.examples, skipped=loaded.skipped, layers=list(loaded.plan.layers))
        if loaded.limit:
            log.info("trains fewer blocks than planned", blocks=loaded.depth, limit=f"layers.{loaded.limit}")
        identity = Identity(
            site=config.name,
            session=new_session_id(),
            fingerprint=loaded.plan.fingerprint,
            config_sha256=loaded.plan.config_sha256,
            frozen_sha256=loaded.plan.frozen_sha256,
            software=f"mailboat {version('mailboat')}",
        )
        if initial is not None:
            states = States(config.storage / "states", federation, identity.fingerprint)
            await in_thread(states.begin, initial)
        await Agent(config, federation, identity, outbox, trainer).run()


def _begins(config: SiteConfig, federation: FederationConfig) -> bool:
    """Whether this site follows steps and has no state yet to add them to."""
    if not federation.codec.steps or any((config.storage / "states").glob("*.manifest")):
        return False
    durable.make_folder(config.storage / "work")
    return True
