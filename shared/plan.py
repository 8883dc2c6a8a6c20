"""The sealed plan: a federation resolved against its real model, and the fingerprint that follows from it.

`federation.toml` says "top 6"; the sealed plan says which tensors, of which shapes, over which frozen weights. It is
made once where torch is installed, and read wherever it is not (a coordinator host needs no torch). A site makes its
own from its own copy of the model and compares fingerprints before it trains.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shared.config import FederationConfig
from shared.errors import ConfigError
from shared.ids import Sha256Hex
from shared.manifest import describe_invalid


class SealedPlan(BaseModel):
    """What exactly is trained, over what exactly; see the module's docstring."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = 1
    architecture: str
    """Class that is trained, for example LlamaForTokenClassification."""
    depth: int = Field(ge=1)
    """Blocks of the model."""
    layers: tuple[int, ...]
    """Blocks that are trained, ascending, counted from 0 at the bottom."""
    tensors: dict[str, tuple[int, ...]]
    """Tensors that are trained and travel, and their shapes, sorted by name."""
    personal: dict[str, tuple[int, ...]] = Field(default_factory=dict)
    """Tensors that each site trains for itself and keeps, the same way."""
    trained_parameters: int = Field(ge=1)
    """Parameters that are trained and travel."""
    total_parameters: int = Field(ge=1)
    config_sha256: Sha256Hex
    frozen_sha256: Sha256Hex
    tokenizer_sha256: Sha256Hex
    """The same weights over other token ids would be trained on nonsense."""
    labels: tuple[Annotated[str, Field(min_length=1)], ...]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the canonical JSON of this plan; what every manifest carries."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    @property
    def saving(self) -> float:
        """Share of the model's parameters that never travels, 0 to 1."""
        return 1 - self.trained_parameters / self.total_parameters


def load_plan(path: Path, federation: FederationConfig) -> SealedPlan:
    """Read a sealed plan and check that it was sealed from this federation; ConfigError names what differs."""
    hint = "seal it again: mailboat coordinator seal"
    try:
        plan = SealedPlan.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file", hint=hint) from None
    except ValidationError as error:
        raise ConfigError(f"{path}: {describe_invalid('plan', error)}", hint=hint) from None
    if plan.config_sha256 != federation.config_sha256:
        raise ConfigError(f"{path} was sealed from another federation.toml than the one given", hint=hint)
    return plan
