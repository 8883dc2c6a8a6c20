"""One federation from start to end in this process, each of its versions scored."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from mailboat.experiment.cells import merged
from mailboat.experiment.clock import MBIT, Clock, Line
from mailboat.experiment.coordinator_side import CoordinatorSide
from mailboat.experiment.local_worker import LocalWorker
from mailboat.experiment.results import Measures, Point
from mailboat.experiment.site_side import SiteSide
from mailboat.experiment.spec import ClockSection, MachineSection, Patch
from mailboat.experiment.traces import DAY_S, changes
from mailboat.validating import NAME
from shared import durable
from shared.config import ComputeSection, DataSection, FederationConfig, SiteConfig
from shared.configfile import parse_config
from shared.errors import RefusedError, UnavailableError
from shared.plan import SealedPlan

TICK_S = 1.0
"""Virtual seconds; the real shells tick four times a second."""
UNCLOCKED_S = 1.0
"""A local training where there is no clock."""
UNCLOCKED_DAYS = 1.0
"""A run that takes so long without a clock stands still: its versions take seconds."""

Tell = Callable[[float, str], None]
"""Called now and then with the share that is done, 0 to 1, and a word on it."""


@dataclass(frozen=True, slots=True)
class Job:
    """One federation and where its things lie."""

    federation: FederationConfig
    folder: Path
    """For everything that coordinator and sites write; new or empty."""
    notes: Mapping[str, Path]
    """Of each site."""
    heldout: Path
    validation: Path | None = None
    """The coordinator's own notes."""
    site: Patch = field(default_factory=dict)
    """Keys of site.toml, for every site."""
    sites: Mapping[str, Patch] = field(default_factory=dict)
    """The same for one site, by its name."""
    clock: ClockSection | None = None
    start: Path | None = None
    """A float32 safetensors file of the trained tensors to start from, instead of the base model's."""
    zero_shot: bool = False
    score_every: int = 1


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of it."""

    plan: SealedPlan
    curve: tuple[Point, ...]
    """Each scored version."""
    labels: Mapping[str, Measures]
    """Of the last version."""
    state: Path
    """The last published state, a safetensors file."""
    train_cpu_s: tuple[float, ...]
    """Of each local training."""
    metrics: Mapping[str, Measures]
    versions: int
    up: int
    """Bytes of all sites, the last version's way to them included."""
    down: int


class Workers:
    """The sites' trainers, kept from one federation to the next: one with the same model loads other notes alone."""

    def __init__(self, compute: ComputeSection) -> None:
        self._compute = compute
        self._workers: dict[str, LocalWorker] = {}

    def __getitem__(self, site: str) -> LocalWorker:
        return self._workers.setdefault(site, LocalWorker(self._compute))

    def keep(self, sites: int) -> None:
        """Let go of workers beyond so many: each holds a model."""
        for name in [name for name in self._workers if name != NAME][sites:]:
            del self._workers[name]


def federate(job: Job, workers: Workers, tell: Tell) -> Outcome:
    """Run the federation to its last version and return what came of it.

    Raises what model, notes and configuration get wrong; UnavailableError when the run stands still, and
    RefusedError with the first rule under which an update was rejected.
    """
    return _Run(job, workers, tell).run()


class _Run:
    def __init__(self, job: Job, workers: Workers, tell: Tell) -> None:
        self.job = job
        self.tell = tell
        self.clock = Clock()
        self.curve: list[Point] = []
        self.labels: dict[str, Measures] = {}
        self.state = job.folder / "state.safetensors"
        initial = job.folder / "initial.safetensors"
        durable.make_folder(job.folder)
        self._configs = {name: self._site_config(name) for name in job.notes}
        workers.keep(len(self._configs))
        self._workers = {name: workers[name] for name in self._configs}
        self.plan = self._load(initial)
        self.lines = {name: self._line(name) for name in self._configs}
        self.coordinator = CoordinatorSide(
            self.clock,
            job.folder,
            job.federation,
            self.plan,
            job.start or initial,
            committed=self._committed,
            loss=self._validator(workers),
        )
        self.sites = [self._site(name) for name in self._configs]

    # -- set-up ---

    def _site_config(self, name: str) -> SiteConfig:
        fixed: Patch = {
            "name": name,
            "federation": str(self.job.folder / "federation.toml"),
            "storage": str(self.job.folder / name),
            "threads": 1,
        }
        said = merged({"data": {"holdout": 0.0}}, self.job.site, self.job.sites.get(name, {}))
        return parse_config(
            merged(said, fixed, {"data": {"notes": str(self.job.notes[name])}}), SiteConfig, f"site {name}"
        )

    def _load(self, initial: Path) -> SealedPlan:
        plans = [
            self._workers[name].load(config, self.job.federation, None if number else initial).plan
            for number, (name, config) in enumerate(self._configs.items())
        ]
        assert len({plan.fingerprint for plan in plans}) == 1, "all sites have one model"
        return plans[0]

    def _validator(self, workers: Workers) -> Callable[[Path], float] | None:
        """The loss on the coordinator's notes, where it has any and weighs by it; as `mailboat.validating`."""
        job = self.job
        if job.validation is None or job.federation.aggregation.quality == "none":
            return None
        worker, storage = workers[NAME], job.folder / NAME
        data = DataSection(notes=job.validation, holdout=0.0)
        worker.load(SiteConfig(name=NAME, federation=job.folder, storage=storage, data=data), job.federation, None)
        return worker.loss

    def _machine(self, name: str) -> MachineSection:
        return self.job.clock.sites.get(name, MachineSection()) if self.job.clock else MachineSection()

    def _line(self, name: str) -> Line:
        clock, machine = self.job.clock, self._machine(name)
        if clock is None:
            return Line(self.clock, up=math.inf, down=math.inf)
        rates = (machine.up_mbit or clock.up_mbit, machine.down_mbit or clock.down_mbit)
        up, down = (MBIT * rate / clock.model_scale for rate in rates)
        return Line(self.clock, up=up, down=down)

    def _site(self, name: str) -> SiteSide:
        clock = self.job.clock
        train_s = UNCLOCKED_S if clock is None else clock.train_s / self._machine(name).speed
        config = self._configs[name]
        # As `edge_client.site`: where versions travel as steps, version 0 is at the sites, in the base model.
        begun = self.job.federation.codec.steps > 0 and self.job.start is None
        held = self.coordinator.core.ledger.newest.whole if begun else None
        return SiteSide(
            self.clock, self.coordinator, self.lines[name], config, self._workers[name], train_s=train_s, held=held
        )

    # -- the run ---

    def run(self) -> Outcome:
        """See `federate`."""
        self.coordinator.begin()
        if not self.job.zero_shot:
            self._schedule()
            days = self.job.clock.days if self.job.clock else UNCLOCKED_DAYS
            if not self.clock.run(self._over, days * DAY_S):
                raise UnavailableError(
                    f"version {self.coordinator.core.ledger.version} of {self.job.federation.federation.versions} "
                    f"after {self.clock.now / DAY_S:.1f} virtual days: nobody is left who makes another",
                    hint=self._why_still(),
                )
        ledger = self.coordinator.core.ledger
        return Outcome(
            plan=self.plan,
            curve=tuple(self.curve),
            labels=self.labels,
            state=self.state,
            train_cpu_s=tuple(second for site in self.sites for second in site.train_cpu_s),
            metrics={site: dict(said) for site, said in self.coordinator.last_words().items()},
            versions=ledger.version,
            up=self._up,
            down=self._down,
        )

    def _why_still(self) -> str:
        held = next((site.trainer.standing.held for site in self.sites if site.trainer.standing.held), "")
        return held or "look at the cell's clock, quorum and deadline"

    def _schedule(self) -> None:
        clock = self.job.clock or ClockSection(days=UNCLOCKED_DAYS)
        for site in self.sites:
            rng = random.Random(f"{self.job.federation.federation.seed}/{site.config.name}")
            trace = changes(clock, self._machine(site.config.name), rng) if self.job.clock else ()
            for change in trace:
                self.clock.at(change.at_s, _done_to(site, change.what))
            if self.job.clock is None:
                site.wants_link = True
                self.clock.at(0.0, site.boot)
        self._tick()

    def _tick(self) -> None:
        self.coordinator.tick()
        for site in self.sites:
            site.tick()
        self.clock.later(TICK_S, self._tick)

    def _over(self) -> bool:
        """The last version is published, and whoever is there has it."""
        if self.coordinator.rejected:
            first = self.coordinator.rejected[0]
            if first.rule != "run-complete":
                raise RefusedError(f"an update of {first.site} was rejected: {first.detail}", rule=first.rule)
        return self.coordinator.finished and all(site.left or not site.line.connected for site in self.sites)

    def _committed(self, version: int) -> None:
        """Score a version that was just published, as a site would have it.

        Where tensors stay at the sites, as each of them would: the mean of their scores is the version's.
        """
        versions = self.job.federation.federation.versions
        self.tell(version / versions, f"version {version} of {versions}")
        if version % self.job.score_every and version < versions:
            return
        self.coordinator.extract(version, self.state)
        scoring = list(self._workers.values())[: None if self.plan.personal else 1]
        found = [worker.evaluate(self.state, self.job.heldout) for worker in scoring]
        self.labels = {label: _mean([one.labels[label] for one in found]) for label in found[0].labels}
        scores = _mean([one.overall for one in found])
        self.curve.append(Point(version=version, at_s=self.clock.now, up=self._up, down=self._down, scores=scores))

    @property
    def _up(self) -> int:
        return sum(line.up.count for line in self.lines.values())

    @property
    def _down(self) -> int:
        return sum(line.down.count for line in self.lines.values())


def _mean(found: Sequence[Measures]) -> Measures:
    """Each measure's mean."""
    return {name: fmean(one[name] for one in found) for name in found[0]}


def _done_to(site: SiteSide, what: str) -> Callable[[], None]:
    match what:
        case "on":
            return site.boot
        case "off":
            return site.power_off
        case _:
            return lambda: site.set_link(there=what == "link up")
