"""The demonstration's hospitals in one process: real notes, model, trainer, seals and merge; no broker."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.numpy import save_file

from coordinator import admission
from coordinator.aggregate import merge
from coordinator.genesis import open_run
from coordinator.ledger import Ledger
from coordinator.merging import committed, in_order, plan_merge
from coordinator.records import accepted_record
from edge_client.data import load_notes
from edge_client.model import LoadedModel, apply_state, load_model, read_trainable, seal
from edge_client.outbox import Outbox
from edge_client.sealing import seal_delta
from edge_client.trainer import (
    EVALUATION_BATCH,
    Dataset,
    TrainResult,
    evaluate,
    make_dataset,
    round_section,
    round_seed,
    train,
)
from edge_client.worker import split_holdout
from mailboat.demo import defaults
from mailboat.demo.plan import DemoOptions, make_plan
from shared.config import CodecSection, FederationConfig
from shared.manifest import Manifest, UpdateFacts
from shared.messages import Receipt
from shared.states import open_state
from shared.store import FrameStore
from shared.tensorfile import F32Array

Tensors = Mapping[str, F32Array]


@dataclass(frozen=True, slots=True)
class Version:
    """A version that was merged: strict F1 on notes that nobody trains on, and bytes of all updates as sealed."""

    f1: float
    wire_bytes: int
    down_bytes: int
    """What a site fetches that follows from version to version: the state, or the step to it."""


class Hospitals:
    """The demonstration's sites with their notes, below `folder`, and the shipped model, loaded once."""

    def __init__(self, folder: Path, *, versions: int, seed: int = 0) -> None:
        torch.set_num_threads(1)
        plan = make_plan(DemoOptions(workdir=folder / "demo", versions=versions, seed=seed), name="bench")
        plan.task.make(
            plan.layout.notes,
            sites=plan.options.sites,
            notes=plan.options.notes,
            alpha=plan.options.alpha,
            seed=seed,
            heldout=plan.options.heldout,
        )
        self.federation = plan.federation
        self.loaded: LoadedModel = load_model(self.federation.model.base, self.federation)
        self.initial = read_trainable(self.loaded)
        self._notes = plan.layout.notes
        self._held_out = self._dataset("heldout", EVALUATION_BATCH, holdout=0.0)
        batch = self.federation.training.batch_size
        self.sites = {name: self._dataset(name, batch, holdout=defaults.HOLDOUT) for name in plan.started}

    def _dataset(self, name: str, batch_size: int, *, holdout: float) -> Dataset:
        seed = self.federation.federation.seed
        notes = load_notes(self._notes / name, self.loaded.task).notes
        kept, _ = split_holdout(notes, holdout, seed)
        return make_dataset(self.loaded, kept, batch_size=batch_size, seed=seed)

    def train(self, site: str, state: Tensors, version: int) -> TrainResult:
        """As the worker of a site trains on a version."""
        section = self.federation.federation
        return train(
            self.loaded,
            state,
            self.sites[site],
            round_section(self.federation.training, version, section.versions),
            seed=round_seed(section.seed, site, version),
        )

    def score(self, state: Tensors) -> float:
        """Strict F1 on the notes that nobody trains on."""
        apply_state(self.loaded, state)
        return evaluate(self.loaded, self._held_out).overall["strict_f1"]

    def run(self, folder: Path, codec: CodecSection, *, momentum: float) -> Iterator[Version]:
        """Yield the versions of a sync run in which every site answers, its files below `folder`."""
        server = self.federation.aggregation.server.model_copy(
            update={"optimizer": "momentum" if momentum else "sgd", "momentum": momentum}
        )
        aggregation = self.federation.aggregation.model_copy(update={"server": server})
        federation = self.federation.model_copy(update={"codec": codec, "aggregation": aggregation})
        run = _Run(self, folder, federation)
        for version in range(federation.federation.versions):
            yield run.next_version(version)


class _Run:
    def __init__(self, hospitals: Hospitals, folder: Path, federation: FederationConfig) -> None:
        self._hospitals = hospitals
        self._folder = folder
        self._federation = federation
        self._plan = seal(hospitals.loaded, federation)
        initial = folder / "initial.safetensors"
        folder.mkdir(parents=True)
        save_file(dict(hospitals.initial), initial)
        self._ledger = Ledger()
        self._ledger.apply(open_run(folder, federation, self._plan, initial))
        self._states = FrameStore(folder / "states")
        self._updates = FrameStore(folder / "updates")
        self._outboxes = {name: Outbox(folder / name) for name in hospitals.sites}

    def next_version(self, version: int) -> Version:
        """Train at every site, merge, score."""
        for site in self._outboxes:
            self._update(site, version)
        accepted, ledger = in_order(self._ledger.pending), self._ledger
        sent = sum(path.stat().st_size for path in self._updates.root.glob("*.frames"))
        plan = plan_merge(version + 1, accepted, self._federation.aggregation, ledger.parts)
        result = merge(plan, self._updates, self._states, self._folder / "masters", self._plan, self._federation)
        for record in committed(plan, result, self._federation.aggregation, 0.0):
            ledger.apply(record)
        for update in accepted:
            self._updates.delete(update.update_id)
        return Version(self._hospitals.score(self._published()), sent, result.state.wire_bytes)

    def _published(self) -> dict[str, F32Array]:
        return dict(open_state(self._states, self._ledger.parts(self._ledger.version)))

    def _update(self, site: str, version: int) -> None:
        result = self._hospitals.train(site, self._published(), version)
        facts = UpdateFacts(
            site=site,
            base_version=version,
            base_sha256=self._ledger.newest.sha256,
            examples=result.examples,
            metrics={},
        )
        outbox = self._outboxes[site]
        manifest = seal_delta(
            outbox, result.delta, facts, self._federation, self._plan.fingerprint, lambda manifest: manifest
        )
        self._deliver(outbox, manifest)

    def _deliver(self, outbox: Outbox, manifest: Manifest) -> None:
        """What chunks, admission and a receipt are in a real run."""
        with self._updates.open_partial(manifest) as partial:
            for index in range(manifest.frames):
                found = outbox.read_frame(manifest.transfer_id, index)
                assert found is not None, "it has no receipt yet"
                partial.write(index, found[1])
            stored = partial.finish()
        admitted = admission.verify(stored, self._plan)
        outbox.settle(Receipt(update_id=manifest.transfer_id, manifest_sha256=manifest.digest, outcome="accepted"))
        self._ledger.apply(accepted_record(manifest, admitted.norm, manifest.created))
