"""One seed, one world: a coordinator, its sites, a broker, and whatever befalls them; then calm, and an end.

What is real: `Core`, `Session`, `Ledger`, the journal (SQLite), `FrameStore`, `Outbox`, a site's `States`, the
spooler's staging, every message's encoding and decoding, and, in federations of steps, what is published: tensors,
codec and sums. What is false, and says so in its module: time, the broker, the disks below the stores, all other
tensors (digests of their inputs stand for them), and the two shells, which do here in virtual time what `service.py`
and `agent.py` do with tasks.
"""

from __future__ import annotations

import random
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import PrivateAttr

from shared.messages import Announce, encode
from shared.plan import SealedPlan
from shared.topics import Channel
from tests.factories import digest, make_plan, make_state
from tests.sim import disk
from tests.sim.broker import Broker
from tests.sim.clock import Clock
from tests.sim.coordinator import FIRST_MASTER, CoordinatorMachine
from tests.sim.machine import EPOCH_S, Machine
from tests.sim.replicas import ViolationError, demand
from tests.sim.site import SiteMachine
from tests.sim.toys import shapes_of
from tests.sim.trust import Forger, grants
from tests.sim.weather import JUMPS_S, SMALL_JUMPS_S, Scenario, Weather, scenario
from tests.sim.witness import Witness

CALM_S = 900.0
"""Virtual seconds in which everything must have come to its end once the faults have stopped."""

EVENT_S = 1.0
"""How often fate draws."""

SCRATCH = Path("/dev/shm") if Path("/dev/shm").is_dir() else None


class Plan(SealedPlan):
    """A sealed plan that works its fingerprint out once: here it never becomes another, and everybody asks for it."""

    _fingerprint: str = PrivateAttr()

    def model_post_init(self, _context: object) -> None:
        """See pydantic.BaseModel."""
        self._fingerprint = super().fingerprint

    @property
    def fingerprint(self) -> str:
        """See SealedPlan."""
        return self._fingerprint


class World:
    """A scenario under way; `run` is its whole life."""

    def __init__(self, plan: Scenario, folder: Path, trace: Callable[[str], None] | None = None) -> None:
        self.scenario = plan
        self.rng = random.Random(f"world {plan.seed}")
        self.clock = Clock()
        self.weather = plan.weather
        self.broker = Broker(self.clock, self._chance("broker"), plan.weather)
        told = make_plan(plan.federation).model_dump()
        if plan.federation.codec.steps:
            told["tensors"] = shapes_of(plan)
        self.sealed_plan = Plan.model_validate(told)
        self.witness = Witness(plan, FIRST_MASTER, self.sealed_plan.fingerprint)
        self._trace = trace
        machine: dict[str, Any] = {"clock": self.clock, "broker": self.broker, "told": self.tell}
        self.coordinator = CoordinatorMachine(
            plan, self.sealed_plan, self.witness, folder / "journal.sqlite", rng=self._chance("coordinator"), **machine
        )
        self.sites = [
            SiteMachine(plan, site, self.sealed_plan, self.witness, rng=self._chance(site.name), **machine)
            for site in plan.sites
        ]
        self.machines: list[Machine] = [self.coordinator, *self.sites]
        self._here = list(self.sites)
        """Sites that may still take part; those that are gone are taken out as they are seen."""
        self.stormy = True
        sealed = self.sealed_plan.fingerprint if plan.sealed else None
        self.forger = None if sealed is None else Forger(self.broker, self._chance("forger"), sealed)

    def _chance(self, name: str) -> random.Random:
        return random.Random(f"{name} {self.scenario.seed}")

    def tell(self, *words: Any) -> None:
        """Write a line of the trace, if there is one."""
        if self._trace is not None:
            self._trace(f"{self.clock.now:8.3f}  " + "  ".join(_brief(word) for word in words))

    # -- life ---

    def run(self) -> None:
        """The storm, the calm, and the checks of the end; ViolationError, or whatever the code raises, if not."""
        plan = self.scenario
        if plan.weather.old_retained:
            self.broker.ancient[Channel.ANNOUNCE, None] = self._announcement_of_old()
            self.broker.retained = dict(self.broker.ancient)
        self.coordinator.journal_fails = plan.weather.journal_errors
        self.coordinator.bad_losses = plan.weather.bad_losses
        self.coordinator.slow_losses = plan.weather.slow_losses
        for machine in self.machines:
            machine.disk.sync_fails = plan.weather.failed_syncs
            machine.disk.forgets_on_error = bool(plan.seed % 2)
            machine.disk.write_fails = plan.weather.failed_writes
            machine.disk.read_fails = plan.weather.failed_reads
            machine.rot = plan.weather.rot
        self.clock.later(0, self.coordinator.start)
        for site, machine in zip(plan.sites, self.sites, strict=True):
            machine.bad_updates = plan.weather.bad_updates
            self.clock.later(site.comes_s, machine.start)
            if site.leaves_s is not None:
                self.clock.later(site.leaves_s, self._gone_for_good, machine)
        self.clock.later(EVENT_S, self._fate)
        self.clock.run(plan.storm_s, self.done)
        self._calm()
        self.clock.run(self.clock.now + CALM_S, self.done)
        self.tell("world", "the end")
        self._check_end()

    def done(self) -> bool:
        """Whether every site that stays has left of its own will."""
        while self._here and self._here[-1].gone:
            self._here.pop()
        return not self._here

    @property
    def faults(self) -> Counter[str]:
        """What befell, how often."""
        return sum((machine.disk.faults for machine in self.machines), self.broker.faults)

    def close(self) -> None:
        """Let go of the journal's file."""
        self.coordinator.ended()

    def _gone_for_good(self, machine: SiteMachine) -> None:
        if not machine.gone:
            self.tell(machine.name, "goes away for ever")
            machine.disk.faults["gone for ever"] += 1
            machine.die("gone")
            machine.gone = True

    def _calm(self) -> None:
        self.tell("world", "calm")
        self.stormy = False
        quiet = Weather()
        self.broker.weather = quiet
        self.broker.up = True
        self.coordinator.journal_fails = self.coordinator.bad_losses = self.coordinator.slow_losses = 0.0
        for machine in self.machines:
            disk = machine.disk
            disk.full = False
            disk.sync_fails = disk.write_fails = disk.read_fails = 0.0
            machine.unreachable_until = 0.0  # who stands still goes on by itself, and with what came first
            machine.rot, machine.fuse = 0.0, None
            machine.start()
        for site in self.sites:
            site.bad_updates = 0.0
        for connection in list(self.broker.connections):
            if connection.hole:
                self.broker.cut(connection)

    def _check_end(self) -> None:
        stayed = [site for site in self.sites if site.site.leaves_s is None or site.exit is not None]
        waiting = [site.name for site in stayed if site.exit is None]
        demand(not waiting, f"{CALM_S:g} s after the last fault {waiting} still take part")
        for site in stayed:
            demand(site.exit is not None and site.exit.rule is None, f"{site.name} was turned away: {site.exit}")
        self.coordinator.run(self.coordinator.die, "to be read again")
        self.coordinator.gone = False
        self.coordinator.start()
        self.clock.run(self.clock.now + 60.0, lambda: False)
        self.witness.ended(stayed, self.coordinator.updates)

    # -- fate ---

    def _happens(self, per_minute: float) -> bool:
        return self.rng.random() < per_minute * EVENT_S / 60.0

    def _fate(self) -> None:
        if not self.stormy:
            return
        self.clock.later(EVENT_S, self._fate)
        for machine in self.machines:
            self._befalls(machine)
            self._befalls_link(machine)
        if self._happens(self.weather.broker_restarts) and self.broker.up:
            self.tell("broker", "restarts")
            self.broker.restart(self.rng.uniform(0.1, 5.0))
        if self._happens(6.0):
            self.broker.remember()
        if self.weather.forgets_retained and self._happens(self.weather.forgets_retained):
            self.tell("broker", "forgets what it retained")
            self.broker.forget_retained()
        if self.forger is not None and self._happens(self.weather.forgeries):
            self._forge(self.forger)
        if self.weather.partitions and self._happens(self.weather.partitions):
            self._part()

    def _forge(self, forger: Forger) -> None:
        insider = self.rng.choice(self.sites)
        if insider.up:
            how = forger.strike(self.clock.now + EPOCH_S, insider.guard, insider.session.announced)
            self.tell("forger", "publishes", how)
            self.broker.faults["forged or repeated message"] += 1

    def _part(self) -> None:
        """Cut some machines off together; what is under way to and from them is lost, and nobody is told."""
        cut_off = self.rng.sample(self.machines, self.rng.randint(1, len(self.machines)))
        until = self.clock.now + self.rng.uniform(2.0, 20.0)
        for machine in cut_off:
            self.tell(machine.name, "cannot reach the broker until", until)
            machine.disk.faults["cut off for long"] += 1
            machine.unreachable_until = until
            if machine.connection is not None and not machine.connection.hole:
                self.broker.dead(machine.connection, self.rng.uniform(1, 8), self.rng.uniform(1, 30))

    def _befalls(self, machine: Machine) -> None:
        weather, rng = self.weather, self.rng
        if self._happens(weather.kills):
            self._steps(machine, power=False)
        if self._happens(weather.power_losses):
            self._steps(machine, power=True)
        if weather.absences and self._happens(weather.absences):
            machine.stays_away = True
            self._steps(machine, power=False)
        if weather.stops and self._happens(weather.stops):
            machine.stop()
        if self._happens(weather.freezes):
            machine.disk.faults["stood still"] += 1
            # Never less than before: what waits for that moment must not be overtaken.
            machine.frozen_until = max(machine.frozen_until, self.clock.now + rng.uniform(0.5, 12.0))
            self.tell(machine.name, "stands still until", machine.frozen_until)
        if self._happens(weather.clock_jumps):
            machine.disk.faults["clock jumped"] += 1
            machine.wall_offset_s = EPOCH_S + rng.choice(SMALL_JUMPS_S if self.scenario.sealed else JUMPS_S)
        if self._happens(weather.full_disks):
            self.tell(machine.name, "disk full")
            machine.disk.faults["disk full"] += 1
            machine.disk.full = True
            self.clock.later(rng.uniform(1, 10), self._make_room, machine)

    def _befalls_link(self, machine: Machine) -> None:
        connection = machine.connection
        if connection is not None and self._happens(self.weather.cuts):
            self.tell(machine.name, "cut")
            machine.disk.faults["link cut"] += 1
            self.broker.cut(connection)
        elif connection is not None and self._happens(self.weather.holes):
            self.tell(machine.name, "in a hole")
            machine.disk.faults["link dead, unnoticed"] += 1
            self.broker.dead(connection, self.rng.uniform(1, 8), self.rng.uniform(1, 30))

    def _steps(self, machine: Machine, *, power: bool) -> None:
        """Let a machine die some steps from now: between any two."""
        if machine.running and machine.fuse is None:
            machine.dies_of_power = power
            machine.fuse = self.rng.choice((0, 1, 2, 3, 5, 8, 13, 21, 34))

    @staticmethod
    def _make_room(machine: Machine) -> None:
        machine.disk.full = False

    def _announcement_of_old(self) -> bytes:
        """What an earlier run of the same federation left at the broker."""
        version = self.rng.randint(1, self.scenario.federation.federation.versions)
        return encode(
            Announce(
                boot=digest("old")[:16],
                fingerprint=self.sealed_plan.fingerprint,
                config_sha256=self.sealed_plan.config_sha256,
                frozen_sha256=self.sealed_plan.frozen_sha256,
                manifest=make_state(self.sealed_plan, version, salt="old"),
                final=bool(self.scenario.seed % 2),
                target=version,
            )
        )


def _brief(word: Any) -> str:
    text = str(word) if isinstance(word, str) else repr(word)
    return text if len(text) < 300 else f"{text[:300]}..."


def run_world(seed: int, trace: Callable[[str], None] | None = None) -> World:
    """Run the world of a seed to its end; see World.run for what it raises."""
    plan = scenario(seed)
    if plan.sealed:
        grants()
    with (
        tempfile.TemporaryDirectory(prefix="mailboat-sim-", dir=SCRATCH) as folder,
        disk.installed(random.Random(seed)),
    ):
        world = World(plan, Path(folder), trace)
        try:
            world.run()
        except ViolationError:
            world.tell("world", "violated")
            raise
        finally:
            world.close()
        return world
