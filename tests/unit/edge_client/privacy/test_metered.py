"""The trainer that the agent sees in a private federation; the worker behind it is a script."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import structlog

from edge_client import disk
from edge_client.pipe import Trained
from edge_client.privacy.accounting import epsilon_of, spend
from edge_client.privacy.ledger import LEDGER, Charge, Ledger, Limit, read_ledger
from edge_client.privacy.metered import Metered, check_privacy, limits_of
from edge_client.training import Standing
from shared import durable
from shared.config import LocalLayersSection, SiteConfig
from shared.errors import ConfigError, NoRoomError, RefusedError
from tests.helpers import run_async, until
from tests.unit.edge_client import tiny

DELTA = 1e-5
CHARGE = Charge(sample_rate=0.2, noise_multiplier=1.0, steps=5)
ONCE, TWICE = (epsilon_of([CHARGE.times(count)], DELTA) for count in (1, 2))
PRIVATE = tiny.federation(privacy={"delta": DELTA, "noise_multiplier": 1.0})


def config(storage: Path, budget: float | None = None) -> SiteConfig:
    """A site that keeps its ledger in `storage`."""
    return SiteConfig.model_validate(
        {
            "name": "north",
            "federation": "unused.toml",
            "storage": storage,
            "data": {"notes": "unused"},
            "privacy": {"budget_epsilon": budget},
        }
    )


@dataclasses.dataclass
class Worker:
    """Says what a worker would, and what it was asked."""

    error: RefusedError | None = None
    asked: list[tuple[tuple[Charge, ...], tuple[Limit, ...]]] = dataclasses.field(default_factory=list)
    standing: ClassVar[Standing] = Standing()

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
        """Charge, and tell all that a worker knows."""
        self.asked.append((so_far, limits))
        if self.error is not None:
            raise self.error
        spent = spend(CHARGE, so_far, limits, DELTA)
        on_progress(0.5, 3.25)
        metrics = {"loss": 3.25, "strict_f1": 0.5, "steps": 5.0, "seconds": 2.0}
        return Trained(examples=7, metrics=metrics, spent=spent)


class Site:
    """A metered worker, and what the agent was told of its progress."""

    def __init__(self, storage: Path, *, budget: float | None = None, federation: Any = PRIVATE) -> None:
        self.worker = Worker()
        self.told: list[tuple[float, float | None]] = []
        ledger = Ledger(storage, known=0)
        self.trainer = Metered(self.worker, ledger, config(storage, budget), federation)

    async def train(self, version: int) -> Any:
        """One update."""
        return await self.trainer.train(
            Path("state"), version, Path("out"), on_progress=lambda *step: self.told.append(step)
        )


def test_an_update_is_charged_before_it_is_handed_on(tmp_path: Path) -> None:
    """What comes back has its row on the disk; each next training is asked for with all rows before."""
    site = Site(tmp_path)

    async def story() -> None:
        for version, epsilon in ((0, ONCE), (1, TWICE)):
            trained = await site.train(version)
            rows, _ = read_ledger(tmp_path / LEDGER)
            assert [row.base_version for row in rows] == list(range(version + 1))
            assert rows[-1].spent.epsilon == pytest.approx(epsilon)
            assert rows[-1].run == PRIVATE.config_sha256
            assert trained.metrics["charges"] == version + 1

    run_async(story())
    assert [so_far for so_far, _ in site.worker.asked] == [(), (CHARGE,)]


def test_what_was_computed_from_notes_stays_here(tmp_path: Path) -> None:
    """Loss, scores and time go to the log; with the update go steps and cost; progress goes without a loss."""
    site = Site(tmp_path)

    async def story() -> Any:
        with structlog.testing.capture_logs() as logs:
            return await site.train(0), logs

    trained, logs = run_async(story())
    assert trained.metrics == {"steps": 5.0, "epsilon": pytest.approx(ONCE), "delta": DELTA, "charges": 1.0}
    assert trained.examples == 7
    assert site.told == [(0.5, None)]
    (line,) = logs
    assert (line["event"], line["loss"], line["strict_f1"]) == ("trained", 3.25, 0.5)


def test_the_cost_so_far_is_told_from_the_start(tmp_path: Path) -> None:
    """Nothing before the first training; after a restart what the ledger says."""
    site = Site(tmp_path)
    assert site.trainer.standing.metrics == {}
    run_async(site.train(0))
    standing = Site(tmp_path).trainer.standing
    assert standing.metrics == {"epsilon": pytest.approx(ONCE), "delta": DELTA, "charges": 1.0}
    assert standing.held == ""


def test_with_the_budget_spent_the_training_stands_still(tmp_path: Path) -> None:
    """It says why, once, ends nothing, charges nothing, and can be cancelled as the end of the run does."""
    site = Site(tmp_path, budget=(ONCE + TWICE) / 2)

    async def story() -> Any:
        await site.train(0)
        with structlog.testing.capture_logs() as logs:
            second = asyncio.create_task(site.train(1))
            await until(lambda: site.trainer.standing.held != "" or second.done())
            await asyncio.wait([second], timeout=0.2)
            assert not second.done()
            assert "privacy.budget_epsilon of this site allows" in site.trainer.standing.held
            second.cancel()
            await asyncio.wait([second])
            assert second.cancelled()
        return logs

    (line,) = run_async(story())
    assert (line["log_level"], line["event"]) == ("warning", "the privacy budget is spent; no more training")
    assert len(read_ledger(tmp_path / LEDGER)[0]) == 1


def test_other_refusals_pass(tmp_path: Path) -> None:
    """A training that diverged ends as it does without privacy, and was not charged: nothing came of it."""
    site = Site(tmp_path)
    site.worker.error = RefusedError("no", rule="diverged")
    with pytest.raises(RefusedError, match="no"):
        run_async(site.train(0))
    assert read_ledger(tmp_path / LEDGER)[0] == ()


def test_a_full_disk_delays_the_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is handed on when its row is written, and not before; meanwhile the site says that it is held."""
    monkeypatch.setattr(disk, "POLL_S", 0.02)
    site, append = Site(tmp_path), durable.append
    held: list[str] = []

    def full_at_first(path: Path, data: bytes) -> None:
        held.append(site.trainer.standing.held)
        if len(held) < 3:
            raise NoRoomError("no room")
        append(path, data)

    monkeypatch.setattr(durable, "append", full_at_first)
    assert run_async(site.train(0)).metrics["charges"] == 1
    assert held == ["", "no room", "no room"]
    assert site.trainer.standing.held == ""


def test_the_limits_of_a_site(tmp_path: Path) -> None:
    """The budget is over every training of the folder, the target over those of this run; none is none."""
    planned = tiny.federation(privacy={"delta": DELTA, "target_epsilon": 5.0})
    run_async(Site(tmp_path).train(0))
    run_async(Site(tmp_path, federation=planned).train(0))
    rows, _ = read_ledger(tmp_path / LEDGER)
    assert limits_of(rows, config(tmp_path), PRIVATE) == ()
    assert [(limit.epsilon, limit.charges) for limit in limits_of(rows, config(tmp_path, 9.0), planned)] == [
        (9.0, (CHARGE.times(2),)),
        (5.0, (CHARGE,)),
    ]


def test_a_budget_asks_for_privacy(tmp_path: Path) -> None:
    """A site with one takes part in no federation without [privacy]; every other pair goes."""
    with pytest.raises(ConfigError, match=r"federation.toml has no \[privacy\]"):
        check_privacy(config(tmp_path, 8.0), tiny.federation())
    for budget, federation in ((None, tiny.federation()), (None, PRIVATE), (8.0, PRIVATE)):
        check_privacy(config(tmp_path, budget), federation)


@pytest.mark.parametrize("key", ["memory_mib", "seconds"])
def test_notes_must_not_decide_how_deep_a_private_site_trains(tmp_path: Path, key: str) -> None:
    """What an update holds leaves the site, so a limit that is measured on notes is refused under [privacy]."""
    measured = config(tmp_path).model_copy(update={"layers": LocalLayersSection.model_validate({key: 100.0})})
    check_privacy(measured, tiny.federation())
    with pytest.raises(ConfigError, match=rf"layers\.{key} is measured on the notes"):
        check_privacy(measured, PRIVATE)
