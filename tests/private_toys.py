"""A private site without a language model: the real agent, ledger and accountant, and a trainer that adds a constant.

`python -m tests.private_toys CONFIG` runs one as a process of its own, to be killed at will.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from edge_client.outbox import Outbox
from edge_client.pipe import Trained
from edge_client.privacy.accounting import charge_of, spend
from edge_client.privacy.ledger import Charge, Limit
from edge_client.privacy.metered import metered
from edge_client.training import Standing
from shared.config import FederationConfig, SiteConfig
from shared.configfile import load_config
from shared.errors import MailboatError
from tests.toys import ToyTrainer, toy_site

RECORDS = 40
DIE_VARIABLE = "PRIVATE_TOY_DIES_AT"
"""In the environment: the process ends by SIGKILL when it has trained so many updates, before the last is charged."""


class PrivateToy:
    """Trains as ToyTrainer does, at the cost of so many records; says a loss and a score that must not leave."""

    standing = Standing()

    def __init__(self, federation: FederationConfig) -> None:
        assert federation.privacy is not None
        self._delta = federation.privacy.delta
        self.charge: Charge = charge_of(
            federation.privacy, federation.training, records=RECORDS, versions=federation.federation.versions
        )
        self._toy = ToyTrainer(step=1.0, seconds=0.05, examples=RECORDS)
        self._lives = int(os.environ.get(DIE_VARIABLE, "0"))

    async def train(
        self,
        state: Path,
        base_version: int,
        delta: Path,
        *,
        on_progress: Callable[[float, float], None],
        so_far: tuple[Charge, ...] = (),
        limits: tuple[Limit, ...] = (),
    ) -> Trained:
        """Refuse as the worker does, or train and say what it cost."""
        spent = spend(self.charge, so_far, limits, self._delta)
        trained = await self._toy.train(state, base_version, delta, on_progress=on_progress)
        self._lives -= 1
        if self._lives == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        metrics = {"loss": 0.75, "strict_f1": 0.25, "seconds": 0.125, "steps": float(self.charge.steps)}
        return Trained(examples=trained.examples, metrics=metrics, spent=spent)


async def private_site(path: Path) -> None:
    """What `mailboat site run` does in a private federation after loading the model."""
    config = load_config(path, SiteConfig)
    federation = load_config(config.federation, FederationConfig)
    trainer = metered(PrivateToy(federation), Outbox(config.storage), config, federation)
    await toy_site(path, trainer=trainer)


if __name__ == "__main__":
    try:
        asyncio.run(private_site(Path(sys.argv[1])))
    except MailboatError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)
