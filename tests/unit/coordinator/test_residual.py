from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator import admission, residual
from coordinator.replay import replay
from coordinator.residual import add_product, correct
from shared.config import AdapterSection, AggregationSection, ServerSection, StalenessSection
from shared.errors import RefusedError
from shared.tensorfile import F32Array
from tests.audited import VERSIONS, AuditedRun
from tests.small_run import SmallRun

A, B, R = "q.lora_A.weight", "q.lora_B.weight", "q.residual"
FACTORS = {R: (A, B)}
EXACT = AdapterSection(kind="fedex-lora", rank=1, alpha=2)
"""scale = 2"""
START = {A: [[1.0, 2.0]], B: [[1.0], [3.0]], R: [[0.0, 0.0], [0.0, 0.0]]}


def f32(values: object) -> F32Array:
    """As a float32 array."""
    return np.asarray(values, dtype=np.float32)


def test_what_the_means_lose_by_hand() -> None:
    """Weights 1/2: b = 2 and 4, a = 6 and 2: 2 (1/2 12 + 1/2 8 - 3 4) = -4, on top of what was there."""
    there = f32([[10.0]])
    updates = [(0.5, f32([[2.0]]), f32([[6.0]])), (0.5, f32([[4.0]]), f32([[2.0]]))]
    correct(there, iter(updates), scale=2.0)
    assert there.tolist() == [[6.0]]


def test_updates_that_agree_lose_nothing() -> None:
    """Where all factors are alike, or one of the two does not move, the means are exact and the residual stays."""
    same = [(0.25, f32([[2.0], [1.0]]), f32([[3.0, 5.0]]))] * 4
    frozen = [(0.5, f32([[2.0], [1.0]]), f32([[0.0, 0.0]])), (0.5, f32([[4.0], [0.0]]), f32([[0.0, 0.0]]))]
    for updates in (same, frozen, []):
        there = f32([[1.0, 2.0], [3.0, 4.0]])
        correct(there, iter(updates), scale=2.0)
        assert there.tolist() == [[1.0, 2.0], [3.0, 4.0]]


def test_a_merge_by_hand(tmp_path: Path) -> None:
    """Two sites, 1 and 3 examples, s = 2: R + 2 B A is the weighted mean of what the two sites had.

    Site x ends at A = (3, 2), B = (1, 7), site y at A = (1, 2), B = (5, 3). Their 2 B A are ((6, 4), (42, 28)) and
    ((10, 20), (6, 12)), the mean with 1/4 and 3/4 is ((9, 16), (15, 16)). The means of the factors are A = (1.5, 2) and
    B = (4, 4), with 2 B A = ((12, 16), (12, 16)), so R is ((-3, 0), (3, 0)).
    """
    run = SmallRun(tmp_path, START, adapter=EXACT, residuals=FACTORS)
    run.merge(
        run.update("x", {A: [[2, 0]], B: [[0], [4]]}, examples=1),
        run.update("y", {A: [[0, 0]], B: [[4], [0]]}, examples=3),
    )
    assert run.master(1) == {A: [[1.5, 2.0]], B: [[4.0], [4.0]], R: [[-3.0, 0.0], [3.0, 0.0]]}


@pytest.mark.parametrize(
    "section",
    [
        AggregationSection(size_power=0.5),
        AggregationSection(mode="fedbuff", clip_norm=1.0, staleness=StalenessSection(kind="polynomial")),
        AggregationSection(server=ServerSection(lr=0.5)),
    ],
    ids=["sync", "late and clipped", "half a step"],
)
def test_the_product_moves_by_each_updates_share(tmp_path: Path, section: AggregationSection) -> None:
    """Three versions in every way of weighing: R + s B A moves by the sum of the shares of what updates do to s B A."""
    rng = np.random.default_rng(3)
    shapes = {A: (3, 6), B: (5, 3), R: (5, 6)}
    run = SmallRun(
        tmp_path,
        {name: rng.normal(0, 1, shape) * (name != R) for name, shape in shapes.items()},
        aggregation=section,
        adapter=EXACT.model_copy(update={"rank": 3}),
        residuals=FACTORS,
    )
    scale = 2 / 3
    for version in range(3):
        before = {name: f32(values) for name, values in run.master(version).items()}
        deltas = [{name: rng.normal(0, 1, shapes[name]) for name in (A, B)} for _ in range(3)]
        updates = [
            run.update(f"s{site}-{version}", delta, base=max(0, version - site), examples=1 + site)
            for site, delta in enumerate(deltas)
        ]
        planned = run.planned(updates)
        run.merge(*updates)
        after = {name: f32(values) for name, values in run.master(version + 1).items()}
        total = sum(part.denominator for part in planned.contributions)
        wanted = before[R] + scale * before[B] @ before[A]
        for part, delta in zip(planned.contributions, deltas, strict=True):
            moved = (before[B] + delta[B]) @ (before[A] + delta[A]) - before[B] @ before[A]
            wanted = wanted + section.server.rate * part.numerator / total * scale * moved
        np.testing.assert_allclose(after[R] + scale * after[B] @ after[A], wanted, rtol=1e-4, atol=1e-4)
        assert np.abs(after[R] - before[R]).max() > 1e-3


def test_a_site_that_does_not_train_this_block_has_no_part(tmp_path: Path) -> None:
    """An update without the factors changes neither the weights of the others' nor the residual."""
    with_it, without = (
        SmallRun(tmp_path / name, {**START, "z": [0.0]}, adapter=EXACT, residuals=FACTORS) for name in "ab"
    )
    for run in (with_it, without):
        updates = [
            run.update("x", {A: [[2, 0]], B: [[0], [4]], "z": [1]}, examples=1),
            run.update("y", {A: [[0, 0]], B: [[4], [0]], "z": [1]}, examples=3),
        ]
        run.merge(*updates, *([run.update("top", {"z": [1]}, examples=50)] if run is with_it else []))
    assert with_it.master(1) == without.master(1)


def test_nobody_sends_a_residual(tmp_path: Path) -> None:
    """An update that holds a tensor which the coordinator makes is refused under unknown-tensor."""
    run = SmallRun(tmp_path, START, adapter=EXACT, residuals=FACTORS)
    stored = run.seal("x", {A: [[0, 0]], R: [[1, 1], [1, 1]]})
    with pytest.raises(RefusedError) as caught:
        admission.verify(stored, run.plan)
    assert caught.value.rule == "unknown-tensor"


def test_a_replay_gives_the_same_bits(tmp_path: Path) -> None:
    """Three versions in bf16, made again from version 0 and the kept updates, are the recorded ones."""
    shapes = {A: (4, 70), B: (33, 4), R: (33, 70), "head.bias": (3,)}
    run = AuditedRun(
        tmp_path / "storage",
        "sync",
        shapes=shapes,
        aggregation=AggregationSection(size_power=0.5),
        adapter=EXACT.model_copy(update={"rank": 4}),
        residuals=FACTORS,
    )
    (tmp_path / "scratch").mkdir()
    made = list(replay(run.storage, run.federation, run.plan, tmp_path / "scratch"))
    assert [(each.version, each.differences) for each in made] == [(version, ()) for version in range(VERSIONS + 1)]


@given(m=st.integers(1, 9), n=st.integers(1, 9), r=st.integers(1, 5), span=st.integers(1, 40), seed=st.integers(0, 99))
def test_the_order_of_addition_is_fixed(m: int, n: int, r: int, span: int, seed: int) -> None:
    """However the matrix is cut, an element is its start + b_0 a_0 + b_1 a_1 + ..., each rounded, in this order."""
    rng = np.random.default_rng(seed)
    out, b, a = (rng.normal(0, 1, shape).astype(np.float32) for shape in ((m, n), (m, r), (r, n)))
    wanted = out.copy()
    for i in range(m):
        for j in range(n):
            for k in range(r):
                wanted[i, j] = np.float32(wanted[i, j] + np.float32(b[i, k] * a[k, j]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(residual, "SPAN", span)
        add_product(out, b, a)
    assert np.array_equal(out.view(np.uint32), wanted.view(np.uint32))
