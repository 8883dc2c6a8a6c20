from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.merging import MergePlan, in_order, plan_merge
from coordinator.records import Accepted, Contribution
from shared.config import AggregationSection, StalenessSection

CONSTANT = StalenessSection(kind="constant")


def parts(version: int) -> tuple[str, ...]:
    """The transfers that make up the state of a version: it travelled whole."""
    return (f"{version:032x}",)


def accepted(site: str, *, base: int, examples: int) -> Accepted:
    """An accepted update; its id is the site's name in hex."""
    return Accepted(site.encode().hex().ljust(32, "0"), site, base, examples, "3b" * 32, "f1" * 32, 1.0, 2.0)


def weights(plan: MergePlan) -> list[float]:
    """The recorded weights."""
    return [each.weight for each in plan.recorded()]


def test_sync_is_the_mean_by_examples() -> None:
    """FedAvg: 10, 30 and 60 examples weigh 0.1, 0.3, 0.6."""
    updates = [accepted(site, base=4, examples=n) for site, n in (("a", 10), ("b", 30), ("c", 60))]
    plan = plan_merge(5, updates, AggregationSection(), parts)
    assert (plan.version, plan.base_version, plan.before, plan.mode) == (5, 4, parts(4), "sync")
    assert weights(plan) == [0.1, 0.3, 0.6]
    assert [each.base for each in plan.contributions] == [parts(4)] * 3


def test_fedbuff_damps_and_does_not_renormalise() -> None:
    """FedBuff with K = 2, p = 0: s / K, so 1/2 for a fresh update and 1/4 for one that is 3 versions late."""
    section = AggregationSection(mode="fedbuff", buffer=2, size_power=0)
    plan = plan_merge(8, [accepted("a", base=7, examples=5), accepted("b", base=4, examples=500)], section, parts)
    assert weights(plan) == [0.5, 0.25]
    assert [each.staleness for each in plan.contributions] == [0, 3]


def test_sizes_and_lateness_together() -> None:
    """With p = 1/2: sizes 4 and 6 of 16 and 36 examples; the second is 3 late: 4/10 and 6/10 x 1/2."""
    section = AggregationSection(mode="fedbuff", size_power=0.5)
    plan = plan_merge(4, [accepted("a", base=3, examples=16), accepted("b", base=0, examples=36)], section, parts)
    assert weights(plan) == pytest.approx([0.4, 0.3], rel=1e-15)
    assert [each.denominator for each in plan.contributions] == [4, 6]


def test_clipping_scales_large_updates_down() -> None:
    """Norms of 1: a limit of 1/4 leaves a quarter of each, 1 and more leave all; nobody's size counts less."""
    updates = [accepted("a", base=4, examples=10), accepted("b", base=4, examples=30)]
    for limit, share in ((0.25, 0.25), (1.0, 1.0), (7.0, 1.0)):
        plan = plan_merge(5, updates, AggregationSection(clip_norm=limit), parts)
        assert weights(plan) == [0.25 * share, 0.75 * share]
        assert [each.denominator for each in plan.contributions] == [10, 30]


def test_fedasync_mixes_by_alpha_and_lateness() -> None:
    """a_t = 0.6 x (1 + 3)^-1/2 = 0.3, whatever the update's size."""
    section = AggregationSection(mode="fedasync", alpha=0.6)
    plan = plan_merge(9, [accepted("a", base=5, examples=77)], section, parts)
    assert weights(plan) == [0.3]
    assert plan.contributions[0].base == parts(5)
    assert plan.alpha == 0.6


def test_recorded_contributions_keep_the_order_of_addition() -> None:
    """What the journal stores names each update once, in the order that the plan was given."""
    updates = [accepted("z", base=1, examples=1), accepted("a", base=0, examples=3)]
    section = AggregationSection(mode="fedbuff", staleness=CONSTANT)
    assert plan_merge(2, updates, section, parts).recorded() == (
        Contribution(updates[0].update_id, "z", 1, 0, 0.25),
        Contribution(updates[1].update_id, "a", 0, 1, 0.75),
    )


def test_updates_are_added_up_by_site_then_base_version_then_id() -> None:
    """Whoever came first: all 24 orders of arrival give the same one."""
    ids = [f"{number:032x}" for number in (4, 3, 2, 1)]
    named = zip(("anna", "anna", "anna", "bela"), (1, 2, 2, 0), (ids[0], ids[2], ids[1], ids[3]), strict=True)
    wanted = [replace(accepted(site, base=base, examples=1), update_id=name) for site, base, name in named]
    assert all(in_order(arrived) == wanted for arrived in itertools.permutations(wanted))


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(1, 10**9)), min_size=1, max_size=20), st.floats(0, 1))
def test_weights_sum_to_one_at_most(updates: list[tuple[int, int]], power: float) -> None:
    """Without lateness the weights sum to 1, with it to less; none is negative."""
    known = [accepted(f"s{i}", base=base, examples=n) for i, (base, n) in enumerate(updates)]
    fresh = AggregationSection(size_power=power, staleness=CONSTANT)
    late = AggregationSection(size_power=power)
    assert sum(weights(plan_merge(7, known, fresh, parts))) == pytest.approx(1)
    assert 0 < sum(weights(plan_merge(7, known, late, parts))) <= 1 + 1e-12
    assert min(weights(plan_merge(7, known, late, parts))) > 0


@pytest.mark.parametrize(
    ("version", "updates", "section"),
    [
        (1, [], AggregationSection()),
        (1, [accepted("a", base=1, examples=1)], AggregationSection()),
        (1, [accepted("a", base=0, examples=1)] * 2, AggregationSection()),
        (1, [accepted(s, base=0, examples=1) for s in "ab"], AggregationSection(mode="fedasync")),
    ],
    ids=["empty", "from the future", "twice", "two at once"],
)
def test_what_no_round_may_close_with(version: int, updates: list[Accepted], section: AggregationSection) -> None:
    """A plan over nothing, over an update of a version to come, over one update twice is a bug of ours."""
    with pytest.raises(AssertionError):
        plan_merge(version, updates, section, parts)
