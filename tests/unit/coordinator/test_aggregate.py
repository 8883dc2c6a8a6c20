from __future__ import annotations

import itertools
import tracemalloc
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from coordinator import means
from coordinator.masters import master_path, slot_path
from coordinator.means import blocks
from coordinator.merging import in_order
from coordinator.optimizers import SLOTS, server_step
from shared import durable
from shared.config import (
    SPARSE,
    AggregationSection,
    CodecName,
    CodecSection,
    ServerOptimizerName,
    ServerSection,
    StalenessSection,
)
from shared.errors import CorruptError, RefusedError
from shared.tensorfile import F32Array
from tests.small_run import SmallRun

CONSTANT = StalenessSection(kind="constant")
FEDBUFF = AggregationSection(mode="fedbuff", size_power=0)
FEDASYNC = AggregationSection(mode="fedasync", alpha=0.5)
MOMENTUM = AggregationSection(server=ServerSection(optimizer="momentum", lr=0.5, momentum=0.5))
SMALL = {"a": [1.0, 2.0], "b": [[0.0, 4.0]]}


def test_fedavg_by_hand(tmp_path: Path) -> None:
    """1 and 3 examples: a = (1, 2) + 1/4 (4, 0) + 3/4 (0, 8) = (2, 8); b = (0, 4) + 1/4 (4, 4) - 3/4 (4, 4)."""
    run = SmallRun(tmp_path, SMALL)
    run.merge(
        run.update("x", {"a": [4, 0], "b": [[4, 4]]}, examples=1),
        run.update("y", {"a": [0, 8], "b": [[-4, -4]]}, examples=3),
    )
    assert run.master(1) == {"a": [2, 8], "b": [[-2, 2]]}
    assert {name: values.tolist() for name, values in run.published(1).items()} == run.master(1)


def test_fedbuff_by_hand(tmp_path: Path) -> None:
    """K = 2: from (2, 2), a fresh (2, 4) at weight 1/2 and one three versions late, (8, 16), at 1/4: (5, 8)."""
    run = SmallRun(tmp_path, {"a": [2.0, 2.0]}, aggregation=FEDBUFF)
    for version in range(3):
        run.merge(run.update("idle", {"a": [0, 0]}, base=version))
    late = run.update("late", {"a": [8, 16]}, base=0, examples=500)
    run.merge(run.update("fresh", {"a": [2, 4]}, base=3), late)
    assert run.master(4) == {"a": [5, 8]}


def test_fedasync_by_hand(tmp_path: Path) -> None:
    """From x = (4, 8), started from y = (4, 8): 1/2 x + 1/2 (y + (4, -8)) = (6, 4); then, 3 versions late, a_t = 1/4.

    3/4 (6, 4) + 1/4 ((4, 8) + (2, 4)) = (6, 6): mixed with the state that the site started from, not the newest one.
    """
    run = SmallRun(tmp_path, {"a": [4.0, 8.0]}, aggregation=FEDASYNC)
    run.merge(run.update("x", {"a": [4, -8]}))
    assert run.master(1) == {"a": [6, 4]}
    same = AggregationSection(mode="fedasync", alpha=1.0)
    mixed = run.federation
    run.federation = mixed.model_copy(update={"aggregation": same})
    run.merge(run.update("idle", {"a": [0, 0]}, base=1))
    run.merge(run.update("idle", {"a": [0, 0]}, base=2))
    assert run.master(3) == {"a": [6, 4]}
    run.federation = mixed
    run.merge(run.update("late", {"a": [2, 4]}, base=0))
    assert run.master(4) == {"a": [6, 6]}


@pytest.mark.parametrize("name", SLOTS)
def test_every_optimizer_goes_on_from_its_slots(tmp_path: Path, name: ServerOptimizerName) -> None:
    """Three versions through files are three steps in memory, to the bit, with the lateness of their updates."""
    server = ServerSection(optimizer=name, every=2, slow_after=0)
    section = AggregationSection(mode="fedbuff", staleness=CONSTANT, server=server)
    run = SmallRun(tmp_path, {"a": [1.0, -2.0]}, aggregation=section)
    master = np.array([1, -2], dtype=np.float32)
    slots = [np.zeros_like(master) for _ in SLOTS[name]]
    for version, delta in enumerate(([4.0, 2.0], [0.5, -3.0], [-1.0, 0.25]), start=1):
        run.merge(run.update(f"x{version}", {"a": delta}, base=0))
        server_step(server, master, np.array(delta, dtype=np.float32), slots, version=version, late=version - 1)
        assert run.master(version) == {"a": master.tolist()}


@pytest.mark.parametrize("section", [AggregationSection(), FEDASYNC], ids=["sync", "fedasync"])
def test_a_tensor_that_nobody_holds_stays(tmp_path: Path, section: AggregationSection) -> None:
    """Only what an update holds moves."""
    run = SmallRun(tmp_path, SMALL, aggregation=section)
    run.merge(run.update("shallow", {"b": [[2, 2]]}))
    assert run.master(1)["a"] == [1, 2]
    assert run.master(1)["b"] != [[0, 4]]


def test_sites_of_different_depth_by_hand(tmp_path: Path) -> None:
    """The mean of a tensor counts those only who hold it: a by the deep site alone, b by both (3:1)."""
    run = SmallRun(tmp_path, SMALL)
    run.merge(
        run.update("deep", {"a": [1, 1], "b": [[4, 0]]}, examples=3), run.update("top", {"b": [[0, 4]]}, examples=1)
    )
    assert run.master(1) == {"a": [2, 3], "b": [[3, 5]]}


def test_momentum_over_versions_by_hand(tmp_path: Path) -> None:
    """By v = 1/2 v + m, x + 1/2 v: m = 4 gives v = 4, x = 2; m = 0 gives v = 2, x = 3; m = 1: v = 2, x = 4."""
    run = SmallRun(tmp_path, {"a": [0.0]}, aggregation=MOMENTUM)
    digests = set()
    for version, delta in enumerate((4, 0, 1)):
        digests.add(run.merge(run.update("x", {"a": [delta]}, base=version)).optimizer_digest)
        assert run.master(version + 1) == {"a": [[2], [3], [4]][version]}
    assert None not in digests
    assert len(digests) == 3


def test_a_tensor_that_nobody_holds_keeps_its_momentum(tmp_path: Path) -> None:
    """A round without the tensor neither moves it by old momentum nor lets that fade."""
    run = SmallRun(tmp_path, SMALL, aggregation=MOMENTUM)
    run.merge(run.update("deep", {"a": [4, 4], "b": [[4, 4]]}))
    run.merge(run.update("top", {"b": [[0, 0]]}, base=1))
    assert run.master(2) == {"a": [3, 4], "b": [[3, 7]]}
    run.merge(run.update("deep", {"a": [0, 0], "b": [[0, 0]]}, base=2))
    assert run.master(3) == {"a": [4, 5], "b": [[3.5, 7.5]]}


def test_who_came_first_does_not_matter(tmp_path: Path) -> None:
    """Sums that round differently in another order: four updates give one master, in whichever order they arrive."""
    deltas = {"a": [1e8, 0.1], "b": [1.0, 0.2], "c": [-1e8, 0.3], "d": [3.0, 0.7]}
    digests, by_arrival = set(), set()
    for number, sites in enumerate(itertools.permutations(deltas)):
        run = SmallRun(tmp_path / str(number), {"w": [0.5, 0.25]})
        arrived = [run.update(site, {"w": deltas[site]}, examples=1 + ord(site)) for site in sites]
        digests.add(run.run_plan(run.planned(in_order(arrived))).master_digest)
        by_arrival.add(run.run_plan(run.planned(arrived)).master_digest)
    assert len(digests) == 1
    assert len(by_arrival) > 1


MODES = [
    AggregationSection(size_power=0.5, server=ServerSection(optimizer="momentum", lr=0.7)),
    AggregationSection(mode="fedbuff"),
    AggregationSection(mode="fedasync", alpha=0.9),
    AggregationSection(missing="zero", clip_norm=4, server=ServerSection(optimizer="momentum")),
]


def random_delta(rng: np.random.Generator, run: SmallRun) -> dict[str, F32Array]:
    """Values of different sizes for some of the tensors, always of the last one."""
    names = [name for name in run.plan.tensors if rng.random() < 0.7] or [max(run.plan.tensors)]
    return {name: rng.normal(0, 0.1, run.plan.tensors[name]).astype(np.float32) for name in names}


def random_run(folder: Path, section: AggregationSection, codec: CodecSection, *, seed: int = 7) -> SmallRun:
    """Three versions of random updates, some of them late."""
    rng = np.random.default_rng(seed)
    shapes = {"block.0.w": (33, 70), "block.0.w-x": (5,), "block.1.w": (2049,), "head.bias": (3,)}
    run = SmallRun(
        folder, {name: rng.normal(0, 1, shape) for name, shape in shapes.items()}, aggregation=section, codec=codec
    )
    for version in range(3):
        count = 1 if section.mode == "fedasync" else 4
        run.merge(
            *(
                run.update(
                    f"s{site}-{version}",
                    random_delta(rng, run),
                    base=int(rng.integers(0, version + 1)),
                    examples=int(rng.integers(1, 1000)),
                )
                for site in range(count)
            )
        )
    return run


def files(run: SmallRun) -> dict[str, bytes]:
    """Masters and slots by name, and the states' frames."""
    return {path.name: path.read_bytes() for path in [*run.masters.iterdir(), *run.states.root.glob("*.frames")]}


@pytest.mark.parametrize("section", MODES, ids=["sync", "fedbuff", "fedasync", "zero"])
@pytest.mark.parametrize("up", get_args(CodecName))
def test_a_replay_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, section: AggregationSection, up: Any
) -> None:
    """Recomputed from version 0 elsewhere, in blocks of another size, every file is the same bit for bit."""
    codec = CodecSection(up=up, down="bf16", slice_kib=4)
    first = random_run(tmp_path / "first", section, codec)
    monkeypatch.setattr(means, "BLOCK_BYTES", 1)
    again = random_run(tmp_path / "again", section, codec)
    assert files(first) == files(again)
    assert len(files(first)) >= 8
    assert first.state_manifests == again.state_manifests


@pytest.mark.parametrize("up", get_args(CodecName))
@pytest.mark.parametrize("missing", ["omit", "zero"])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_agrees_with_the_formula_in_float64(tmp_path: Path, up: Any, seed: int, missing: Any) -> None:
    """Against the mean written down with float64 arrays over the decoded deltas, to float32 accuracy."""
    section = AggregationSection(size_power=0.5, staleness=CONSTANT, server=ServerSection(lr=0.5), missing=missing)
    rng = np.random.default_rng(seed)
    run = SmallRun(
        tmp_path,
        {"a": rng.normal(0, 1, (40, 9)), "b": rng.normal(0, 1, (300,))},
        aggregation=section,
        codec=CodecSection(up=up, down="f32", slice_kib=4),
    )
    stored = [run.seal(f"s{i}", random_delta(rng, run), examples=int(rng.integers(1, 99))) for i in range(3)]
    expected = {name: np.array(values, dtype=np.float64) for name, values in run.master(0).items()}
    for name, before in expected.items():
        parts = []
        for each in stored:
            with each.open_tensors() as reader:
                if name in reader.shapes:
                    parts.append((each.manifest.update.examples**0.5, reader.tensor(name).astype(np.float64)))
                elif missing == "zero":
                    parts.append((each.manifest.update.examples**0.5, np.zeros_like(before)))
        if parts:
            expected[name] += 0.5 * sum(w * delta for w, delta in parts) / sum(w for w, _ in parts)
    run.merge(*map(run.accept, stored))
    for name, merged in run.master(1).items():
        np.testing.assert_allclose(merged, expected[name], rtol=1e-5, atol=1e-6)


def test_the_published_state_is_an_ordinary_file(tmp_path: Path) -> None:
    """Its id is the head of its digest; once extracted, safetensors' own reader opens it."""
    run = SmallRun(tmp_path, SMALL, codec=CodecSection(up="f32", down="bf16", slice_kib=4))
    manifest = run.merge(run.update("x", {"a": [4, 0], "b": [[4, 4]]})).state
    assert manifest.transfer_id == manifest.file_digest[:32]
    assert (manifest.codec, manifest.state.version, manifest.created) == ("bf16", 1, 4.0)
    stored = run.states.get(manifest.transfer_id)
    assert stored is not None
    durable.write_scratch(tmp_path / "state.safetensors", stored.plain())
    assert blake3((tmp_path / "state.safetensors").read_bytes()).hexdigest() == manifest.file_digest
    with safe_open(tmp_path / "state.safetensors", "numpy") as opened:
        assert opened.metadata() == {
            "mailboat.federation": "north",
            "mailboat.fingerprint": run.plan.fingerprint,
            "mailboat.kind": "state",
            "mailboat.version": "1",
        }
        assert sorted(opened.keys()) == ["a", "b"]


def test_the_master_keeps_what_the_published_state_rounds_away(tmp_path: Path) -> None:
    """Steps too small for bfloat16 add up in the master, until the published state shows them."""
    run = SmallRun(tmp_path, {"a": [256.0]}, codec=CodecSection(up="f32", down="bf16", slice_kib=4))
    for version in range(3):
        run.merge(run.update("x", {"a": [0.5]}, base=version))
    assert [run.published(version)["a"].tolist() for version in range(4)] == [[256], [256], [256], [258]]
    assert run.master(3) == {"a": [257.5]}


def test_equal_digests_are_those_of_the_files(tmp_path: Path) -> None:
    """What the journal will record is what an auditor computes with sha256sum."""
    run = SmallRun(tmp_path, SMALL, aggregation=MOMENTUM)
    result = run.merge(run.update("x", {"a": [1, 1]}))
    assert result.master_digest == blake3(master_path(run.masters, 1).read_bytes()).hexdigest()
    slots = blake3(slot_path(run.masters, 1, "momentum").read_bytes()).hexdigest()
    assert result.optimizer_digest == blake3(slots.encode()).hexdigest()


def test_a_second_attempt_with_other_updates_replaces_the_first(tmp_path: Path) -> None:
    """After a crash between merge and commit the round may close over more updates: the journal's word counts."""
    run = SmallRun(tmp_path, SMALL)
    first = run.update("x", {"a": [4, 4]})
    abandoned = run.run_plan(run.planned([first]))
    kept = run.run_plan(run.planned([first, run.update("y", {"a": [8, 8]})]))
    assert kept != abandoned
    assert run.master(1)["a"] == [7, 8]
    assert run.run_plan(run.planned([first])) == abandoned


def test_progress_rises_to_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Progress never falls, moves with each update of each block and ends at 1."""
    monkeypatch.setattr(means, "BLOCK_BYTES", 1)
    run = SmallRun(tmp_path, SMALL)
    seen: list[float] = []
    plan = run.planned([run.update(site, {"a": [1, 1]}) for site in ("x", "y", "z")])
    run.run_plan(plan, progress=seen.append)
    assert seen == sorted(seen)
    assert len(seen) == 2 * 3 + 1
    assert seen[-1] == 1.0


def nothing_of_version(run: SmallRun, version: int) -> bool:
    """No file of a version, and no temporary file, is to be seen."""
    return [path.name for path in run.masters.iterdir()] == [f"v{version - 1:08d}.safetensors"]


@pytest.mark.parametrize("what", ["update", "state", "master"])
def test_what_is_gone_is_named(tmp_path: Path, what: str) -> None:
    """A file that the journal needs and the disk has lost is corruption, by its name, and nothing new appears."""
    run = SmallRun(tmp_path, SMALL, aggregation=FEDASYNC)
    plan = run.planned([run.update("x", {"a": [1, 1]})])
    gone = plan.contributions[0]
    if what == "update":
        run.updates.delete(gone.update_id)
    elif what == "state":
        run.states.delete(gone.base[0])
    else:
        master_path(run.masters, 0).unlink()
    named = {"update": gone.update_id, "state": gone.base[0], "master": "v00000000"}[what]
    with pytest.raises(CorruptError, match=named):
        run.run_plan(plan)
    assert not master_path(run.masters, 1).exists()


def test_a_rotten_frame_stops_the_merge(tmp_path: Path) -> None:
    """A bit flipped at rest is found before it is merged; master and folder stay as they were."""
    run = SmallRun(tmp_path, {"a": np.zeros(5000), "b": [1.0]})
    good = run.update("x", {"a": np.ones(5000), "b": [1]})
    bad = run.update("y", {"a": np.ones(5000), "b": [1]})
    stored = run.updates.get(bad.update_id)
    assert stored is not None
    data = bytearray(stored.path.read_bytes())
    data[-1] ^= 1
    stored.path.write_bytes(data)
    with pytest.raises(CorruptError, match="not what was written"):
        run.run_plan(run.planned([good, bad]))
    assert nothing_of_version(run, 1)


def test_missing_slots_are_not_taken_for_zero(tmp_path: Path) -> None:
    """After version 0, slots that are gone are corruption: going on without them would change the run silently."""
    run = SmallRun(tmp_path, SMALL, aggregation=MOMENTUM)
    run.merge(run.update("x", {"a": [1, 1]}))
    slot_path(run.masters, 1, "momentum").unlink()
    with pytest.raises(CorruptError, match=r"v00000001\.momentum\.safetensors is gone"):
        run.merge(run.update("x", {"a": [1, 1]}, base=1))


def test_a_master_that_overflows_is_not_published(tmp_path: Path) -> None:
    """A merge that leaves float32's range is refused by name of the tensor; no state of that version exists."""
    run = SmallRun(tmp_path, {"a": [1.0]}, aggregation=AggregationSection(server=ServerSection(lr=1e21)))
    with pytest.raises(RefusedError, match="tensor a") as caught:
        run.merge(run.update("x", {"a": [1e19]}), run.update("y", {"a": [1.5e19]}))
    assert caught.value.rule == "non-finite"
    assert run.states.ids() == [run.state_manifests[0].transfer_id]


def test_memory_does_not_grow_with_updates(tmp_path: Path) -> None:
    """The peak of a merge of 16 updates is that of 2, within 10 %, and a fraction of what the updates hold.

    The tensors are so large that manifests, of which 14 more are held, and what the two threads hold at one moment are
    a small part of it.
    """
    size = 100_000
    shapes = {f"t{i}": (size,) for i in range(4)}
    run = SmallRun(
        tmp_path,
        {name: np.zeros(shape) for name, shape in shapes.items()},
        codec=CodecSection(up="f32", down="f32", slice_kib=64),
    )
    rng = np.random.default_rng(1)
    delta = {name: rng.normal(0, 1, shape).astype(np.float32) for name, shape in shapes.items()}
    accepted = [run.update(f"s{i}", delta) for i in range(16)]
    peaks = []
    for count in (2, 16):
        plan = run.planned(accepted[:count])
        tracemalloc.start()
        run.run_plan(plan)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]
    assert peaks[1] < 3 * 4 * 4 * size


@settings(deadline=None)
@given(st.lists(st.integers(0, 30), max_size=30), st.integers(1, 200))
def test_blocks_keep_order_and_bound(sizes: list[int], limit: int) -> None:
    """Blocks are the names in order; each fits the limit or is one tensor; none could take its neighbour's first."""
    shapes = {f"{number:03d}": (size,) for number, size in enumerate(sizes)}
    found = list(blocks(shapes, limit))
    assert [name for block in found for name in block] == list(shapes)
    bytes_of = [4 * sum(shapes[name][0] for name in block) for block in found]
    assert all(len(block) == 1 or size <= limit for block, size in zip(found, bytes_of, strict=True))
    for size, following in zip(bytes_of, found[1:], strict=False):
        assert size + 4 * shapes[following[0]][0] > limit


def _five(run: SmallRun, deltas: list[list[float]]) -> None:
    updates = [run.update(f"s{number}", {"a": delta}, examples=10**number) for number, delta in enumerate(deltas)]
    run.merge(*updates)


def test_the_median_by_hand(tmp_path: Path) -> None:
    """Of (1, 5), (2, 4), (3, 1e17), (-9, 2), (1e9, 3): (2, 4), from (10, 10) and whatever the examples say."""
    run = SmallRun(tmp_path, {"a": [10.0, 10.0]}, aggregation=AggregationSection(rule="median"))
    _five(run, [[1, 5], [2, 4], [3, 1e17], [-9, 2], [1e9, 3]])
    assert run.master(1) == {"a": [12, 14]}


def test_the_trimmed_mean_by_hand(tmp_path: Path) -> None:
    """A fifth of five is one at each end: (1 + 2 + 3) / 3 and (3 + 4 + 5) / 3."""
    run = SmallRun(tmp_path, {"a": [0.0, 0.0]}, aggregation=AggregationSection(rule="trimmed-mean"))
    _five(run, [[1, 5], [2, 4], [3, 1e17], [-9, 2], [1e9, 3]])
    assert run.master(1)["a"] == pytest.approx([2, 4], rel=1e-6)


def test_a_robust_rule_damps_lateness_first(tmp_path: Path) -> None:
    """Three versions late at 1/2: the median of 2, 8 / 2 and 100 is 4; of two updates it is their mean."""
    section = AggregationSection(mode="fedbuff", rule="median")
    run = SmallRun(tmp_path, {"a": [0.0]}, aggregation=section)
    for version in range(3):
        run.merge(run.update("idle", {"a": [0]}, base=version))
    late = run.update("late", {"a": [8]}, base=0)
    run.merge(run.update("x", {"a": [2]}, base=3), late, run.update("y", {"a": [100]}, base=3))
    assert run.master(4) == {"a": [4]}
    run.merge(run.update("x", {"a": [2]}, base=4), run.update("y", {"a": [4]}, base=4))
    assert run.master(5) == {"a": [7]}


def test_a_robust_rule_takes_each_tensor_from_those_who_hold_it(tmp_path: Path) -> None:
    """Of b only one update speaks, of c none."""
    run = SmallRun(tmp_path, {"a": [0.0], "b": [0.0], "c": [5.0]}, aggregation=AggregationSection(rule="median"))
    run.merge(run.update("x", {"a": [1], "b": [7]}), run.update("y", {"a": [2]}), run.update("z", {"a": [3]}))
    assert run.master(1) == {"a": [2], "b": [7], "c": [5]}


@pytest.mark.parametrize("codec", sorted({*get_args(CodecName)} - SPARSE))
def test_a_robust_mean_in_stretches_is_that_of_the_whole(
    codec: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut into stretches of one unit, in every codec that is not sparse, the median is numpy's of decoded updates."""
    monkeypatch.setattr(means, "BLOCK_BYTES", 1)
    size, rng = 3 * means.STRETCH_UNIT + 100, np.random.default_rng(3)
    deltas = [rng.normal(0, 1, size).astype(np.float32) for _ in range(5)]
    section = AggregationSection(rule="median")
    run = SmallRun(tmp_path, {"a": np.zeros(size)}, aggregation=section, codec=CodecSection(up=codec, slice_kib=4))
    updates = [run.update(f"s{number}", {"a": delta}) for number, delta in enumerate(deltas)]
    decoded = []
    for update in updates:
        stored = run.updates.get(update.update_id)
        assert stored is not None
        with stored.open_tensors() as reader:
            decoded.append(reader.tensor("a"))
    run.merge(*updates)
    with safe_open(master_path(run.masters, 1), framework="numpy") as master:
        np.testing.assert_array_equal(master.get_tensor("a"), np.median(decoded, axis=0).astype(np.float32))
