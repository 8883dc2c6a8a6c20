"""What happens in one chaotic run: drawn from a seed, and nothing but the seed.

A plan names the federation, the settings of the broker and the links, the faults in their order, and for each process
the commit points at which its next lives end. When exactly a fault strikes depends on this machine; what strikes, whom,
and in which order does not.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from mailboat.flaky import Conditions
from shared.config import Mode
from shared.faultpoint import BOTH, COORDINATOR, SITE

FaultKind = Literal[
    "kill",  # kill -9, started again at once
    "away",  # kill -9, started again only after `for_s`
    "pause",  # kill -STOP, kill -CONT after `for_s`
    "worker",  # kill -9 of the site's training process
    "forget",  # the broker: kill -9, its persistence file removed, started again after `for_s`
    "relapse",  # the broker: kill -9, started again after `for_s` with what it saved some seconds earlier
    "cut",  # the process's link: closed in order
    "reset",  # the same with RST
    "hole",  # half-open and silent, no new connection for `for_s`
    "down",  # reset, no new connection for `for_s`
    "absent",  # the site's next death lasts until the coordinator has published `versions` of them
    "full",  # the process's disk has no room for `for_s`
]

BROKER = "broker"
COORDINATOR_NAME = "coordinator"
LONGEST_S = 14.0
"""Longer than every time-out at these settings: three stalls, the back-off's cap, one and a half keepalives."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault, `after_s` seconds after the one before was applied."""

    after_s: float
    kind: FaultKind
    target: str
    for_s: float = 0.0
    versions: int = 0
    mid_upload: bool = False
    """Wait, before that, until half of some update's chunks have passed the broker."""


@dataclass(frozen=True, slots=True)
class Patience:
    """The [link] section of every process; far below the defaults, so that a run takes seconds."""

    stall_s: float = 1.5
    backoff_cap_s: float = 3.0
    keepalive_s: int = 5


@dataclass(frozen=True, slots=True)
class Plan:
    """One chaotic run."""

    seed: int
    mode: Mode
    sites: int
    versions: int
    parameters: int
    slice_kib: int
    window: int
    queue_max: int
    """Mosquitto's max_queued_messages."""
    sealed: bool
    training_s: float
    links: dict[str, Conditions]
    points: dict[str, tuple[str, ...]]
    """For each process, `point:n` of its successive lives."""
    faults: tuple[Fault, ...]
    patience: Patience = Patience()
    disks: tuple[str, ...] = ()
    """Processes whose storage is a small file system of its own."""
    limit: int = 1000
    """staleness.limit"""
    first: str = ""
    """The site that is there before the others, who come when it has died for the first time."""

    @property
    def names(self) -> tuple[str, ...]:
        """The processes that speak MQTT."""
        return (COORDINATOR_NAME, *(f"site-{number}" for number in range(1, self.sites + 1)))

    def plain(self) -> dict[str, Any]:
        """JSON-able values."""
        return dataclasses.asdict(self)


def make_plan(seed: int, *, kills: int = 4, root: bool = True) -> Plan:
    """The plan of a seed; `kills` random kills beside those at commit points, disks of their own only for root."""
    chance = random.Random(f"chaos/{seed}")
    sites = chance.choice((2, 2, 3))
    names = [COORDINATOR_NAME, *(f"site-{number}" for number in range(1, sites + 1))]
    mode: Mode = chance.choice(("sync", "fedbuff", "fedasync"))
    disks = (chance.choice(names),) if root and seed % 3 == 0 else ()
    return Plan(
        seed=seed,
        mode=mode,
        sites=sites,
        versions={"sync": 5, "fedbuff": 6, "fedasync": 10}[mode],
        parameters=chance.choice((20_000, 100_000, 200_000)),
        slice_kib=chance.choice((16, 32, 64)),
        window=chance.choice((2, 4, 8)),
        queue_max=5 if seed % 2 == 0 else 1000,
        sealed=seed % 4 == 1,
        training_s=chance.uniform(0.1, 0.4),
        links={name: _conditions(chance) for name in names},
        points={name: _points(chance, seed, index) for index, name in enumerate(names)},
        faults=tuple(_faults(chance, names, kills, disks)),
        disks=disks,
        limit=chance.choice((2, 1000)),
    )


def absent_plan(versions: int) -> Plan:
    """One site goes on, the other dies with a sealed update and comes back after so many versions."""
    names = (COORDINATOR_NAME, "site-1", "site-2")
    return Plan(
        seed=0,
        mode="sync",
        sites=2,
        versions=versions + 5,
        parameters=1_000,
        slice_kib=16,
        window=4,
        queue_max=1000,
        sealed=False,
        training_s=0.0,
        links={name: Conditions() for name in names},
        points={"site-2": ("send-offer.before:1",)},
        faults=(Fault(0.0, "absent", "site-2", versions=versions),),
        limit=2 * versions,
        first="site-2",
    )


def _conditions(chance: random.Random) -> Conditions:
    """Half of the links are good; the others are slow, late, or die after so many bytes."""
    if chance.random() < 0.5:
        return Conditions()
    return Conditions(
        latency_s=chance.uniform(0.0, 0.05),
        jitter_s=chance.uniform(0.0, 0.05),
        bytes_per_s=chance.choice((None, 500_000.0, 4_000_000.0)),
        cut_after=tuple(chance.choice((None, chance.randrange(20_000, 2_000_000))) for _ in range(4)),
    )


def _points(chance: random.Random, seed: int, index: int) -> tuple[str, ...]:
    """The next commit points in turn, so that a row of seeds passes all of them; which passage is left to chance."""
    every = [*BOTH, *(SITE if index else COORDINATOR)]
    random.Random(f"points/{index > 0}").shuffle(every)
    lives = 5 if index == 0 else 2
    turn = lives * seed if index == 0 else lives * (2 * seed + index)
    return tuple(f"{every[(turn + life) % len(every)]}:{chance.choice((1, 1, 1, 2))}" for life in range(lives))


def _faults(chance: random.Random, names: list[str], kills: int, disks: tuple[str, ...]) -> Iterator[Fault]:
    """Kills and everything else, shuffled."""
    drawn: list[tuple[FaultKind, str, float]] = [("kill", chance.choice(names), 0.0) for _ in range(kills)]
    drawn += [("worker", chance.choice(names[1:]), 0.0), ("away", chance.choice(names[1:]), chance.uniform(2.0, 6.0))]
    drawn += [("pause", chance.choice([*names, BROKER]), chance.uniform(0.5, 4.0)) for _ in range(2)]
    drawn += [("forget", BROKER, chance.uniform(0.0, 2.0)), ("relapse", BROKER, chance.uniform(0.0, 2.0))]
    links: tuple[FaultKind, ...] = ("cut", "reset", "hole", "down")
    drawn += [(chance.choice(links), chance.choice(names), chance.uniform(0.5, 3.0)) for _ in range(4)]
    drawn += [("full", name, chance.uniform(1.0, 3.0)) for name in disks]
    if chance.random() < 0.25:
        drawn.append(("away", COORDINATOR_NAME, LONGEST_S))
    chance.shuffle(drawn)
    for kind, target, for_s in drawn:
        yield Fault(chance.uniform(0.1, 1.5), kind, target, for_s)
