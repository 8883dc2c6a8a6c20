"""What there would be without a federation: each site trained alone, and all notes in one place.

The same trainer, model and layers, from the same version 0. Only the schedule differs: one training from end to end,
with one rise and fall of the learning rate and one optimizer, which is how anybody would train alone, and with epochs,
batch and rate that suit such a training (`defaults.BASELINE_EPOCHS` and below). Notes that a site holds back for its
local F1 are held back here too, so that everybody has trained on equally many.
"""

from __future__ import annotations

import asyncio
import os
import shutil
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


@dataclass(frozen=True, slots=True)
class Baselines:
    """Scores on the held-out notes."""

    local_only: dict[str, Score]
    centralized: Score


def baseline_federation(plan: Plan) -> FederationConfig:
    """Return the federation with a training that suits a baseline, all epochs at once."""
    training = plan.federation.training
    whole = training.model_copy(
        update={
            "epochs": min(defaults.BASELINE_EPOCHS, training.epochs * plan.rounds),
            "batch_size": defaults.BASELINE_BATCH_SIZE,
            "lr": defaults.BASELINE_LR * training.lr,
        }
    )
    return plan.federation.model_copy(update={"training": whole})


def baseline_site(plan: Plan, name: str) -> SiteConfig:
    """Return a site that has the notes of `name`, a started site or POOLED."""
    return SiteConfig(
        name=name,
        federation=plan.layout.federation,
        storage=plan.layout.scratch / name,
        data=DataSection(
            notes=plan.layout.pooled if name == POOLED else plan.layout.notes / name, holdout=defaults.HOLDOUT
        ),
        threads=1,
    )


async def run_baselines(plan: Plan, warm: WorkerClient, view: View) -> Baselines:
    """Train centralized and each started site alone, the largest first, on as many cores as there are, at most two.

    `warm` is a worker of any `baseline_site` under the `baseline_federation`. A worker keeps its model from one
    training to the next: PyTorch takes longer to start than a site alone takes to train.
    """
    await asyncio.to_thread(pool, plan.layout, plan.started)
    scores: dict[str, Score] = {}
    waiting = [POOLED, *plan.started]
    shares: dict[str, float] = {}

    def on_progress(name: str, share: float, _loss: float) -> None:
        shares[name] = share
        view.progress(", ".join(f"{_label(each)} {done:.0%}" for each, done in shares.items() if each not in scores))

    async def train(name: str, worker: WorkerClient) -> None:
        worker.serve(baseline_site(plan, name))
        scores[name] = await _train_and_score(plan.layout, name, worker, partial(on_progress, name))
        view.say(f"{_label(name)}: {told(scores[name])}")

    async def lane(worker: WorkerClient) -> None:
        while waiting:
            await train(waiting.pop(0), worker)

    with first_error():
        async with (
            WorkerClient(baseline_site(plan, POOLED), baseline_federation(plan)) as second,
            asyncio.TaskGroup() as tasks,
        ):
            for worker in (warm, second)[: os.cpu_count()]:
                tasks.create_task(lane(worker))
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
