"""The sealed plan: a federation resolved against its real model, and the fingerprint that follows from it.

`federation.toml` says "top 6"; the sealed plan says which tensors, of which shapes, over which frozen weights. It is
made once where torch is installed, and read wherever it is not (a coordinator host needs no torch). A site makes its
own from its own copy of the model and compares fingerprints before it trains.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shared.config import FederationConfig
from shared.errors import ConfigError, RefusedError
from shared.ids import Sha256Hex
from shared.manifest import describe_invalid

Blocks = tuple[int, ...]
"""Blocks of a model, ascending, counted from 0 at the bottom."""

BLOCKS_KEY = "mailboat.blocks"
"""Where the header of a master or state says which blocks are trained from it, as `3,7,9`; absent where all are."""

_BLOCKS = re.compile(r"\d{1,6}(,\d{1,6})*")


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
    at_once: int | None = None
    """How many of them are trained at a time, where importance chooses; None where all are."""
    tensors: dict[str, tuple[int, ...]]
    """What a version consists of: what is trained and travels, and `residuals`; names and shapes, sorted by name."""
    residuals: dict[str, tuple[str, str]] = {}
    """Tensors that no site trains: the coordinator makes them from the updates of these two, the factors A and B of an
    adapter, whose averages they correct (`coordinator.residual`)."""
    personal: dict[str, tuple[int, ...]] = {}
    """Tensors that each site trains for itself and keeps, and their shapes, sorted by name."""
    trained_parameters: int = Field(ge=1)
    """Parameters that are trained and travel."""
    total_parameters: int = Field(ge=1)
    """Of the whole model with its head, adapters not counted: what full-model averaging would send."""
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
    def trained(self) -> dict[str, tuple[int, ...]]:
        """The tensors that an update may hold, with their shapes."""
        return {name: shape for name, shape in self.tensors.items() if name not in self.residuals}

    @property
    def saving(self) -> float:
        """What an update spares against one of the whole model, as a share of its parameters, at most 1."""
        return 1 - self.trained_parameters / self.total_parameters

    @property
    def residual_parameters(self) -> int:
        """Numbers that travel to the sites with a version, and not back."""
        return sum(math.prod(self.tensors[name]) for name in self.residuals)


def blocks_from(metadata: Mapping[str, str]) -> Blocks | None:
    """Return the blocks that a master's or state's header names, None when it names none.

    RefusedError(rule='header-metadata') when what it says is not an ascending list.
    """
    text = metadata.get(BLOCKS_KEY)
    if text is None:
        return None
    if not _BLOCKS.fullmatch(text) or list(blocks := tuple(map(int, text.split(",")))) != sorted(set(blocks)):
        raise RefusedError("a state's header names blocks that are not an ascending list", rule="header-metadata")
    return blocks


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
        raise ConfigError(
            f"{path} was sealed from another federation.toml than the one given",
            hint="a run that has begun goes on with that one alone; before it, seal again: mailboat coordinator seal",
        )
    return plan
