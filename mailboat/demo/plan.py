"""From the options of a demonstration to the configuration of its processes, without starting anything."""

from __future__ import annotations

import dataclasses
import secrets
from dataclasses import dataclass
from pathlib import Path

from mailboat.demo import defaults
from mailboat.demo.tasks import DemoTask, find_task
from mailboat.demo.toml import to_toml
from shared.config import (
    AdapterKind,
    AdapterSection,
    AggregationSection,
    BrokerSection,
    CodecName,
    CodecSection,
    CoordinatorConfig,
    DataSection,
    FederationConfig,
    FederationSection,
    LayersSection,
    LinkSection,
    Mode,
    ModelSection,
    ServerSection,
    SiteConfig,
    StalenessKind,
    StalenessSection,
    TrainingSection,
)
from shared.errors import ConfigError

SHIPPED_MODEL = Path(__file__).parents[1] / "assets" / "base-llama-16"


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """What the person asked for."""

    workdir: Path
    sites: int = defaults.SITES
    absent: int = 0
    """So many sites belong to the federation and are never started."""
    versions: int | None = None
    """Versions to publish; None for as many as make `ROUNDS` local trainings of each site."""
    mode: Mode = "sync"
    staleness: StalenessKind = "polynomial"
    broker: str = "auto"
    """auto, mosquitto, amqtt, or the URL of a broker that runs already."""
    model: str | None = None
    task: str = "ner"
    layers: str = defaults.LAYERS
    adapter: AdapterKind = "none"
    codec: CodecName = "bf16"
    alpha: float = defaults.ALPHA
    notes: int = defaults.NOTES
    heldout: int = defaults.HELDOUT_NOTES
    lr: float | None = None
    """Peak learning rate of the sites; None for the one that suits model, adapters and task."""
    flaky: bool = False
    seed: int = defaults.SEED
    baselines: bool = True
    deadline_s: float = defaults.RUN_DEADLINE_S

    def check(self) -> None:
        """Raise ConfigError for options that cannot be carried out together."""
        find_task(self.task)
        if self.sites < 1:
            raise ConfigError(f"--sites {self.sites} is too few", hint="give at least 1")
        if self.absent >= self.sites:
            raise ConfigError(
                f"--absent {self.absent} leaves none of {self.sites} sites to start",
                hint="leave at least one site present",
            )
        if self.adapter == "fedex-lora" and self.mode == "fedasync":
            raise ConfigError(
                "--adapter fedex-lora has no meaning with --mode fedasync, which averages nothing",
                hint="take --mode sync or fedbuff, or --adapter lora",
            )
        if self.broker not in {"auto", "mosquitto", "amqtt"} and not self.broker.startswith("mqtt://"):
            raise ConfigError(
                f"--broker {self.broker} is not known", hint="use auto, mosquitto, amqtt or mqtt://host:port"
            )
        if self.workdir.exists() and (not self.workdir.is_dir() or any(self.workdir.iterdir())):
            raise ConfigError(f"--workdir {self.workdir} is not empty", hint="name a new folder, or remove the old one")


@dataclass(frozen=True, slots=True)
class Layout:
    """Where things lie in the working folder."""

    root: Path

    @property
    def notes(self) -> Path:
        """Synthetic notes, a folder for each site."""
        return self.root / "notes"

    @property
    def heldout(self) -> Path:
        """The notes on which everybody is scored."""
        return self.notes / "heldout"

    @property
    def pooled(self) -> Path:
        """The training notes of all sites together: what centralized training sees, and a federation never has."""
        return self.root / "pooled"

    @property
    def logs(self) -> Path:
        """One file for each process."""
        return self.root / "logs"

    @property
    def federation(self) -> Path:
        """What all must agree on."""
        return self.root / "federation.toml"

    @property
    def coordinator(self) -> Path:
        """Configuration of the coordinator."""
        return self.root / "coordinator.toml"

    @property
    def storage(self) -> Path:
        """What the coordinator keeps: journal, states, status."""
        return self.root / "coordinator"

    @property
    def scratch(self) -> Path:
        """Files on their way to and from the workers."""
        return self.root / "scratch"

    @property
    def export(self) -> Path:
        """The model that came out, as transformers loads it."""
        return self.root / "model"

    @property
    def plot(self) -> Path:
        """The curves."""
        return self.root / "curves.png"

    def site(self, name: str) -> Path:
        """Configuration of one site."""
        return self.root / f"{name}.toml"

    def log(self, name: str) -> Path:
        """What a process said."""
        return self.logs / f"{name}.log"


@dataclass(frozen=True, slots=True)
class Schedule:
    """When rounds close, and how many there are."""

    versions: int
    quorum: int
    buffer: int

    def rounds(self, mode: Mode, sites: int) -> int:
        """Local trainings that one site does in a run of this length, on average, rounded up; at least 1."""
        updates = self.versions * {"sync": sites, "fedbuff": self.buffer, "fedasync": 1}[mode]
        return -(-updates // sites)


def schedule(options: DemoOptions) -> Schedule:
    """Return closing rules under which each mode does about the same local work: `ROUNDS` trainings of each site.

    Sync merges all sites into a version, FedBuff half of them, FedAsync one; so these publish more versions.
    """
    started = options.sites - options.absent
    buffer = min(started, max(2, options.sites // 2))
    updates = defaults.ROUNDS * started
    versions = {"sync": defaults.ROUNDS, "fedbuff": -(-updates // buffer), "fedasync": updates}[options.mode]
    return Schedule(
        versions=versions if options.versions is None else options.versions,
        quorum=max(1, min(options.sites - 1, started)),
        buffer=buffer,
    )


@dataclass(frozen=True, slots=True)
class Plan:
    """A demonstration that could start now."""

    options: DemoOptions
    layout: Layout
    federation: FederationConfig
    schedule: Schedule
    started: tuple[str, ...]
    absent: tuple[str, ...]

    @property
    def sites(self) -> tuple[str, ...]:
        """All sites of the federation, those never started too."""
        return self.started + self.absent

    @property
    def task(self) -> DemoTask:
        """What is learnt, and from which notes."""
        return find_task(self.options.task)

    @property
    def rounds(self) -> int:
        """Local trainings of one site in all, which the baselines get too."""
        return self.schedule.rounds(self.options.mode, len(self.started))


def _name(broker: str) -> str:
    return f"demo-{secrets.token_hex(3)}" if broker.startswith("mqtt://") else "demo"


def make_plan(options: DemoOptions, *, name: str | None = None) -> Plan:
    """Return the plan for `options`; ConfigError when they contradict each other or name a broken value.

    `name` of the federation, None: "demo" over a broker of our own, so that one seed gives one digest; drawn over a
    broker that runs already, so that what an earlier run left retained there is not ours.
    """
    options.check()
    options = dataclasses.replace(options, workdir=options.workdir.absolute())
    names = tuple(f"site-{number}" for number in range(1, options.sites + 1))
    present = options.sites - options.absent
    rules = schedule(options)
    return Plan(
        options=options,
        layout=Layout(options.workdir),
        federation=_federation(options, rules, names, name or _name(options.broker)),
        schedule=rules,
        started=names[:present],
        absent=names[present:],
    )


def _federation(options: DemoOptions, rules: Schedule, names: tuple[str, ...], name: str) -> FederationConfig:
    return FederationConfig(
        federation=FederationSection(name=name, versions=rules.versions, seed=options.seed, sites=names),
        model=ModelSection(base=model_source(options.model)),
        task=find_task(options.task).section,
        layers=LayersSection(plan=options.layers),
        adapter=AdapterSection(kind=options.adapter, rank=defaults.ADAPTER_RANK, alpha=defaults.ADAPTER_ALPHA),
        codec=codec_section(options.codec),
        aggregation=AggregationSection(
            mode=options.mode,
            quorum=rules.quorum,
            buffer=rules.buffer,
            deadline_s=defaults.ROUND_DEADLINE_S,
            staleness=StalenessSection(kind=options.staleness),
            server=server_section(options.mode, options.adapter),
        ),
        training=TrainingSection(
            epochs=defaults.EPOCHS,
            batch_size=find_task(options.task).batch_size,
            lr=learning_rate(options),
            final_lr=defaults.FINAL_LR,
        ),
    )


def server_section(mode: Mode, adapter: AdapterKind = "none") -> ServerSection:
    """Return momentum for versions that all sites made together; many small late ones already carry each other on.

    A mean of adapters that is corrected to be exact is added as it is.
    """
    if mode == "sync" and adapter != "fedex-lora":
        return ServerSection(optimizer="momentum", momentum=defaults.SERVER_MOMENTUM)
    return ServerSection()


def learning_rate(options: DemoOptions) -> float:
    """Return the sites' peak rate: the one asked for, or the one for the shipped model or for any other."""
    if options.lr is not None:
        return options.lr
    if options.model is None and options.adapter != "none":
        return defaults.ADAPTER_LR
    return find_task(options.task).lr if options.model is None else defaults.OTHER_MODEL_LR


def model_source(given: str | None) -> str:
    """Return the shipped model's folder, the absolute path of a folder that is there, or `given` as a hub id."""
    if given is None:
        return str(SHIPPED_MODEL)
    folder = Path(given).expanduser()
    return str(folder.absolute()) if folder.exists() else given


def codec_section(codec: CodecName) -> CodecSection:
    """Return both directions: f32 and bf16 bear whole states; what is coarser is for the steps from one to the next."""
    steps = defaults.STEPS.get(codec, 0)
    return CodecSection(up=codec, down=codec, steps=steps, slice_kib=defaults.SLICE_KIB)


def coordinator_config(plan: Plan, broker_url: str) -> CoordinatorConfig:
    """Return the coordinator's own configuration; it stays until it is told to leave, so that every site is served."""
    return CoordinatorConfig(
        federation=plan.layout.federation,
        storage=plan.layout.storage,
        broker=BrokerSection(url=broker_url),
        link=LinkSection(stall_s=defaults.STALL_S),
    )


def site_config(plan: Plan, name: str, broker_url: str) -> SiteConfig:
    """Return one site's own configuration: one torch thread, because all sites share this machine."""
    return SiteConfig(
        name=name,
        federation=plan.layout.federation,
        storage=plan.layout.root / name,
        data=DataSection(notes=plan.layout.notes / name, holdout=defaults.HOLDOUT),
        broker=BrokerSection(url=broker_url),
        link=LinkSection(stall_s=defaults.STALL_S),
        threads=1,
    )


def write_federation(plan: Plan) -> None:
    """Write `federation.toml`."""
    plan.layout.federation.write_text(to_toml(plan.federation), encoding="utf-8")


def write_processes(plan: Plan, broker_url: str, site_urls: dict[str, str]) -> None:
    """Write the configuration of the coordinator and of each site that will be started."""
    plan.layout.coordinator.write_text(to_toml(coordinator_config(plan, broker_url)), encoding="utf-8")
    for name in plan.started:
        plan.layout.site(name).write_text(to_toml(site_config(plan, name, site_urls[name])), encoding="utf-8")
