"""`coordinator.toml` and `site.toml`: each machine's own business."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from shared.config.federation import SiteName
from shared.config.privacy import LocalPrivacySection
from shared.config.section import Positive, Section


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


class ValidationSection(Section):
    """Annotated notes of the coordinator's operator, by which updates are weighed ([aggregation] quality)."""

    notes: Path | None = None
    """They stay on this machine; of an update, its loss on them is told. None: no loss is measured here."""
    skip_bad: bool = False
    model_dir: Path | None = None
    """Where the base model lies here, when not where federation.toml says."""
    threads: int = Field(default=0, ge=0)
    """Torch threads of the process that measures; 0 leaves the choice to torch."""


class CoordinatorConfig(Section):
    """`coordinator.toml`."""

    federation: Path
    storage: Path
    broker: BrokerSection = BrokerSection()
    link: LinkSection = LinkSection()
    trust: LocalTrustSection = LocalTrustSection()
    admission: AdmissionSection = AdmissionSection()
    validation: ValidationSection = ValidationSection()
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


class LocalLayersSection(Section):
    """How deep this site trains, where the federation's plan is more than it can bear: the plan's topmost blocks."""

    at_most: int | None = Field(default=None, ge=1)
    """Blocks."""
    upload_mib: Positive | None = None
    """Size of an update, before it is compressed."""
    memory_mib: Positive | None = None
    """Memory of the worker while it trains, as estimated from what it holds and from one forward pass."""
    seconds: Positive | None = None
    """Time for one update, as estimated from single steps."""


StateDType = Literal["f32", "bf16", "f16"]


class PrefixSection(Section):
    """What the frozen blocks make of the notes: computed once, and kept in the site's storage."""

    dtype: StateDType = "f32"
    """f32 trains as if nothing were kept, bit for bit; the others take half the disk, and round."""
    limit_mib: int = Field(default=8192, ge=0)
    """Most bytes that it may take there; what would take more is not kept, and computed again in each epoch."""


class SiteConfig(Section):
    """`site.toml`."""

    name: SiteName
    federation: Path
    storage: Path
    data: DataSection
    broker: BrokerSection = BrokerSection()
    link: LinkSection = LinkSection()
    trust: LocalTrustSection = LocalTrustSection()
    layers: LocalLayersSection = LocalLayersSection()
    prefix: PrefixSection = PrefixSection()
    privacy: LocalPrivacySection = LocalPrivacySection()
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
