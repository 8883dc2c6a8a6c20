"""One cell, carried out: its notes made, its federation or baseline run, its result in one value."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from edge_client.device import CPU, find_device
from edge_client.statefile import read_state, write_tensors
from mailboat.experiment import splitnn
from mailboat.experiment.cells import POOLED, Settings, Stage, participants
from mailboat.experiment.federation import Job, Outcome, Tell, Workers, federate
from mailboat.experiment.inputs import code_digest
from mailboat.experiment.notes import HELDOUT, VALIDATION, lay_out
from mailboat.experiment.results import Result
from shared.config import ComputeSection, FederationConfig

START_SHARE = 0.5
"""Of the progress that is told, where a cell starts from another training."""


class Bench:
    """A folder to work in and the models that are loaded; carries out one cell after the other."""

    def __init__(self, scratch: Path, compute: ComputeSection) -> None:
        self._scratch = scratch
        self._device = find_device(compute)
        self._workers = Workers(compute)

    def carry_out(self, title: str, settings: Settings, tell: Tell) -> Result:
        """Return what comes of a cell; raises what `federate` raises.

        Everything it writes goes to the scratch folder; notes and starting points stay there for the next cell.
        """
        cpu, digest = time.process_time(), settings.digest
        folder = self._own(f"cell-{digest[:24]}")
        try:
            match settings.method:
                case "alone":
                    outcomes = self._alone(settings, folder, tell)
                    chosen = max(outcomes.values(), key=_main)
                case "splitnn":
                    outcomes = {}
                    chosen = splitnn.train(self._job(settings, folder), settings.split, tell)
                case _:
                    outcomes = {}
                    chosen = federate(self._job(settings, folder, tell), self._workers, _last_part(settings, tell))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return Result(
            settings_sha256=digest,
            code_sha256=code_digest(),
            title=title,
            scores=chosen.curve[-1].scores,
            labels=dict(chosen.labels),
            curve=chosen.curve,
            versions=chosen.versions,
            up=chosen.up,
            down=chosen.down,
            train_s=_mean(chosen.train_cpu_s),
            trainings=len(chosen.train_cpu_s),
            cpu_s=time.process_time() - cpu,
            clock_s=chosen.curve[-1].at_s,
            trained_parameters=chosen.plan.trained_parameters,
            total_parameters=chosen.plan.total_parameters,
            sites={name: outcome.curve[-1].scores for name, outcome in outcomes.items()},
            metrics=dict(chosen.metrics),
            machine=f"{platform.machine()}, {platform.system()}",
            software=f"python {platform.python_version()}, torch {version('torch')}",
            device=(CPU if settings.method == "splitnn" else self._device).title,
        )

    def _alone(self, settings: Settings, folder: Path, tell: Tell) -> dict[str, Outcome]:
        """Each site as a federation of its own."""
        names, outcomes = participants(settings.stage.notes), {}
        whole = self._job(settings, folder, tell)
        for done, name in enumerate(names):
            job = Job(
                federation=_of(settings.stage.federation, name),
                folder=folder / name,
                notes={name: whole.notes[name]},
                heldout=whole.heldout,
                validation=whole.validation,
                site=settings.site,
                sites=settings.sites,
            )
            outcomes[name] = federate(job, self._workers, _part(tell, done / len(names), 1 / len(names), name))
        return outcomes

    def _job(self, settings: Settings, folder: Path, tell: Tell | None = None) -> Job:
        made = self._notes(settings.stage)
        pooled = settings.method == "centralized"
        names = (POOLED,) if pooled else participants(settings.stage.notes)
        return Job(
            federation=settings.stage.federation,
            folder=folder,
            notes={name: made / name for name in names},
            heldout=made / HELDOUT,
            validation=made / VALIDATION if (made / VALIDATION).exists() else None,
            site=settings.site,
            sites=settings.sites,
            clock=settings.clock,
            start=self._start(settings.start, tell) if settings.start and tell else None,
            zero_shot=settings.zero_shot,
            score_every=settings.score_every,
        )

    def _start(self, stage: Stage, tell: Tell) -> Path:
        """The last state of a federation that is trained once for all cells that start from it."""
        name = _digest(stage.model_dump(mode="json"))
        kept = self._scratch / f"start-{name}.safetensors"
        if not kept.exists():
            folder = self._own(f"start-{name}")
            made = self._notes(stage)
            job = Job(
                federation=stage.federation,
                folder=folder,
                notes={site: made / site for site in participants(stage.notes)},
                heldout=made / HELDOUT,
                validation=made / VALIDATION if (made / VALIDATION).exists() else None,
            )
            outcome = federate(job, self._workers, _part(tell, 0.0, START_SHARE, "first"))
            write_tensors(kept, read_state(outcome.state))
            shutil.rmtree(folder)
        return kept

    def _notes(self, stage: Stage) -> Path:
        """A folder with the notes of a stage, made once.

        Of two processes that make it at a time one is the first.
        """
        said = [stage.federation.task.kind, stage.federation.federation.seed, stage.notes.model_dump(mode="json")]
        folder = self._scratch / f"notes-{_digest(said)}"
        if not folder.exists():
            making = self._own(folder.name)
            lay_out(stage, making)
            try:
                making.rename(folder)
            except OSError:
                shutil.rmtree(making)
        return folder

    def _own(self, name: str) -> Path:
        """A path for this process alone, with nothing there."""
        path = self._scratch / f"{name}-{os.getpid()}"
        shutil.rmtree(path, ignore_errors=True)
        return path


def _of(federation: FederationConfig, site: str) -> FederationConfig:
    """The federation with this one site."""
    alone = federation.federation.model_copy(update={"sites": (site,)})
    quorum = federation.aggregation.model_copy(update={"quorum": 1})
    return federation.model_copy(update={"federation": alone, "aggregation": quorum})


def _main(outcome: Outcome) -> float:
    """The measure that models are compared by."""
    return next(iter(outcome.curve[-1].scores.values()))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:24]


def _last_part(settings: Settings, tell: Tell) -> Tell:
    return _part(tell, START_SHARE, 1 - START_SHARE, "") if settings.start else tell


def _part(tell: Tell, begins: float, share: float, name: str) -> Tell:
    """Tell the progress of a part as that of the whole."""
    return lambda done, word: tell(begins + share * done, f"{name}: {word}" if name else word)
