"""A Mailboat site without a language model: `python -m bench.peers.site SITE.toml`.

The real agent, outbox, link and disk; in the place of the training worker stands the work that every framework gets.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.peers import work
from edge_client.agent import Agent
from edge_client.outbox import Outbox
from edge_client.session import Identity
from edge_client.statefile import read_state, write_tensors
from edge_client.training import Standing
from shared import durable, logs
from shared.config import FederationConfig, SiteConfig
from shared.configfile import load_config
from shared.ids import new_session_id
from shared.plan import load_plan


@dataclass(frozen=True, slots=True)
class Trained:
    """What the work reports."""

    examples: int
    metrics: dict[str, float]
    own: None = None


class KnownNoise:
    """Its delta is the noise of the work."""

    standing = Standing()

    def __init__(self, task: work.Work, name: str) -> None:
        self._task = task
        self._name = name

    async def train(
        self, state: Path, base_version: int, delta: Path, *, on_progress: Callable[[float, float], None]
    ) -> Trained:
        """Write the delta; the state is decoded as for training, and looked at for its ledger only."""
        await asyncio.to_thread(self._train, state, base_version, delta)
        on_progress(1.0, 0.0)
        return Trained(10, {"loss": 1.0})

    def _train(self, state: Path, base_version: int, delta: Path) -> None:
        # As a site's worker does, one tensor at a time.
        ledgers = [self._task.ledger(tensor) for tensor in read_state(state).values()]
        self._task.note(self._name, "received", round=base_version, ledger=ledgers[0])
        added = self._task.delta(int(self._name.rpartition("-")[2]))
        write_tensors(delta, {tensor_name(number): values for number, values in enumerate(added)})
        self._task.note(self._name, "trained", round=base_version)


def tensor_name(number: int) -> str:
    """The name of a tensor of the work."""
    return f"block.{number:02d}.weight"


async def run(path: Path) -> None:
    """Take part until the run is complete."""
    config = load_config(path, SiteConfig)
    federation = load_config(config.federation, FederationConfig)
    plan = load_plan(config.federation.parent / "coordinator" / "plan.json", federation)
    durable.make_folder(config.storage)
    identity = Identity(
        site=config.name,
        session=new_session_id(),
        fingerprint=plan.fingerprint,
        config_sha256=plan.config_sha256,
        frozen_sha256=plan.frozen_sha256,
        software="bench",
    )
    trainer = KnownNoise(work.load(), config.name)
    await Agent(config, federation, identity, Outbox(config.storage), trainer).run()


if __name__ == "__main__":
    logs.configure()
    asyncio.run(run(Path(sys.argv[1])))
