"""What a version costs on its way to a site, and what its rounding costs in F1: `python -m bench.downlink --json FILE`.

    python -m bench.downlink --runs bf16 int8 "int8 steps 4" --sites 3 --versions 8 --seed 0

The model, the trainer, the merge and the store of a real run in one process, one run after the other with the same
notes and seeds; updates travel as f32, so that only the downlink rounds. Bytes are those of the frames, without packet
headers and announcements (about 0.2 % more); `full` is the whole base model as float32, which is what FedAvg without
layers and codec would send. No broker and no wire: `mailboat demo` has those.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors.numpy import save_file

from coordinator import admission
from coordinator.aggregate import merge
from coordinator.genesis import open_run
from coordinator.ledger import Ledger
from coordinator.masters import prune_masters
from coordinator.merging import plan_merge, version_records
from coordinator.records import accepted_record
from edge_client.data.load import load_notes
from edge_client.model import LoadedModel, apply_state, load_model, read_trainable, seal
from edge_client.sealing import seal_parts
from edge_client.trainer import EVALUATION_BATCH, Dataset, evaluate, make_dataset, round_section, round_seed, train
from mailboat.demo import defaults
from mailboat.demo.plan import server_section
from mailboat.demo.tasks import find_task
from mailboat.sealing import INITIAL
from mailboat.synth.write import HELDOUT, make_notes
from shared.config import (
    AggregationSection,
    CodecSection,
    FederationConfig,
    FederationSection,
    LayersSection,
    ModelSection,
    TrainingSection,
)
from shared.manifest import UpdateFacts
from shared.plan import SealedPlan
from shared.states import open_state
from shared.store import FrameStore

MODEL = Path(__file__).parents[1] / "mailboat" / "assets" / "base-llama-16"


@dataclass(frozen=True, slots=True, kw_only=True)
class Down:
    """What came of one run; bytes of frames."""

    run: str
    first: int
    """Version 0, to each site."""
    version: float
    """A later version, to each site that follows; mean."""
    whole: float
    """A state that can be had whole, for a site that cannot follow; mean."""
    kept: int
    """States and steps that lie at the coordinator when the run is over."""
    full: int
    """The whole base model as float32."""
    share: float
    """Bytes down in the whole run, version 0 included, as a share of `full` for each version that was pulled."""
    f1: list[float]
    """The task's main measure on the held-out notes, by version."""


def federation_of(run: str, versions: int, seed: int, layers: str) -> FederationConfig:
    """The federation of a run: a codec, or a codec, "steps" and their number."""
    codec, _, steps = run.partition(" steps ")
    task = find_task("ner")
    return FederationConfig(
        federation=FederationSection(name="bench", versions=versions, seed=seed),
        model=ModelSection(base=str(MODEL)),
        task=task.section,
        layers=LayersSection(plan=layers),
        codec=CodecSection.model_validate(
            {"up": "f32", "down": codec, "steps": int(steps or 0), "slice_kib": defaults.SLICE_KIB}
        ),
        aggregation=AggregationSection(server=server_section("sync")),
        training=TrainingSection(
            epochs=defaults.EPOCHS, batch_size=task.batch_size, lr=task.lr, final_lr=defaults.FINAL_LR
        ),
    )


class Bench:
    """One run's folder, model and data."""

    def __init__(self, folder: Path, notes: Path, federation: FederationConfig, sites: int) -> None:
        self.folder = folder
        self.federation = federation
        self.loaded: LoadedModel = load_model(federation.model.base, federation)
        self.plan: SealedPlan = seal(self.loaded, federation)
        self.names = [f"site-{number}" for number in range(1, sites + 1)]
        self.data = {name: self._dataset(notes / name, federation.training.batch_size) for name in self.names}
        self.heldout = self._dataset(notes / HELDOUT, EVALUATION_BATCH)
        save_file(read_trainable(self.loaded), folder / INITIAL)
        self.updates, self.states = FrameStore(folder / "updates"), FrameStore(folder / "states")
        self.ledger = Ledger()
        self.ledger.apply(open_run(folder, federation, self.plan, folder / INITIAL))

    def _dataset(self, notes: Path, batch_size: int) -> Dataset:
        found = load_notes(notes, self.loaded.task, skip_bad=False)
        return make_dataset(self.loaded, found.notes, batch_size=batch_size, seed=self.federation.federation.seed)

    def score(self) -> float:
        """The main measure of the published state."""
        apply_state(self.loaded, dict(open_state(self.states, self.ledger.parts(self.ledger.version))))
        return next(iter(evaluate(self.loaded, self.heldout).overall.values()))

    def version(self) -> None:
        """Every site trains on the published state; one merge."""
        base, ledger = dict(open_state(self.states, self.ledger.parts(self.ledger.version))), self.ledger
        section = round_section(self.federation.training, ledger.version, self.federation.federation.versions)
        for name in self.names:
            seed = round_seed(self.federation.federation.seed, name, ledger.version)
            trained = train(self.loaded, base, self.data[name], section, seed=seed)
            facts = UpdateFacts(
                site=name,
                base_version=ledger.version,
                base_sha256=ledger.newest.sha256,
                examples=trained.examples,
                metrics={},
            )
            frames, build = seal_parts(trained.delta, facts, self.federation, self.plan.fingerprint)
            stored = self.updates.seal(frames, lambda summary, build=build: build(summary, 0.0))  # type: ignore[misc]
            ledger.apply(accepted_record(stored.manifest, admission.verify(stored, self.plan).norm, 0.0))
        masters = self.folder / "masters"
        planned = plan_merge(ledger.version + 1, ledger.pending, self.federation.aggregation, ledger.parts)
        result = merge(planned, self.updates, self.states, masters, self.plan, self.federation)
        for record in version_records(planned, result, 0.0):
            ledger.apply(record)
        prune_masters(masters, {ledger.version})


def measure(run: str, notes: Path, folder: Path, *, sites: int, versions: int, seed: int, layers: str) -> Down:
    """Run one federation to its end."""
    bench = Bench(folder, notes, federation_of(run, versions, seed, layers), sites)
    f1 = [bench.score()]
    for _ in range(versions):
        bench.version()
        f1.append(bench.score())
        print(f"[downlink] {run}: version {bench.ledger.version}, F1 {100 * f1[-1]:.1f}", file=sys.stderr, flush=True)
    published = bench.ledger.published
    followed = [published[version].transfers[-1].wire_bytes for version in range(1, versions + 1)]
    wholes = [each.whole.wire_bytes for each in published.values() if each.whole is not None]
    full = 4 * bench.plan.total_parameters
    return Down(
        run=run,
        first=wholes[0],
        version=sum(followed) / versions,
        whole=sum(wholes) / len(wholes),
        kept=sum(manifest.wire_bytes for manifest in bench.ledger.transfers.values()),
        full=full,
        share=(wholes[0] + sum(followed)) / (full * (versions + 1)),
        f1=f1,
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.downlink", description=__doc__)
    parser.add_argument("--runs", nargs="+", default=["f32", "bf16", "int8", "bf16 steps 4", "int8 steps 4"])
    parser.add_argument("--sites", type=int, default=defaults.SITES)
    parser.add_argument("--notes", type=int, default=defaults.NOTES)
    parser.add_argument("--versions", type=int, default=defaults.ROUNDS)
    parser.add_argument("--layers", default=defaults.LAYERS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    found: list[Down] = []
    with tempfile.TemporaryDirectory(prefix="mailboat-downlink-") as name:
        root = Path(name)
        make_notes(
            root / "notes", sites=chosen.sites, notes=chosen.notes, alpha=defaults.ALPHA, seed=chosen.seed, heldout=60
        )
        for number, run in enumerate(chosen.runs):
            folder = root / str(number)
            folder.mkdir()
            options = {"sites": chosen.sites, "versions": chosen.versions, "seed": chosen.seed, "layers": chosen.layers}
            found.append(measure(run, root / "notes", folder, **options))
            print(json.dumps(asdict(found[-1])), flush=True)
    if chosen.json:
        chosen.json.write_text(json.dumps([asdict(each) for each in found], indent=1) + "\n")


if __name__ == "__main__":
    main()
