"""What configuration files say, as frozen pydantic models; `shared.configfile` reads them.

Two kinds, kept apart on purpose. `federation.toml` is what all must agree on; its canonical hash goes into the
fingerprint that every manifest carries. `coordinator.toml` and `site.toml` are each machine's own business.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from shared.ids import Ident, Sha256Hex

CodecName = Literal["f32", "bf16", "int8"]
Mode = Literal["sync", "fedbuff", "fedasync"]
StalenessKind = Literal["constant", "hinge", "polynomial"]
MergeRule = Literal["mean", "median", "trimmed-mean"]
ServerOptimizerName = Literal["sgd", "momentum", "nesterov", "adam", "yogi", "fadas", "delayed-nesterov"]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


COORDINATOR_USER = "coordinator"
"""The coordinator's name at the broker, whose access list could not tell a site of that name from it."""


def _not_the_coordinator(name: str) -> str:
    if name == COORDINATOR_USER:
        msg = f"no site may be named {COORDINATOR_USER}: the broker could not tell the two apart"
        raise ValueError(msg)
    return name


SiteName = Annotated[Ident, AfterValidator(_not_the_coordinator)]


class Section(BaseModel):
    """Frozen; an unknown key is an error, never ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid")


# -- the federation: agreed by all, fingerprinted ---


class ModelSection(Section):
    """The pre-trained model that everybody starts from."""

    base: str
    """Local directory or hub id. Where it lies may differ per machine, so it stays out of the fingerprint."""
    revision: str = "main"
    frozen_sha256: Sha256Hex | None = None
    """Expected hash of the frozen weights; checked when given, and always part of the fingerprint as computed."""


class TaskSection(Section):
    """What is learnt."""

    kind: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,63}$")] = "ner"
    """Name of a task that is installed where models are loaded; a coordinator's host needs none of it."""
    labels: tuple[Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")], ...] = ("problem", "treatment", "test")
    max_length: int = Field(default=192, ge=8, le=8192)
    """Tokens per training window."""

    @field_validator("labels")
    @classmethod
    def _distinct(cls, labels: tuple[str, ...]) -> tuple[str, ...]:
        if not labels or len(set(labels)) != len(labels):
            msg = "labels must be distinct and at least one"
            raise ValueError(msg)
        return labels


class LayersSection(Section):
    """Which layers are trained and exchanged."""

    plan: str = "top:6"
    """`6` or `top:6`; a share of the depth such as `0.375`; a list such as `10,11,15`; `all`."""


class CodecSection(Section):
    """How tensors travel."""

    up: CodecName = "bf16"
    down: CodecName = "bf16"
    slice_kib: int = Field(default=512, ge=4, le=768)
    """Raw bytes per chunk, in KiB; 64 to 256 suits slow links."""


class StalenessSection(Section):
    """s(tau): how much an update counts that is tau versions late."""

    kind: StalenessKind = "polynomial"
    a: Positive | None = None
    """Exponent (polynomial, 0.5) or slope (hinge, 10)."""
    b: Annotated[float, Field(ge=0)] | None = None
    """Hinge: versions of lateness that cost nothing (4)."""
    limit: int = Field(default=1000, ge=0)
    """Updates later than this are rejected under the rule too-stale."""


class ServerSection(Section):
    """The server optimizer over the mean delta."""

    optimizer: ServerOptimizerName = "sgd"
    lr: Positive | None = None
    """The step's size; None takes what the optimizer's authors start from, see `rate`."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Share of the running mean that is kept: beta, or beta_1 of those with two; sgd has none."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """adam, yogi, fadas: share of the running square that is kept."""
    eps: Positive = 1e-3
    """adam, yogi, fadas: added to the root of the running square; the smaller, the more alike all steps."""
    slow_after: int = Field(default=4, ge=0, le=1_000_000)
    """fadas: with an update later than this many versions the step is divided by its lateness."""
    every: int = Field(default=5, ge=1, le=1_000_000)
    """delayed-nesterov: versions from one step of the momentum to the next."""

    @property
    def rate(self) -> float:
        """`lr`, or the default of the optimizer.

        sgd and momentum: 1, so that sgd is FedAvg. nesterov, delayed-nesterov: 0.7 (Douillard et al., arXiv
        2311.08105). adam 0.1, yogi 0.01 (Reddi et al., arXiv 2003.00295). fadas 0.001 (Wang et al., arXiv 2407.18365).
        """
        return SERVER_RATES[self.optimizer] if self.lr is None else self.lr


SERVER_RATES: Mapping[ServerOptimizerName, float] = MappingProxyType(
    {
        "sgd": 1.0,
        "momentum": 1.0,
        "nesterov": 0.7,
        "adam": 0.1,
        "yogi": 0.01,
        "fadas": 0.001,
        "delayed-nesterov": 0.7,
    }
)


class AggregationSection(Section):
    """When a round closes and how its updates are weighted."""

    mode: Mode = "sync"
    quorum: int = Field(default=1, ge=1, le=100_000)
    """Fewest sites that must have answered, with an update or with one that is rejected, to close a sync round; it also
    waits for every site present, up to the deadline."""
    buffer: int = Field(default=3, ge=1, le=100_000)
    """K of FedBuff."""
    alpha: Annotated[float, Field(gt=0, le=1)] = 0.6
    """Mixing rate of FedAsync."""
    size_power: Annotated[float, Field(ge=0, le=1)] = 1.0
    """p in weight = examples^p; 1 is FedAvg, 0 counts every update alike."""
    rule: MergeRule = "mean"
    """What stands for a round's updates, tensor by tensor: their weighted mean, or for each number the median or the
    mean without the outermost, in which every update counts alike."""
    trim: Annotated[float, Field(gt=0, lt=0.5)] = 0.2
    """Share of the updates that the trimmed mean leaves out at each end, rounded down."""
    clip_norm: Positive | None = None
    """An update whose L2 norm, over all its tensors, is above this is scaled down to it; None leaves it as it is."""
    deadline_s: Positive = 3600.0
    """A round that has any update at all closes after this long (sync: only with the quorum)."""
    staleness: StalenessSection = StalenessSection()
    server: ServerSection = ServerSection()

    @model_validator(mode="after")
    def _fedasync_mixes(self) -> Self:
        if self.mode == "fedasync" and (self.server.optimizer != "sgd" or self.server.lr is not None):
            raise ValueError('[aggregation.server] has no meaning with mode = "fedasync", which mixes by alpha')
        if self.mode == "fedasync" and self.clip_norm is not None:
            raise ValueError('clip_norm has no meaning with mode = "fedasync", which mixes whole states')
        if self.mode == "fedasync" and self.rule != "mean":
            raise ValueError(f'rule = "{self.rule}" needs several updates, mode = "fedasync" merges one at a time')
        return self


class TrainingSection(Section):
    """Local training of one update."""

    epochs: int = Field(default=1, ge=1, le=1000)
    batch_size: int = Field(default=8, ge=1, le=4096)
    lr: Positive = 1e-3
    final_lr: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of `lr` that is left when training from the last version but one; it falls evenly with the version."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    warmup: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of the steps of one update over which the rate rises."""
    max_grad_norm: Positive = 1.0


class TrustSection(Section):
    """Whether the broker is trusted."""

    mode: Literal["none", "sealed"] = "none"
    """none: whoever the broker admits may speak, and the broker reads everything. sealed: every message is signed and
    encrypted, and one that is not is refused."""


class FederationSection(Section):
    """The federation itself."""

    name: Ident
    versions: int = Field(default=10, ge=1, le=1_000_000)
    """The run is complete when this version is published."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    sites: tuple[SiteName, ...] = ()
    """Who may take part; empty admits whoever the broker admits."""


class FederationConfig(Section):
    """`federation.toml`."""

    federation: FederationSection
    model: ModelSection
    task: TaskSection = TaskSection()
    layers: LayersSection = LayersSection()
    codec: CodecSection = CodecSection()
    aggregation: AggregationSection = AggregationSection()
    training: TrainingSection = TrainingSection()
    trust: TrustSection = TrustSection()

    @property
    def config_sha256(self) -> str:
        """SHA-256 of the canonical JSON of all that must agree: everything but where the base model lies."""
        agreed = self.model_dump(mode="json", exclude={"model": {"base"}})
        canonical = json.dumps(agreed, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(canonical.encode()).hexdigest()


# -- each machine's own ---


class BrokerSection(Section):
    """How to reach the broker."""

    url: str = "mqtt://127.0.0.1:1883"
    """`mqtt://host:port` or `mqtts://host:port`; several, separated by commas, for a cluster."""
    username: str | None = None
    password_file: Path | None = None
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None

    @field_validator("url")
    @classmethod
    def _known_scheme(cls, url: str) -> str:
        if not url.startswith(("mqtt://", "mqtts://")):
            msg = "must start with mqtt:// or mqtts://"
            raise ValueError(msg)
        return url

    @model_validator(mode="after")
    def _pair(self) -> Self:
        if (self.cert_file is None) != (self.key_file is None):
            msg = "cert_file and key_file go together"
            raise ValueError(msg)
        return self


class LinkSection(Section):
    """Patience of the link; one time-out: no progress for `stall_s`."""

    stall_s: Positive = 5.0
    """What made no progress for so long is asked for again; a connection on which no byte moves is given up sooner."""
    backoff_cap_s: Positive = 15.0
    """Longest wait before the next attempt to connect."""
    keepalive_s: int = Field(default=30, ge=5, le=3600)
    window: int = Field(default=16, ge=1, le=4096)
    """Chunks in flight per transfer."""


class LocalTrustSection(Section):
    """This machine's keys."""

    kit: Path | None = None
    """Folder of keys and memberships, 0700; needed when the federation's trust is sealed."""


class AdmissionSection(Section):
    """What one site may bring. A sound update that is out of line is kept apart until a person has looked at it."""

    updates_per_hour: int = Field(default=360, ge=0)
    """New updates of one site, all of an hour's at once if need be; beyond it the site is told to wait. 0: no limit."""
    mib_per_hour: int = Field(default=0, ge=0)
    """The same for their bytes; 0 leaves it at updates_per_hour times what the plan admits."""
    messages_per_s: Positive = 100.0
    """Control messages of one site that are looked at, ten seconds' worth at once; the rest is dropped unread."""
    norm_max: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """L2 norm of a delta above which it goes into quarantine; 0: none."""
    norm_factor: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 20.0
    """The same, as a multiple of the median over the last 64 updates, once there are eight; 0: none."""
    examples_min: int = Field(default=1, ge=1)
    """Examples that an update must claim to stay out of quarantine."""
    examples_max: int = Field(default=0, ge=0)
    """Examples that it may claim; 0: no limit."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.examples_max and self.examples_max < self.examples_min:
            msg = "examples_max is below examples_min"
            raise ValueError(msg)
        return self


class CoordinatorConfig(Section):
    """`coordinator.toml`."""

    federation: Path
    storage: Path
    broker: BrokerSection = BrokerSection()
    link: LinkSection = LinkSection()
    trust: LocalTrustSection = LocalTrustSection()
    admission: AdmissionSection = AdmissionSection()
    credit_mib: int = Field(default=256, ge=1)
    """Upper bound of granted, unacknowledged bytes over all sites: what the broker may have to hold for us."""
    spool_mib: int = Field(default=0, ge=0)
    """Most bytes that arriving and kept updates may take here; 0 sets no bound. Beyond it sites are told to wait."""
    min_free_mib: int = Field(default=1024, ge=0)
    """Bytes that no upload may take from the disk; the journal, the next version and other programs need them."""
    exit_when_done: bool = False


class DataSection(Section):
    """The notes, which never leave this machine."""

    notes: Path
    skip_bad: bool = False
    holdout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the notes kept back to report a local F1; never trained on."""


class SiteConfig(Section):
    """`site.toml`."""

    name: SiteName
    federation: Path
    storage: Path
    data: DataSection
    broker: BrokerSection = BrokerSection()
    link: LinkSection = LinkSection()
    trust: LocalTrustSection = LocalTrustSection()
    model_dir: Path | None = None
    """Where the base model lies here, when not where federation.toml says."""
    threads: int = Field(default=0, ge=0)
    """Torch threads of the training worker; 0 leaves the choice to torch."""
    outbox_max: int = Field(default=4, ge=1)
    """Sealed updates that may wait for the network before training pauses."""
    outbox_mib: int = Field(default=0, ge=0)
    """Most bytes that sealed updates may take here before training pauses; 0 sets no bound."""
    min_free_mib: int = Field(default=512, ge=0)
    """Bytes that stay free on the disk; training pauses rather than take them."""
