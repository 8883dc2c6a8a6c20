"""What there would be without a federation: each site trained alone, and all notes in one place.

The same trainer, model and layers, from the same version 0. Only the schedule differs: one training from end to end,
with one rise and fall of the learning rate and one optimizer, which is how anybody would train alone, and with epochs,
batch and rate that suit such a training (`DemoTask`). Notes that a site holds back for its
local F1 are held back here too, so that everybody has trained on equally many.
"""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from edge_client.worker_client import WorkerClient
from mailboat.demo import defaults
from mailboat.demo.facts import Score
from mailboat.demo.live import View
from mailboat.demo.plan import Plan
from mailboat.demo.scoring import score
from mailboat.demo.screen import told
from mailboat.sealing import INITIAL
from shared.config import DataSection, FederationConfig, SiteConfig
from shared.tensorfile import map_tensors

POOLED = "pooled"


def baseline_federation(plan: Plan) -> FederationConfig:
    """Return the federation with a training that suits a baseline, all epochs at once."""
    training = plan.federation.training
    whole = training.model_copy(
        update={
            "epochs": min(plan.task.baseline_epochs, training.epochs * plan.rounds),
            "batch_size": defaults.BASELINE_BATCH_SIZE,
            "lr": plan.task.baseline_lr * training.lr,
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


class Baselines:
    """What is trained centralized and at each started site alone, the largest first, by whichever workers there are.

    A worker keeps its model from one training to the next: PyTorch takes longer to start than a site alone to train.
    """

    def __init__(self, plan: Plan, view: View) -> None:
        self._plan = plan
        self._view = view
        self._waiting = [POOLED, *plan.started]
        self._scores: dict[str, Score] = {}
        self._shares: dict[str, float] = {}
        self._shown = False

    @property
    def local_only(self) -> dict[str, Score]:
        """Scores on the held-out notes by site, of those done."""
        return {name: self._scores[name] for name in self._plan.started if name in self._scores}

    @property
    def centralized(self) -> Score | None:
        """Score on the held-out notes, once it is done."""
        return self._scores.get(POOLED)

    def show_progress(self) -> None:
        """From now on tell how far each is; until now the federation's own progress was what mattered."""
        self._shown = True

    async def train(self, worker: WorkerClient) -> None:
        """Train what nobody has begun, one after the other, until nothing is left; any number of workers may share it.

        `worker` belongs to any `baseline_site` under the `baseline_federation`. Raises what training raises.
        """
        while self._waiting:
            name = self._waiting.pop(0)
            worker.serve(baseline_site(self._plan, name))
            self._scores[name] = await self._train_and_score(name, worker)
            self._view.say(f"{_label(name)}: {told(self._scores[name])}")

    async def _train_and_score(self, name: str, worker: WorkerClient) -> Score:
        layout = self._plan.layout
        initial = layout.storage / INITIAL
        delta, trained = (layout.scratch / f"{name}.{kind}.safetensors" for kind in ("delta", "trained"))
        await worker.train(initial, 0, delta, on_progress=partial(self._tell, name))
        await asyncio.to_thread(add, initial, delta, trained)
        return await score(worker, trained, layout.heldout)

    def _tell(self, name: str, share: float, _loss: float) -> None:
        self._shares[name] = share
        if self._shown:
            under_way = {each: done for each, done in self._shares.items() if each not in self._scores}
            self._view.progress(", ".join(f"{_label(each)} {done:.0%}" for each, done in under_way.items()))


def _label(name: str) -> str:
    return "centralized" if name == POOLED else f"{name} alone"


def add(initial: Path, delta: Path, out: Path) -> None:
    """Write the sum of two float32 safetensors files; a tensor that `delta` lacks stays as it is."""
    start, change = map_tensors(initial), map_tensors(delta)
    save_file({name: values + change.get(name, np.float32(0)) for name, values in start.items()}, out)
