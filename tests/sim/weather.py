"""What one seed means: the federation, its sites, and which faults befall them how often."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from shared.config import AggregationSection, FederationConfig, LinkSection
from tests.factories import make_federation

NAMES = ("ash", "bay", "cove", "dale", "elm", "fen")
STALL_S = 2.0
SEALED = 10_000_000
"""Seeds from here on are those of sealed federations."""
STEPPED = 20_000_000
"""Seeds from here on are those of federations whose versions travel as steps; every third one is sealed as well."""
JUMPS_S = (0.0, -1e6, 1e7, -1e9)
SMALL_JUMPS_S = (0.0, 30.0, 120.0, -100.0)
"""Sealed messages carry times, and a clock that is days wrong is turned away by rule."""


@dataclass(frozen=True, slots=True)
class SitePlan:
    """One site: seconds of latency and of training, when it comes, and when it leaves for ever (None: never)."""

    name: str
    latency_s: float
    training_s: float
    comes_s: float
    leaves_s: float | None


@dataclass(slots=True)
class Weather:
    """Chances per message, and mean events per minute and machine; all 0 is a perfect world."""

    drop: float = 0.0
    double: float = 0.0
    garble: float = 0.0
    """A byte of a chunk is another one when it arrives."""
    jitter_s: float = 0.02
    reorders: bool = False
    """Messages on different topics overtake each other, as in a cluster."""
    queue_max: int = 10_000
    """Messages that wait for one subscriber; what is more is lost without a word."""
    drops_oldest: bool = False
    kills: float = 0.0
    power_losses: float = 0.0
    absences: float = 0.0
    """Killed, and away for longer than every time-out."""
    stops: float = 0.0
    """Stopped in good order, and started again."""
    cuts: float = 0.0
    holes: float = 0.0
    """The link is dead and neither side knows."""
    partitions: float = 0.0
    """Some machines together cannot reach the broker for a while, nor connect anew."""
    freezes: float = 0.0
    clock_jumps: float = 0.0
    full_disks: float = 0.0
    failed_syncs: float = 0.0
    """Chance of one sync."""
    failed_writes: float = 0.0
    """Chance of one write, part of which may be there."""
    failed_reads: float = 0.0
    """Chance of one read."""
    rot: float = 0.0
    """Chance of a transfer that has just arrived to be spoilt on the disk, or of a state before it is trained on."""
    journal_errors: float = 0.0
    """Chance of one append."""
    broker_restarts: float = 0.0
    forgets_retained: float = 0.0
    """The broker lets its retained messages go, and goes on."""
    bad_updates: float = 0.0
    """Share of updates that do not pass admission."""
    bad_losses: float = 0.0
    """Share of updates whose loss is no number, where losses are measured."""
    slow_losses: float = 0.0
    """Share of measurements that take as long as a process that has to be started again."""
    forgeries: float = 0.0
    """Somebody at the broker publishes what it may not; in sealed federations alone."""
    old_retained: bool = False
    """The broker begins with the announcement of an earlier run of this federation."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """A world before it begins."""

    seed: int
    federation: FederationConfig
    sites: tuple[SitePlan, ...]
    weather: Weather
    storm_s: float
    link: LinkSection
    budget_chunks: int
    """Credit of the coordinator, in chunks."""
    outbox_max: int
    state_frames: int
    feedback: bool = False
    """Updates leave a residual (`edge_client.residual`)."""
    sealed: bool = False
    quiet: Weather = field(default_factory=Weather)

    @property
    def names(self) -> list[str]:
        """All sites."""
        return [site.name for site in self.sites]

    @property
    def _steps(self) -> str:
        codec = self.federation.codec
        return f"steps in {codec.down}, whole every {codec.steps}, " if codec.steps else ""

    def __str__(self) -> str:
        section = self.federation.aggregation
        faults = ", ".join(
            f"{name} {value:g}"
            for name in Weather.__slots__
            if (value := getattr(self.weather, name)) != getattr(self.quiet, name)
        )
        mode = f"{section.mode}{', sealed' * self.sealed}{', feedback' * self.feedback}"
        rule = section.rule if section.quality == "none" else section.quality
        return (
            f"{mode}, {rule}, {len(self.sites)} sites, quorum {section.quorum}, buffer {section.buffer}, "
            f"{self.federation.federation.versions} versions, {self._steps}budget {self.budget_chunks} chunks, "
            f"window {self.link.window}; {faults or 'no faults'}"
        )


def scenario(seed: int) -> Scenario:
    """The world of a seed. Each kind of fault is absent from many worlds, so that none hides behind another."""
    rng = random.Random(f"mailboat {seed}")
    names = NAMES[: rng.choice((1, 2, 2, 3, 3, 3, 4, 4, 5, 6))]
    sites = tuple(_site(rng, name, first=name == names[0]) for name in names)
    staying = sum(site.leaves_s is None for site in sites)
    federation = make_federation(
        federation={
            "name": "ward",
            "versions": rng.randint(2, 5),
            "sites": list(names) if rng.random() < 0.5 else [],
        },
        aggregation={
            "mode": rng.choice(("sync", "fedbuff", "fedasync")),
            "quorum": rng.randint(1, staying),
            "buffer": rng.randint(1, 4),
            "deadline_s": rng.choice((10.0, 25.0)),
            "staleness": {"limit": rng.choice((1, 3, 1000))},
        },
    )
    federation = _ruled(federation, random.Random(f"mailboat rule {seed}"))
    link = LinkSection(stall_s=STALL_S, backoff_cap_s=8.0, window=rng.choice((1, 2, 4, 6)))
    chances = (random.Random(f"mailboat {name} {seed}") for name in ("more", "losses"))
    weather = _weather(rng, *chances) if seed % 20 else Weather()
    stepped = seed >= STEPPED
    sealed = seed >= SEALED and (not stepped or seed % 3 == 0)
    if stepped:
        federation = _stepped(federation, random.Random(f"steps {seed}"))
    if sealed:
        weather.forgeries = random.Random(f"forger {seed}").uniform(1.0, 20.0)
    return Scenario(
        seed=seed,
        sealed=sealed,
        federation=federation,
        sites=sites,
        weather=weather,
        storm_s=rng.uniform(25, 60),
        link=link,
        budget_chunks=rng.choice((2, 3, 5, 8, 1000)),
        outbox_max=rng.randint(1, 3),
        state_frames=rng.randint(1, 6),
        feedback=random.Random(f"left out {seed}").random() < 0.5,
    )


def _stepped(federation: FederationConfig, rng: random.Random) -> FederationConfig:
    """The same federation with versions that travel as steps, and more of them, so that chains of steps grow."""
    codec = {"down": rng.choice(("int8", "int4", "topk2", "bf16")), "steps": rng.choice((1, 2, 3, 4, 16))}
    section = {"versions": rng.randint(3, 9)}
    return federation.model_copy(
        update={
            "codec": federation.codec.model_copy(update=codec),
            "federation": federation.federation.model_copy(update=section),
        }
    )


def _ruled(federation: FederationConfig, rng: random.Random) -> FederationConfig:
    """The same with another rule of merging, in half of the worlds that merge several updates at a time."""
    section = federation.aggregation
    if section.mode == "fedasync" or rng.random() > 1 / 2:
        return federation
    key, value = rng.choice(
        (("quality", "exp-loss"), ("quality", "size-exp-loss"), ("rule", "ca2fl"), ("rule", "multi-krum"))
    )
    merging = {**section.model_dump(mode="json"), key: value}
    if value == "multi-krum" and section.mode == "fedbuff":
        merging["buffer"] = section.krum_min
    return federation.model_copy(update={"aggregation": AggregationSection.model_validate(merging)})


def _site(rng: random.Random, name: str, *, first: bool) -> SitePlan:
    slow = rng.random() < 0.2
    return SitePlan(
        name=name,
        latency_s=rng.uniform(0.1, 0.6) if slow else rng.uniform(0.005, 0.05),
        training_s=rng.uniform(3, 12) if slow else rng.uniform(0.5, 3),
        comes_s=rng.uniform(0, 40) if rng.random() < 0.2 else rng.random(),
        leaves_s=rng.uniform(5, 50) if not first and rng.random() < 0.15 else None,
    )


def _weather(rng: random.Random, more: random.Random, losses: random.Random) -> Weather:
    """`more` and `losses` draw the faults that came later, so that the others stay what they were."""

    def some(low: float, high: float, share: float = 0.5, by: random.Random = rng) -> float:
        return by.uniform(low, high) if by.random() < share else 0.0

    return Weather(
        absences=some(0.3, 1.0, 0.3, more),
        stops=some(0.5, 3.0, 0.3, more),
        partitions=some(0.5, 2.0, 0.3, more),
        failed_writes=some(0.001, 0.01, 0.15, more),
        failed_reads=some(0.001, 0.01, 0.15, more),
        rot=some(0.02, 0.2, 0.2, more),
        bad_losses=some(0.1, 0.5, 0.6, losses),
        slow_losses=some(0.05, 0.3, 0.4, losses),
        forgets_retained=some(0.5, 3.0, 0.3, more),
        drop=some(0.01, 0.15),
        double=some(0.01, 0.2),
        garble=some(0.01, 0.1, 0.3),
        jitter_s=rng.choice((0.02, 0.1, 0.5)),
        reorders=rng.random() < 0.4,
        queue_max=rng.choice((2, 5, 10_000, 10_000)),
        drops_oldest=rng.random() < 0.5,
        kills=some(0.5, 4.0, 0.7),
        power_losses=some(0.5, 4.0, 0.6),
        cuts=some(0.5, 8.0),
        holes=some(0.3, 2.0, 0.4),
        freezes=some(0.3, 2.0, 0.3),
        clock_jumps=some(0.5, 3.0, 0.3),
        full_disks=some(0.3, 1.0, 0.25),
        failed_syncs=some(0.005, 0.03, 0.2),
        journal_errors=some(0.01, 0.1, 0.2),
        broker_restarts=some(0.3, 2.0, 0.4),
        bad_updates=some(0.05, 0.4, 0.4),
        old_retained=rng.random() < 0.15,
    )
