from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from coordinator.masters import TensorFile
from edge_client import depth
from edge_client.outbox import newest_own
from mailboat.experiment.federation import Job, Outcome, Workers, federate
from mailboat.experiment.local_worker import LocalWorker
from mailboat.experiment.spec import ClockSection
from mailboat.synth import make_notes
from shared.config import ComputeSection, DataSection, FederationConfig, SiteConfig
from shared.errors import ConfigError, RefusedError, UnavailableError
from shared.plan import blocks_from
from tests.unit.edge_client import tiny

pytestmark = pytest.mark.slow

SITES = ("site-1", "site-2", "site-3")
CPU = ComputeSection(device="cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random LLaMA."""
    return tiny.save_model(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Notes of three sites of different size."""
    out = tmp_path_factory.mktemp("made") / "notes"
    make_notes(out, sites=3, notes=(2, 3, 4), alpha=1.0, seed=0, heldout=4)
    return out


def job(tmp_path: Path, model: Path, notes: Path, **changes: Any) -> Job:
    """Three sites, two versions, everything in float32; `section={...}` changes the federation."""
    job_changes = {key: changes.pop(key) for key in ("clock", "start", "zero_shot", "site", "sites") if key in changes}
    sections = {
        "federation": {"name": "trial", "versions": 2, "sites": SITES, **changes.pop("federation", {})},
        "codec": {"up": "f32", "down": "f32", "slice_kib": 4, **changes.pop("codec", {})},
        "aggregation": {"quorum": 3, **changes.pop("aggregation", {})},
        "model": {"base": str(model)},
        **changes,
    }
    federation = FederationConfig.model_validate(tiny.federation(**sections).model_dump())
    return Job(
        federation=federation,
        folder=tmp_path / "run",
        notes={name: notes / name for name in federation.federation.sites},
        heldout=notes / "heldout",
        **job_changes,
    )


def run(given: Job, workers: Workers | None = None) -> Outcome:
    """What comes of it, progress untold."""
    return federate(given, workers or Workers(CPU), lambda _share, _word: None)


def by_hand(given: Job, folder: Path, state: Path, version: int) -> tuple[dict[str, Any], list[int]]:
    """FedAvg of one round, computed here: sum n_i delta_i / sum n_i over fresh workers of the same sites."""
    deltas, counts = [], []
    for name, path in given.notes.items():
        config = SiteConfig(name=name, federation=folder, storage=folder, data=DataSection(notes=path, holdout=0.0))
        worker, out = LocalWorker(CPU), folder / f"{name}.safetensors"
        worker.load(config, given.federation, None)
        trained = asyncio.run(worker.train(state, version, out, on_progress=lambda _share, _loss: None))
        deltas.append(load_file(out))
        counts.append(trained.examples)
    total = sum(counts)
    mean = {
        key: sum(np.float32(count / total) * delta[key] for count, delta in zip(counts, deltas, strict=True))
        for key in deltas[0]
    }
    return mean, counts


def test_a_round_is_fedavg_of_what_the_sites_trained(tmp_path: Path, model: Path, notes: Path) -> None:
    """The published version is the initial state plus the mean of the sites' deltas, weighted by their examples."""
    given = job(tmp_path, model, notes, federation={"versions": 1})
    outcome = run(given)
    initial = tmp_path / "run" / "initial.safetensors"
    mean, counts = by_hand(given, tmp_path, initial, 0)
    assert len(set(counts)) == 3, "sites of one size would not show a wrong weight"
    before, after = load_file(initial), load_file(outcome.state)
    for key, change in mean.items():
        np.testing.assert_allclose(after[key], before[key] + change, rtol=1e-5, atol=1e-7)
    assert any(np.abs(change).max() > 1e-4 for change in mean.values()), "nothing was learnt that could be wrong"


def test_the_same_cell_gives_the_same_numbers(tmp_path: Path, model: Path, notes: Path) -> None:
    """Twice, with other workers and with the same ones: scores and states are equal to the last bit."""
    workers = Workers(CPU)
    first = run(job(tmp_path / "a", model, notes), workers)
    again = run(job(tmp_path / "b", model, notes), workers)
    fresh = run(job(tmp_path / "c", model, notes))
    for other in (again, fresh):
        assert [point.scores for point in other.curve] == [point.scores for point in first.curve]
        assert other.state.read_bytes() == first.state.read_bytes()


def test_every_byte_of_the_real_packets_is_counted(tmp_path: Path, model: Path, notes: Path) -> None:
    """Up are three updates a version, down three pulls of each version, with manifests and little more."""
    outcome = run(job(tmp_path, model, notes))
    frames = {
        kind: sum(path.stat().st_size for path in (tmp_path / "run" / kind).glob("*.frames"))
        for kind in ("updates", "states")
    }
    chunks = {kind: [*(tmp_path / "run" / kind).glob("*.frames")] for kind in ("updates", "states")}
    assert len(chunks["updates"]) == 6
    assert len(chunks["states"]) == 3
    up, down = frames["updates"], 3 * frames["states"]
    assert up < outcome.up < 1.4 * up
    assert down < outcome.down < 1.4 * down
    assert outcome.curve[1].up < outcome.curve[2].up <= outcome.up


def test_a_lossy_codec_sends_less(tmp_path: Path, model: Path, notes: Path) -> None:
    """int8 up sends less than half of what float32 does, and what is sent is what is merged."""
    exact, lossy = (run(job(tmp_path / up, model, notes, codec={"up": up})) for up in ("f32", "int8"))
    assert lossy.up < 0.5 * exact.up
    assert lossy.state.read_bytes() != exact.state.read_bytes()


def test_versions_as_steps_send_less(tmp_path: Path, model: Path, notes: Path) -> None:
    """Sites pull nothing but steps, as version 0 is theirs; when a run starts elsewhere they pull that first."""
    whole, stepped = (
        run(job(tmp_path / f"{steps}", model, notes, codec={"down": "int8", "steps": steps})) for steps in (0, 4)
    )
    assert stepped.versions == 2
    assert stepped.down < 0.9 * whole.down
    begun = run(job(tmp_path / "on", model, notes, codec={"down": "int8", "steps": 4}, start=stepped.state))
    assert begun.down > stepped.down
    assert begun.curve[0].scores == stepped.curve[-1].scores


@pytest.mark.parametrize(
    "trained",
    [
        {"layers": {"plan": "importance:1", "among": "top:3", "rechoose": 1}},
        {"layers": {"plan": "top:2"}, "adapter": {"kind": "fedsa-lora", "rank": 2}},
    ],
)
def test_whatever_is_trained_may_travel_as_steps(
    trained: dict[str, Any], tmp_path: Path, model: Path, notes: Path
) -> None:
    """Blocks that are chosen anew with each version stand in the header of the state that a step makes."""
    outcome = run(job(tmp_path, model, notes, codec={"down": "int8", "steps": 4}, **trained))
    assert [point.version for point in outcome.curve] == [0, 1, 2]
    with TensorFile(outcome.state) as state:
        assert (blocks_from(state.metadata) is not None) == ("adapter" not in trained)


def test_a_version_is_scored_as_published(tmp_path: Path, model: Path, notes: Path) -> None:
    """Version 0 and each later one has its score, the same that a worker gives the published state."""
    given = job(tmp_path, model, notes)
    outcome = run(given)
    assert [point.version for point in outcome.curve] == [0, 1, 2]
    config = SiteConfig(
        name="site-1", federation=tmp_path, storage=tmp_path, data=DataSection(notes=notes / "site-1", holdout=0.0)
    )
    worker = LocalWorker(CPU)
    worker.load(config, given.federation, None)
    assert worker.evaluate(outcome.state, given.heldout).overall == outcome.curve[-1].scores


@pytest.mark.parametrize(
    "kept",
    [
        {"layers": {"plan": "top:2", "personal": ["score.*"]}},
        {"adapter": {"kind": "fedsa-lora", "rank": 4, "alpha": 4}},
    ],
)
def test_what_stays_at_the_sites_is_scored_as_they_have_it(
    kept: dict[str, Any], tmp_path: Path, model: Path, notes: Path
) -> None:
    """The score is the mean over the sites, each with the tensors that it trained, and not of those all begin with."""
    given = job(tmp_path, model, notes, federation={"versions": 1}, training={"lr": 0.01, "epochs": 16}, **kept)
    outcome = run(given)
    trained, begun = [], []
    for name, path in given.notes.items():
        storage = given.folder / name
        own = newest_own(storage)
        assert own is not None
        worker = LocalWorker(CPU)
        data = DataSection(notes=path, holdout=0.0)
        worker.load(SiteConfig(name=name, federation=tmp_path, storage=storage, data=data), given.federation, None)
        begun.append(worker.evaluate(outcome.state, given.heldout))
        worker.own = partial(newest_own, storage)
        trained.append(worker.evaluate(outcome.state, given.heldout))
    said = outcome.curve[-1].scores
    for measure, value in said.items():
        assert value == pytest.approx(np.mean([found.overall[measure] for found in trained]))
    assert outcome.labels["problem"]["strict_f1"] == pytest.approx(
        np.mean([found.labels["problem"]["strict_f1"] for found in trained])
    )
    assert said["lenient_f1"] != pytest.approx(np.mean([found.overall["lenient_f1"] for found in begun]), abs=1e-3)
    assert len({found.overall["lenient_f1"] for found in trained}) > 1, "each site has tensors of its own"


def test_a_cell_may_start_where_another_ended(tmp_path: Path, model: Path, notes: Path) -> None:
    """From the first's last state the second goes on; zero-shot scores that state and trains nothing."""
    first = run(job(tmp_path / "a", model, notes))
    scored = run(job(tmp_path / "b", model, notes, start=first.state, zero_shot=True))
    assert [point.scores for point in scored.curve] == [first.curve[-1].scores]
    assert (scored.up, scored.versions, scored.train_cpu_s) == (0, 0, ())
    further = run(job(tmp_path / "c", model, notes, start=first.state))
    assert further.curve[0].scores == first.curve[-1].scores


CLOCK = ClockSection.model_validate({"train_s": 600, "up_mbit": 10, "down_mbit": 10, "start_hour": 9})


def test_sync_waits_for_the_slowest(tmp_path: Path, model: Path, notes: Path) -> None:
    """A site at half speed takes 1200 s a version; two versions are there after twice that, and little more."""
    clock = CLOCK.model_validate({**CLOCK.model_dump(), "sites": {"site-2": {"speed": 0.5}}})
    outcome = run(job(tmp_path, model, notes, clock=clock))
    assert 2400 < outcome.curve[-1].at_s < 2500


def test_fedbuff_does_not_wait(tmp_path: Path, model: Path, notes: Path) -> None:
    """With a buffer of 2 the two quick sites make each version, and the slow one's update comes late into one."""
    clock = CLOCK.model_validate({**CLOCK.model_dump(), "sites": {"site-2": {"speed": 0.4}}})
    outcome = run(
        job(
            tmp_path,
            model,
            notes,
            clock=clock,
            federation={"versions": 4},
            aggregation={"mode": "fedbuff", "buffer": 2, "quorum": 1},
        )
    )
    assert 2400 < outcome.curve[-1].at_s < 2600
    assert len(outcome.train_cpu_s) >= 8


def test_a_nightly_site_answers_at_night(tmp_path: Path, model: Path, notes: Path) -> None:
    """A sync run that waits for all has no version before the nightly site's link is there, after 13 hours."""
    clock = CLOCK.model_validate({**CLOCK.model_dump(), "sites": {"site-3": {"hours": (22, 6)}}})
    outcome = run(job(tmp_path, model, notes, clock=clock, federation={"versions": 1}))
    assert 13 * 3600 + 600 < outcome.curve[-1].at_s < 13.5 * 3600


def test_a_machine_that_goes_off_trains_again(tmp_path: Path, model: Path, notes: Path) -> None:
    """A site that is off for half the time loses what it was training, and the run ends all the same, later."""
    clock = CLOCK.model_validate({**CLOCK.model_dump(), "sites": {"site-1": {"off_share": 0.5, "off_s": 900}}})
    outcome = run(job(tmp_path, model, notes, clock=clock, federation={"versions": 4}))
    calm = run(job(tmp_path / "calm", model, notes, clock=CLOCK, federation={"versions": 4}))
    assert outcome.curve[-1].at_s > calm.curve[-1].at_s + 600
    assert outcome.state.read_bytes() == calm.state.read_bytes(), "who was away changes when, and not what"


def test_a_run_that_stands_still_says_so(tmp_path: Path, model: Path, notes: Path) -> None:
    """A quorum that never comes together ends at the limit of days, and names the version."""
    clock = CLOCK.model_validate({**CLOCK.model_dump(), "days": 0.1, "sites": {"site-1": {"hours": (1, 2)}}})
    with pytest.raises(UnavailableError, match="version 0 of 2"):
        run(job(tmp_path, model, notes, clock=clock))


def test_error_feedback_lives_at_the_site(tmp_path: Path, model: Path, notes: Path) -> None:
    """topk2 sends a small part and owes the rest, as in a real run: without feedback it is another model."""
    exact = run(job(tmp_path / "exact", model, notes))
    owed, forgotten = (
        run(job(tmp_path / f"{feedback}", model, notes, codec={"up": "topk2", "feedback": feedback}))
        for feedback in (0.95, 0.0)
    )
    assert owed.up < 0.6 * exact.up
    assert owed.state.read_bytes() != forgotten.state.read_bytes()
    assert list((tmp_path / "0.95" / "run" / "site-1" / "residual").glob("*.frames"))


def test_adapters_are_trained_and_sent(tmp_path: Path, model: Path, notes: Path) -> None:
    """A federation of adapters runs as it is, and what travels is what the plan says."""
    outcome = run(job(tmp_path, model, notes, adapter={"kind": "lora", "rank": 2}, layers={"plan": "all"}))
    assert any("lora" in name for name in outcome.plan.tensors)
    assert outcome.plan.trained_parameters < 0.5 * outcome.plan.total_parameters
    assert load_file(outcome.state).keys() == outcome.plan.tensors.keys()


def test_a_site_may_have_settings_of_its_own(tmp_path: Path, model: Path, notes: Path) -> None:
    """One site is limited to a block: it sends less than with all of the plan, and the others the same."""
    whole = run(job(tmp_path / "whole", model, notes))
    limited = run(job(tmp_path / "limited", model, notes, sites={"site-2": {"layers": {"at_most": 1}}}))
    assert 0.75 * whole.up < limited.up < 0.95 * whole.up
    assert limited.state.read_bytes() != whole.state.read_bytes()


def test_a_limit_on_memory_is_on_one_sites_own(
    tmp_path: Path, model: Path, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is measured in a process that holds one site, whatever this one holds; a limit that nothing fits is named."""
    monkeypatch.setattr(depth, "_held_bytes", lambda _device: 1 << 50)
    whole = run(job(tmp_path / "whole", model, notes))
    bounded = job(tmp_path / "bounded", model, notes, sites={"site-2": {"layers": {"memory_mib": 8000}}})
    assert run(bounded).state.read_bytes() == whole.state.read_bytes()
    starved = job(tmp_path / "starved", model, notes, sites={"site-2": {"layers": {"memory_mib": 1}}})
    with pytest.raises(ConfigError, match="memory_mib"):
        run(starved)


def test_a_private_federation_tells_its_epsilon(tmp_path: Path, model: Path, notes: Path) -> None:
    """Each site charges its ledger, and its last update says what was spent; losses are not told."""
    outcome = run(job(tmp_path, model, notes, privacy={"delta": 1e-3, "noise_multiplier": 1.0}))
    for said in outcome.metrics.values():
        assert said["epsilon"] > 0
        assert "loss" not in said
    assert (tmp_path / "run" / "site-1" / "privacy.jsonl").read_text().count("\n") == 2


def test_a_spent_budget_ends_a_cell_with_its_reason(tmp_path: Path, model: Path, notes: Path) -> None:
    """Sites that may not train any further hold still; the run says why instead of waiting for ever."""
    site = {"privacy": {"budget_epsilon": 0.01}}
    given = job(tmp_path, model, notes, site=site, privacy={"delta": 1e-3, "noise_multiplier": 1.0})
    with pytest.raises(UnavailableError, match="version 0 of 2") as caught:
        run(given)
    assert "budget_epsilon" in caught.value.hint


def test_what_a_worker_refuses_is_raised(tmp_path: Path, model: Path, notes: Path) -> None:
    """A site without notes ends the cell with the reader's own words."""
    given = job(tmp_path, model, notes)
    with pytest.raises(RefusedError, match="does not exist"):
        run(replace(given, notes={**given.notes, "site-2": tmp_path / "nowhere"}))
