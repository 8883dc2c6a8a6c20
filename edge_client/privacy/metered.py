"""The trainer that the agent of a private site sees: the worker, with the ledger between the two.

The order is the promise: the worker says what a training would cost and refuses one that costs too much; it trains; the
cost is on the disk; only then is the update handed on to be sealed. Whoever dies before the row was written has
released nothing, because the worker's file never leaves the scratch folder unsealed and that is emptied at each start:
the training is repeated and charged once. Whoever dies after it is charged twice for two trainings of which one was
released; nothing here can prove that of the other not a number got out, and a ledger may err in one direction only.

What leaves the site with an update, or is told of a training, is what no record's content can change: epsilon, delta,
the row's number, and the steps. Loss and local scores are computed from notes without noise, so they stay in this
site's log.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Never, Protocol

import structlog

from edge_client.disk import Disk
from edge_client.outbox import Outbox
from edge_client.pipe import Trained
from edge_client.privacy.ledger import BUDGET, CHARGES, Charge, Ledger, Limit, Row, Spent, charges_of
from edge_client.training import Standing, Trainer
from shared.config import FederationConfig, SiteConfig
from shared.errors import ConfigError, RefusedError
from shared.logs import beside
from shared.manifest import BLOCKS
from shared.threads import in_thread

log = structlog.get_logger("site")

TOLD = frozenset({"steps", BLOCKS})
"""Metrics of the worker that follow from configuration and the number of records alone."""


class PrivateTrainer(Protocol):
    """Whoever trains, in a private federation at a cost; the worker process in a real run."""

    @property
    def standing(self) -> Standing:
        """See Trainer."""

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
        """Train as `Trainer.train` says, and say what it cost; RefusedError(rule='privacy-budget') before it begins."""


def metered(worker: PrivateTrainer, outbox: Outbox, config: SiteConfig, federation: FederationConfig) -> Trainer:
    """Return the trainer of a site: the worker, in a private federation with the ledger of its folder before it."""
    if federation.privacy is None:
        return worker
    return Metered(worker, Ledger(config.storage, known=outbox.charges()), config, federation)


class Metered:
    """A trainer whose every update is charged before it can be sealed; see the module's docstring."""

    def __init__(
        self, worker: PrivateTrainer, ledger: Ledger, config: SiteConfig, federation: FederationConfig
    ) -> None:
        self._worker = worker
        self._ledger = ledger
        self._config = config
        self._federation = federation
        self._disk = Disk(config, config.storage)
        self._held = ""

    @property
    def standing(self) -> Standing:
        """Why no training goes on, and what was spent so far."""
        rows = self._ledger.rows
        metrics = _metrics(rows[-1].spent, len(rows)) if rows else {}
        return Standing(self._held or self._disk.held, metrics)

    async def train(
        self, state: Path, base_version: int, delta: Path, *, on_progress: Callable[[float, float | None], None]
    ) -> Trained:
        """Train, charge the ledger, and return only then; with the budget spent, never return."""
        try:
            trained = await self._worker.train(
                state,
                base_version,
                delta,
                on_progress=lambda share, _loss: on_progress(share, None),
                so_far=charges_of(self._ledger.rows),
                limits=limits_of(self._ledger.rows, self._config, self._federation),
            )
        except RefusedError as error:
            if error.rule != BUDGET:
                raise
            await self._stand_still(error)
        spent = trained.spent
        assert spent is not None, "a worker under [privacy] says what each training cost"
        row = await self._disk.given_room(in_thread, self._charge, base_version, spent)
        log.info("trained", **beside({"version": base_version}, trained.metrics))
        told = {name: value for name, value in trained.metrics.items() if name in TOLD}
        return trained.model_copy(update={"metrics": told | _metrics(spent, row)})

    def _charge(self, base_version: int, spent: Spent) -> int:
        return self._ledger.add(self._federation.federation.name, self._federation.config_sha256, base_version, spent)

    async def _stand_still(self, error: RefusedError) -> Never:
        """Hold this training until the run ends or the process does; pulling and sending go on beside it."""
        self._held = error.message
        log.warning("the privacy budget is spent; no more training", reason=error.message, hint=error.hint)
        await asyncio.Event().wait()
        raise AssertionError("nobody sets it")


def limits_of(rows: Sequence[Row], config: SiteConfig, federation: FederationConfig) -> tuple[Limit, ...]:
    """Return the bounds on a next training: the site's budget over all rows, the target over those of this run."""
    limits = []
    budget = config.privacy.budget_epsilon
    if budget is not None:
        limits.append(Limit(name="privacy.budget_epsilon of this site", epsilon=budget, charges=charges_of(rows)))
    if federation.privacy is not None and federation.privacy.target_epsilon is not None:
        run = federation.config_sha256
        charges = charges_of(rows, lambda row: row.run == run)
        limits.append(
            Limit(
                name="privacy.target_epsilon of the federation",
                epsilon=federation.privacy.target_epsilon,
                charges=charges,
            )
        )
    return tuple(limits)


def check_privacy(config: SiteConfig, federation: FederationConfig) -> None:
    """Raise ConfigError when a site that has a privacy budget would train without privacy, or notes would say too much.

    How deep a site trains shows in its updates; what is measured on its notes must not decide that.
    """
    measured = [key for key in ("memory_mib", "seconds") if getattr(config.layers, key) is not None]
    if federation.privacy is not None and measured:
        raise ConfigError(
            f"site.toml: layers.{measured[0]} is measured on the notes, and federation.toml has [privacy]",
            hint="set layers.at_most or layers.upload_mib",
        )
    if federation.privacy is None and config.privacy.budget_epsilon is not None:
        raise ConfigError(
            "site.toml sets privacy.budget_epsilon, and federation.toml has no [privacy]",
            hint="what is trained without [privacy] has no epsilon: ask for it, or take the budget out of site.toml",
        )


def _metrics(spent: Spent, row: int) -> dict[str, float]:
    return {"epsilon": spent.epsilon, "delta": spent.delta, CHARGES: float(row)}
