"""What updates on disk amount to by the rules that look at whole updates; weights are in test_merging."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordinator import means
from coordinator.records import Accepted
from shared.config import AggregationSection, CodecSection, ServerSection, StalenessSection
from shared.errors import CorruptError
from tests.small_run import SmallRun

CONSTANT = StalenessSection(kind="constant")
KRUM = AggregationSection(rule="krum")
MULTI = AggregationSection(rule="multi-krum")
CA2FL = AggregationSection(mode="fedbuff", buffer=2, rule="ca2fl", staleness=CONSTANT)
FIVE = [{"a": [2, 0]}, {"a": [3, 4]}, {"a": [2, 1]}, {"a": [100, 0]}, {"a": [2, -1]}]
"""Krum's scores: (2, 0): 1 + 1, (3, 4): 10 + 17, (2, 1): 1 + 4, (100, 0): far, (2, -1): 1 + 4."""


def updates(run: SmallRun, deltas: list[dict[str, Any]], *, base: int = 0) -> list[Accepted]:
    """One of each site, s0 to sK, of very different sizes."""
    return [run.update(f"s{number}", delta, base=base, examples=10**number) for number, delta in enumerate(deltas)]


def counted(run: SmallRun, *accepted: Accepted) -> list[float]:
    """What the next version's record says that each counts."""
    return [part.weight for part in run.merge(*accepted).contributions]


def test_krum_takes_one_update_whole(tmp_path: Path) -> None:
    """Of five the one with the most company: from (10, 10) by (2, 0), whatever examples say; the others count 0."""
    run = SmallRun(tmp_path, {"a": [10.0, 10.0]}, aggregation=KRUM)
    assert counted(run, *updates(run, FIVE)) == [1, 0, 0, 0, 0]
    assert run.master(1) == {"a": [12, 10]}


def test_multi_krum_takes_the_mean_without_the_farthest(tmp_path: Path) -> None:
    """K - f = 4 of five: (2 + 3 + 2 + 2) / 4 and (0 + 4 + 1 - 1) / 4, from (10, 10)."""
    run = SmallRun(tmp_path, {"a": [10.0, 10.0]}, aggregation=MULTI)
    assert counted(run, *updates(run, FIVE)) == [0.25, 0.25, 0.25, 0, 0.25]
    assert run.master(1) == {"a": [12.25, 11]}


def test_too_few_for_krum_are_merged_by_their_median(tmp_path: Path) -> None:
    """Of four of them: the median of 2, 3, 2, 100 is 2.5, of 0, 4, 1, 0 it is 0.5."""
    run = SmallRun(tmp_path, {"a": [0.0, 0.0]}, aggregation=KRUM)
    assert counted(run, *updates(run, FIVE[:4])) == [0.25] * 4
    assert run.master(1) == {"a": [2.5, 0.5]}


def test_krum_looks_at_whole_updates(tmp_path: Path) -> None:
    """An update that is like the others in one tensor and far off in another is not chosen, wherever it is cut."""
    run = SmallRun(tmp_path, {"a": [0.0], "b": [0.0, 0.0]}, aggregation=MULTI)
    near = [{"a": [1], "b": [1, 1]}, {"a": [2], "b": [1, 2]}, {"a": [1], "b": [2, 1]}, {"a": [2], "b": [2, 2]}]
    assert counted(run, *updates(run, [*near, {"a": [1.5], "b": [1.5, 1e6]}])) == [0.25] * 4 + [0]


def test_for_krum_a_tensor_that_is_not_held_did_not_move(tmp_path: Path) -> None:
    """A shallow site is as far from the others as its missing tensor moved with them: by 1, not by 100."""
    run = SmallRun(tmp_path, {"a": [0.0], "b": [5.0]}, aggregation=MULTI)
    deep = [{"a": [1], "b": [1]}, {"a": [1], "b": [0]}, {"a": [1], "b": [1]}, {"a": [1], "b": [100]}]
    assert counted(run, *updates(run, [*deep, {"a": [2]}])) == [0.25, 0.25, 0.25, 0, 0.25]
    assert run.master(1)["a"] == [1.25]
    assert run.master(1)["b"] == [5 + np.float32(1 / 3) * 2]  # by those three of the chosen that hold it


def test_krum_damps_lateness_first(tmp_path: Path) -> None:
    """Three versions late at 1/2: a delta of 4 lies among 2, 2, 2, and one of 2 would not."""
    section = AggregationSection(mode="fedbuff", buffer=5, rule="multi-krum")
    run = SmallRun(tmp_path, {"a": [0.0]}, aggregation=section)
    for version in range(3):
        run.merge(run.update("idle", {"a": [0]}, base=version))
    late = run.update("late", {"a": [4]}, base=0)
    fresh = [run.update(f"s{number}", {"a": [delta]}, base=3) for number, delta in enumerate((2, 2, 2, 3))]
    assert counted(run, late, *fresh) == [0.125, 0.25, 0.25, 0.25, 0]
    assert run.master(4) == {"a": [2]}


def test_an_update_that_krum_left_out_does_not_slow_fadas(tmp_path: Path) -> None:
    """The rate is divided by the lateness of what counts, not of the outlier that is late."""
    server = ServerSection(optimizer="fadas", lr=1, momentum=0, beta2=0, eps=1, slow_after=1)
    section = AggregationSection(mode="fedbuff", buffer=5, rule="multi-krum", staleness=CONSTANT, server=server)
    run = SmallRun(tmp_path, {"a": [0.0]}, aggregation=section)
    for version in range(3):
        run.merge(run.update("idle", {"a": [0]}, base=version))
    late = run.update("late", {"a": [1e3]}, base=0)
    fresh = [run.update(f"s{number}", {"a": [1]}, base=3) for number in range(4)]
    assert counted(run, *fresh, late)[-1] == 0
    assert run.master(4) == {"a": [0.5]}  # 1 / (1 + 1), not a third of it


@pytest.mark.parametrize("codec", ["f32", "bf16", "int8"])
def test_krum_in_stretches_chooses_as_over_the_whole(
    codec: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut into stretches of one unit, the same updates are chosen and give the same master, bit for bit."""
    size, rng = 3 * means.STRETCH_UNIT + 100, np.random.default_rng(3)
    deltas = [{"a": rng.normal(0, 1 + number % 3, size).astype(np.float32)} for number in range(7)]
    digests = set()
    for name in ("whole", "stretches"):
        run = SmallRun(tmp_path / name, {"a": np.zeros(size)}, aggregation=MULTI, codec=CodecSection(up=codec))
        digests.add(run.merge(*updates(run, deltas)).master_digest)
        monkeypatch.setattr(means, "BLOCK_BYTES", 1)
    assert len(digests) == 1


def test_memory_of_krum_does_not_grow_with_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With blocks of 1 MiB the distances of nine updates of 2 MB take the memory of those of updates of 500 KB."""
    monkeypatch.setattr(means, "BLOCK_BYTES", 1 << 20)
    peaks = []
    for parts in (1, 4):
        shapes = {f"t{number}": (125_000,) for number in range(parts)}
        run = SmallRun(
            tmp_path / str(parts),
            {name: np.zeros(shape) for name, shape in shapes.items()},
            aggregation=MULTI,
            codec=CodecSection(up="f32", down="f32", slice_kib=64),  # few frames: manifests grow with them
        )
        rng = np.random.default_rng(1)
        plan = run.planned(
            updates(run, [{name: rng.normal(0, 1, shape) for name, shape in shapes.items()} for _ in range(9)])
        )
        tracemalloc.start()
        kept = means.Kept(run.updates, run.states)
        means.settled(plan, kept, MULTI, run.plan.tensors, lambda _share: None)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]


def test_ca2fl_by_hand(tmp_path: Path) -> None:
    """Three buffers of two, from x = 0; h is what each site's delta was before.

    anna 3, bela 6: nothing is cached, v = 4.5. anna 9, carl 3: h = 3, 6, 0 of 3 sites: v = 3 + (9 - 3 + 3) / 2 = 7.5.
    bela 0, carl 0: h = 9, 6, 3: v = 6 + (0 - 6 + 0 - 3) / 2 = 1.5. anna goes on speaking in the last.
    """
    run = SmallRun(tmp_path, {"a": [0.0]}, aggregation=CA2FL)
    rounds = [{"anna": 3.0, "bela": 6.0}, {"anna": 9.0, "carl": 3.0}, {"bela": 0.0, "carl": 0.0}]
    for version, deltas in enumerate(rounds):
        run.merge(*(run.update(site, {"a": [delta]}, base=version) for site, delta in deltas.items()))
    assert [run.master(version)["a"][0] for version in (1, 2, 3)] == pytest.approx([4.5, 12, 13.5], rel=1e-6)


@pytest.mark.parametrize("damage", ["gone", "rotten"])
def test_ca2fl_says_whose_last_word_is_lost(tmp_path: Path, damage: str) -> None:
    """The error names update and site, although neither is of the round, and what can be done; no version is made."""
    run = SmallRun(tmp_path, {"a": [0.0]}, aggregation=CA2FL)
    first = {site: run.update(site, {"a": [3.0]}) for site in ("anna", "bela")}
    run.merge(*first.values())
    lost = first["bela"].update_id
    if damage == "gone":
        run.updates.delete(lost)
    else:
        frames = run.updates.root / f"{lost}.frames"
        frames.write_bytes(bytes(frames.stat().st_size))
    with pytest.raises(CorruptError) as caught:
        run.merge(run.update("anna", {"a": [9.0]}, base=1), run.update("carl", {"a": [3.0]}, base=1))
    assert f"update {lost} is what bela said last, and version 2 takes that back" in caught.value.message
    assert caught.value.hint == means.CACHE_LOST


def test_ca2fl_takes_the_servers_optimizer(tmp_path: Path) -> None:
    """The corrected mean is what the server steps by: half of 4.5 and of 7.5."""
    section = CA2FL.model_copy(update={"server": ServerSection(lr=0.5)})
    run = SmallRun(tmp_path, {"a": [0.0]}, aggregation=section)
    run.merge(run.update("anna", {"a": [3]}), run.update("bela", {"a": [6]}))
    run.merge(run.update("anna", {"a": [9]}, base=1), run.update("carl", {"a": [3]}, base=1))
    assert run.master(2)["a"][0] == pytest.approx(6, rel=1e-6)


def test_ca2fl_of_sites_of_different_depth(tmp_path: Path) -> None:
    """Of b bela holds nothing: it moves by 8, then, with that cached, by 4, and without anna not at all."""
    run = SmallRun(tmp_path, {"a": [0.0], "b": [0.0]}, aggregation=CA2FL)
    run.merge(run.update("anna", {"a": [2], "b": [8]}), run.update("bela", {"a": [4]}))
    assert run.master(1) == {"a": [3], "b": [8]}
    run.merge(run.update("anna", {"a": [2], "b": [4]}, base=1), run.update("bela", {"a": [4]}, base=1))
    assert run.master(2) == {"a": [6], "b": [12]}
    run.merge(run.update("bela", {"a": [4]}, base=2))
    assert run.master(3)["b"] == [12]


def test_without_what_was_cached_no_version_is_made(tmp_path: Path) -> None:
    """An update that CA2FL needs again and the disk has lost is named; nothing new appears."""
    run = SmallRun(tmp_path, {"a": [0.0]}, aggregation=CA2FL)
    first = run.update("anna", {"a": [3]})
    run.merge(first)
    run.updates.delete(first.update_id)
    with pytest.raises(CorruptError, match=first.update_id):
        run.merge(run.update("bela", {"a": [3]}, base=1))
