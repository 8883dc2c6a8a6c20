"""A coordinator's folder with a few small tensors, for tests that merge, admit or replay: real files, no broker."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from coordinator import admission
from coordinator.aggregate import merge
from coordinator.genesis import open_run
from coordinator.ledger import Known
from coordinator.masters import TensorFile, master_path
from coordinator.merging import MergePlan, MergeResult, plan_merge
from coordinator.records import Accepted, Opened
from shared.config import (
    AdapterSection,
    AggregationSection,
    CodecSection,
    FederationConfig,
    FederationSection,
    ModelSection,
)
from shared.manifest import Manifest, StateFacts, UpdateFacts, manifest_from_bytes
from shared.plan import SealedPlan
from shared.slices import FileSummary, FrameWriter, make_transfer_frames
from shared.states import open_state
from shared.store import FrameStore, Stored
from shared.tensorfile import F32Array

Tensors = Mapping[str, Any]
_NONE: Mapping[str, float] = MappingProxyType({})


def arrays(tensors: Tensors) -> dict[str, F32Array]:
    """The same as float32 arrays."""
    return {name: np.asarray(values, dtype=np.float32) for name, values in tensors.items()}


def sealed_plan(
    shapes: Mapping[str, tuple[int, ...]],
    federation: FederationConfig,
    residuals: Mapping[str, tuple[str, str]] = MappingProxyType({}),
) -> SealedPlan:
    """A plan that trains exactly these tensors, apart from the `residuals` among them."""
    count = sum(int(np.prod(shape)) for shape in shapes.values())
    return SealedPlan(
        architecture="LlamaForTokenClassification",
        depth=16,
        layers=(15,),
        tensors=dict(sorted(shapes.items())),
        residuals=dict(residuals),
        trained_parameters=count,
        total_parameters=10 * count,
        config_sha256=federation.config_sha256,
        frozen_sha256="f0" * 32,
        tokenizer_sha256="0" * 64,
        labels=("problem",),
    )


class SmallRun:
    """A run that was just opened at version 0 with the given tensors; codec f32 both ways unless told otherwise.

    Of these, `residuals` are not trained, but made from the updates of the two tensors that are named for each.
    """

    def __init__(
        self,
        folder: Path,
        initial: Tensors,
        *,
        aggregation: AggregationSection | None = None,
        codec: CodecSection | None = None,
        adapter: AdapterSection | None = None,
        residuals: Mapping[str, tuple[str, str]] = MappingProxyType({}),
    ) -> None:
        tensors = arrays(initial)
        self.folder = folder
        self.federation = FederationConfig(
            federation=FederationSection(name="north"),
            model=ModelSection(base="/models/base"),
            codec=codec or CodecSection(up="f32", down="f32", slice_kib=4),
            aggregation=aggregation or AggregationSection(),
            adapter=adapter or AdapterSection(),
        )
        shapes = {name: values.shape for name, values in tensors.items()}
        self.plan = sealed_plan(shapes, self.federation, residuals)
        folder.mkdir(exist_ok=True, parents=True)
        initial_path = folder / "initial.safetensors"
        save_file(tensors, initial_path)
        self.updates = FrameStore(folder / "updates")
        self.states = FrameStore(folder / "states")
        self.masters = folder / "masters"
        self.opened: Opened = open_run(folder, self.federation, self.plan, initial_path, created=1.0)
        self.state_manifests = [manifest_from_bytes(self.opened.state)]
        self.anchors: dict[int, Manifest] = {}
        self.known: dict[str, Known] = {}
        """What became of the updates that were merged."""

    def update(self, site: str, delta: Tensors, *, base: int = 0, examples: int = 1) -> Accepted:
        """Seal, verify and accept one update of a site."""
        return self.accept(self.seal(site, delta, base=base, examples=examples))

    def seal(
        self, site: str, delta: Tensors, *, base: int = 0, examples: int = 1, metrics: Mapping[str, float] = _NONE
    ) -> Stored:
        """Seal one update as a site would; its id is made of site and base version."""
        frames = make_transfer_frames(
            arrays(delta), self.federation.codec.up, {}, self.federation.codec.slice_kib * 1024
        )
        return self.seal_frames(frames, site, base=base, examples=examples, metrics=metrics)

    def seal_frames(
        self,
        frames: FrameWriter,
        site: str,
        *,
        base: int = 0,
        examples: int = 1,
        metrics: Mapping[str, float] = _NONE,
    ) -> Stored:
        """Seal whatever bytes a site could send."""

        def build(summary: FileSummary) -> Manifest:
            return Manifest(
                transfer_id=f"{site}-{base}".encode().hex().ljust(32, "0")[:32],
                federation="north",
                fingerprint=self.plan.fingerprint,
                codec=self.federation.codec.up,
                **dataclasses.asdict(summary),
                created=2.0,
                facts=UpdateFacts(
                    site=site,
                    base_version=base,
                    base_digest=self.state_manifests[base].leads_to,
                    examples=examples,
                    metrics=dict(metrics),
                ),
            )

        return self.updates.seal(frames, build)

    def accept(self, stored: Stored) -> Accepted:
        """Verify a sealed update and return the record of its acceptance."""
        admitted = admission.verify(stored, self.plan)
        facts = stored.manifest.update
        return Accepted(
            update_id=stored.manifest.transfer_id,
            site=facts.site,
            base_version=facts.base_version,
            examples=facts.examples,
            manifest_sha256=stored.manifest.digest,
            file_digest=stored.manifest.file_digest,
            norm=admitted.norm,
            at=3.0,
        )

    def planned(self, accepted: Iterable[Accepted], losses: Mapping[str, float] | None = None) -> MergePlan:
        """The plan of the next version."""
        section, version = self.federation.aggregation, len(self.state_manifests)
        return plan_merge(version, [*accepted], section, self.parts, known=self.known, losses=losses or {})

    def parts(self, version: int) -> tuple[str, ...]:
        """The transfers that make up the published state of a version."""
        anchor, state = self.anchors.get(version), self.state_manifests[version]
        if anchor is not None or isinstance(state.facts, StateFacts):
            return ((anchor or state).transfer_id,)
        return (*self.parts(version - 1), state.transfer_id)

    def merge(self, *accepted: Accepted) -> MergeResult:
        """Make the next version."""
        return self.merge_plan(self.planned(accepted))

    def merge_plan(self, plan: MergePlan) -> MergeResult:
        """Make the next version by a plan, and remember what was merged."""
        result = self.run_plan(plan)
        self.state_manifests.append(result.state)
        if result.anchor is not None:
            self.anchors[result.state.version] = result.anchor
        for part in result.contributions:
            self.known[part.update_id] = Known(
                part.site, "", "merged", version=plan.version, staleness=part.staleness, weight=part.weight
            )
        return result

    def run_plan(self, plan: MergePlan, **options: Any) -> MergeResult:
        """Merge by a plan, whatever version it makes."""
        return merge(plan, self.updates, self.states, self.masters, self.plan, self.federation, created=4.0, **options)

    def master(self, version: int) -> dict[str, list[Any]]:
        """The master of a version as lists."""
        with TensorFile(master_path(self.masters, version)) as tensors:
            return {name: values.tolist() for name, values in tensors.items()}

    def published(self, version: int) -> dict[str, F32Array]:
        """The published state of a version, decoded."""
        return dict(open_state(self.states, self.parts(version)))
