"""`federation.toml`: what all must agree on."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from shared.config.learning import (
    SPARSE,
    AdapterSection,
    CodecSection,
    LayersSection,
    ModelSection,
    TaskSection,
    TrainingSection,
)
from shared.config.merging import AggregationSection
from shared.config.privacy import PrivacySection
from shared.config.section import Section
from shared.ids import Ident

COORDINATOR_USER = "coordinator"
"""The coordinator's name at the broker, whose access list could not tell a site of that name from it."""


def _not_the_coordinator(name: str) -> str:
    if name == COORDINATOR_USER:
        msg = f"no site may be named {COORDINATOR_USER}: the broker could not tell the two apart"
        raise ValueError(msg)
    return name


SiteName = Annotated[Ident, AfterValidator(_not_the_coordinator)]


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
    adapter: AdapterSection = AdapterSection()
    codec: CodecSection = CodecSection()
    aggregation: AggregationSection = AggregationSection()
    training: TrainingSection = TrainingSection()
    privacy: PrivacySection | None = None
    """Sites train under differential privacy where it is there."""
    trust: TrustSection = TrustSection()

    @model_validator(mode="after")
    def _exact_where_means_are_plain(self) -> Self:
        merging = self.aggregation
        plain = merging.mode != "fedasync" and merging.rule == "mean" and merging.server.optimizer == "sgd"
        if self.adapter.kind == "fedex-lora" and not plain:
            raise ValueError(
                '[adapter] kind = "fedex-lora" corrects a weighted mean that is added as it is: it needs [aggregation] '
                'mode = "sync" or "fedbuff", rule = "mean", and optimizer = "sgd"'
            )
        return self

    @model_validator(mode="after")
    def _enough_sites(self) -> Self:
        if sites := len(self.federation.sites):
            self.aggregation.check_enough(sites, f"[federation] sites has {sites}")
            quorum = self.aggregation.quorum
            if self.aggregation.mode == "sync" and quorum > sites:
                raise ValueError(f"[aggregation] quorum = {quorum} is never reached: [federation] sites has {sites}")
        return self

    @model_validator(mode="after")
    def _scores_are_private(self) -> Self:
        if self.privacy is not None and self.layers.by_importance:
            raise ValueError(
                '[layers] plan = "importance:N" tells gradients of notes without noise, which [privacy] forbids'
            )
        return self

    @model_validator(mode="after")
    def _measured_whole(self) -> Self:
        merging = self.aggregation
        if merging.quality != "none" and self.keeps_at_sites:
            raise ValueError(
                f'[aggregation] quality = "{merging.quality}" measures each site\'s model at the coordinator, which '
                'has not what [layers] personal or [adapter] kind = "fedsa-lora" keeps at the site'
            )
        return self

    @model_validator(mode="after")
    def _something_in_the_middle(self) -> Self:
        if self.codec.up in SPARSE and self.aggregation.rule in {"median", "trimmed-mean"}:
            raise ValueError(
                f'[codec] up = "{self.codec.up}" sends few values of each tensor, and rule = "{self.aggregation.rule}" '
                "would take the zeros between them: take another rule or another codec"
            )
        return self

    @property
    def keeps_at_sites(self) -> bool:
        """Whether some of what is trained stays at each site."""
        return bool(self.layers.personal) or self.adapter.kind == "fedsa-lora"

    @property
    def config_sha256(self) -> str:
        """SHA-256 of the canonical JSON of all that must agree: everything but where the base model lies."""
        agreed = self.model_dump(mode="json", exclude={"model": {"base"}})
        canonical = json.dumps(agreed, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(canonical.encode()).hexdigest()
