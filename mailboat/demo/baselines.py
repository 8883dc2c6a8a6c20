"""What there would be without a federation: each site trained alone, and all notes in one place.

The same trainer, model, layers and settings, from the same version 0. Only the schedule differs: one training from end
to end, with one rise and fall of the learning rate and one optimizer, which is how anybody would train alone, and as
many epochs as such a training gains from (`defaults.BASELINE_EPOCHS`), at most those of the federation. Notes that a
site holds back for its local F1 are held back here too, so that everybody has trained on equally many.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from edge_client.worker_client import Progress, WorkerClient
from mailboat.demo import defaults
from mailboat.demo.facts import Score
from mailboat.demo.live import View
from mailboat.demo.plan import Layout, Plan
from mailboat.demo.scoring import score
from mailboat.demo.screen import told
from mailboat.sealing import INITIAL
from shared.config import DataSection, FederationConfig, SiteConfig
from shared.tasks import first_error

POOLED = "pooled"
LANES_MAX = 2
"""Trainings side by side; each takes one core."""


@dataclass(frozen=True, slots=True)
class Baselines:
    """Scores on the held-out notes."""

    local_only: dict[str, Score]
    centralized: Score


def baseline_federation(plan: Plan) -> FederationConfig:
    """Return the federation with all epochs of a baseline in one training."""
    epochs = min(defaults.BASELINE_EPOCHS, plan.federation.training.epochs * plan.rounds)
    whole = plan.federation.training.model_copy(update={"epochs": epochs})
    return plan.federation.model_copy(update={"training": whole})


@asynccontextmanager
async def baseline_worker(plan: Plan, name: str, notes: Path) -> AsyncIterator[WorkerClient]:
    """A worker that would train on `notes` with all epochs at once."""
    config = SiteConfig(
        name=name,
        federation=plan.layout.federation,
        storage=plan.layout.scratch / name,
        data=DataSection(notes=notes, holdout=defaults.HOLDOUT),
        threads=1,
    )
    async with WorkerClient(config, baseline_federation(plan)) as worker:
        yield worker


async def run_baselines(plan: Plan, warm: WorkerClient, view: View) -> Baselines:
    """Train centralized and each started site alone, the largest first, on as many cores as there are, at most two.

    `warm` is a `baseline_worker` of the first started site.
    """
    await asyncio.to_thread(pool, plan.layout, plan.started)
    scores: dict[str, Score] = {}
    waiting = [POOLED, *plan.started]
    shares: dict[str, float] = {}

    def on_progress(name: str, share: float, _loss: float) -> None:
        shares[name] = share
        view.progress(", ".join(f"{_label(each)} {done:.0%}" for each, done in shares.items() if each not in scores))

    async def train(name: str, worker: WorkerClient) -> None:
        scores[name] = await _train_and_score(plan.layout, name, worker, partial(on_progress, name))

    async def lane() -> None:
        while waiting:
            name = waiting.pop(0)
            if name == plan.started[0]:
                await train(name, warm)
            else:
                notes = plan.layout.pooled if name == POOLED else plan.layout.notes / name
                async with baseline_worker(plan, name, notes) as worker:
                    await train(name, worker)
            view.say(f"{_label(name)}: {told(scores[name])}")

    with first_error():
        async with asyncio.TaskGroup() as tasks:
            for _ in range(min(LANES_MAX, os.cpu_count() or 1)):
                tasks.create_task(lane())
    return Baselines({name: scores[name] for name in plan.started}, scores[POOLED])


def _label(name: str) -> str:
    return "centralized" if name == POOLED else f"{name} alone"


async def _train_and_score(layout: Layout, name: str, worker: WorkerClient, on_progress: Progress) -> Score:
    initial = layout.storage / INITIAL
    delta, trained = (layout.scratch / f"{name}.{kind}.safetensors" for kind in ("delta", "trained"))
    await worker.train(initial, 0, delta, on_progress=on_progress)
    await asyncio.to_thread(add, initial, delta, trained)
    return await score(worker, trained, layout.heldout)


def add(initial: Path, delta: Path, out: Path) -> None:
    """Write the sum of two float32 safetensors files of the same tensors."""
    start, change = load_file(initial), load_file(delta)
    save_file({name: np.add(start[name], change[name]) for name in start}, out)


def pool(layout: Layout, sites: tuple[str, ...]) -> None:
    """Copy the training notes of these sites into one folder; their names differ, so none is lost."""
    for site in sites:
        shutil.copytree(layout.notes / site, layout.pooled, dirs_exist_ok=True)
