"""Valid values with few words, for tests that are about something else."""

from __future__ import annotations

import hashlib
from typing import Any

from blake3 import blake3

from shared.config import FederationConfig
from shared.configfile import parse_config
from shared.ids import marked
from shared.manifest import Manifest, StateFacts, StepFacts, UpdateFacts
from shared.plan import SealedPlan

SLICE = 4096


def digest(text: str) -> str:
    """A SHA-256 in hex that stands for whatever `text` names."""
    return hashlib.sha256(text.encode()).hexdigest()


def make_federation(**sections: dict[str, Any]) -> FederationConfig:
    """A federation named `ward` with small slices; keyword arguments replace or extend its sections."""
    base: dict[str, dict[str, Any]] = {
        "federation": {"name": "ward", "versions": 3},
        "model": {"base": "unused"},
        "codec": {"slice_kib": SLICE // 1024, "up": "f32", "down": "f32"},
    }
    merged = {key: {**base.get(key, {}), **sections.get(key, {})} for key in {*base, *sections}}
    return parse_config(merged, FederationConfig, "test")


def make_plan(federation: FederationConfig) -> SealedPlan:
    """A plan of one tensor of 100,000 parameters."""
    return SealedPlan(
        architecture="Toy",
        depth=4,
        layers=(3,),
        tensors={"w": (100_000,)},
        trained_parameters=100_000,
        total_parameters=400_000,
        config_sha256=federation.config_sha256,
        frozen_sha256=digest("frozen"),
        tokenizer_sha256=digest("tokenizer"),
        labels=federation.task.labels,
    )


def make_state(plan: SealedPlan, version: int, *, frames: int = 5, salt: str = "") -> Manifest:
    """The manifest of a published state."""
    file_digest = digest(f"state {version}{salt}")
    return _make(plan, file_digest[:32], file_digest, frames, StateFacts(version=version))


def make_step(plan: SealedPlan, version: int, *, frames: int = 2, salt: str = "") -> Manifest:
    """The manifest of the step that makes `make_state` of a version out of that of the version before."""
    base, made, file_digest = (digest(f"{what}{salt}") for what in _step_names(version))
    facts = StepFacts(version=version, base_digest=base, state_digest=made)
    return _make(plan, file_digest[:32], file_digest, frames, facts)


def _step_names(version: int) -> tuple[str, str, str]:
    return f"state {version - 1}", f"state {version}", f"step {version}"


def update_id_of(site: str, what: str) -> str:
    """The update id that this site draws for whatever `what` names."""
    return marked(digest(f"{site} {what}")[:20], site)


def make_update(
    plan: SealedPlan, site: str, base: Manifest, *, update_id: str | None = None, frames: int = 5, examples: int = 10
) -> Manifest:
    """The manifest of an update that starts from the state `base`."""
    transfer_id = update_id or update_id_of(site, base.transfer_id)
    facts = UpdateFacts(
        site=site, base_version=base.state.version, base_digest=base.file_digest, examples=examples, metrics={}
    )
    return _make(plan, transfer_id, digest(f"update {transfer_id}"), frames, facts)


def _make(
    plan: SealedPlan, transfer_id: str, file_digest: str, frames: int, facts: StateFacts | StepFacts | UpdateFacts
) -> Manifest:
    return Manifest(
        transfer_id=transfer_id,
        federation="ward",
        fingerprint=plan.fingerprint,
        codec="f32",
        group=4,
        slice_size=SLICE,
        file_size=SLICE * frames,
        file_digest=file_digest,
        frame_lengths=(SLICE - 100,) * frames,
        frame_hashes=b"".join(blake3(bytes([index % 251])).digest() for index in range(frames)),
        created=0.0,
        facts=facts,
    )
