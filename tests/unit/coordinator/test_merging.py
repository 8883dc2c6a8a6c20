from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.ledger import Known
from coordinator.merging import MergePlan, choosing, coefficients, in_order, last_merged, plan_merge, rule_for
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


def test_fedasyncs_rate_does_not_wear_off() -> None:
    """A fresh update of the 50th version mixes by alpha as one of the first does: it is not multiplied up."""
    section = AggregationSection(mode="fedasync", alpha=0.6)
    assert weights(plan_merge(50, [accepted("a", base=49, examples=1)], section, parts)) == [0.6]


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


def with_losses(section: AggregationSection, *updates: tuple[int, float]) -> list[float]:
    """Weights of fresh updates of so many examples and such a loss."""
    known = [accepted(f"s{number}", base=4, examples=n) for number, (n, _loss) in enumerate(updates)]
    losses = {update.update_id: loss for update, (_n, loss) in zip(known, updates, strict=True)}
    return weights(plan_merge(5, known, section, parts, losses=losses))


def test_weights_by_loss_by_hand() -> None:
    """Fed-MedLoRA+ as in its code: exp(1 - l), normalised, no size: l = 1, 2 give 1 and 1/e, of 1 + 1/e."""
    found = with_losses(AggregationSection(quality="exp-loss"), (10, 1.0), (10**6, 2.0))
    assert found == pytest.approx([0.7310585786300049, 0.2689414213699951], rel=1e-15)


def test_weights_by_size_and_loss_by_hand() -> None:
    """As in its text: n^p exp(-l / T). With p = 1/2, T = 1/2, 16 and 36 examples, l = 0 and ln 2: 4 and 6 x 1/4.

    So 4 / 5.5 and 1.5 / 5.5; at T = 1 it is 6 x 1/2, so 4/7 and 3/7.
    """
    half = AggregationSection(quality="size-exp-loss", size_power=0.5, temperature=0.5)
    assert with_losses(half, (16, 0.0), (36, math.log(2))) == pytest.approx([4 / 5.5, 1.5 / 5.5], rel=1e-14)
    one = half.model_copy(update={"temperature": 1.0})
    assert with_losses(one, (16, 0.0), (36, math.log(2))) == pytest.approx([4 / 7, 3 / 7], rel=1e-14)


def test_only_differences_of_losses_count() -> None:
    """Losses of thousands, whose exponentials are nothing, weigh as small ones; one far worse counts nothing."""
    for shift in (0.0, -50.0, 5000.0):
        found = with_losses(AggregationSection(quality="exp-loss"), (1, shift + 1.0), (1, shift + 2.0))
        assert found == pytest.approx([0.7310585786300049, 0.2689414213699951], rel=1e-12)
    assert with_losses(AggregationSection(quality="exp-loss"), (1, 1e300), (1, 0.5)) == [0.0, 1.0]


def test_lateness_and_clipping_stand_above_the_line_beside_the_loss() -> None:
    """Equal losses and sizes: 1/2 each, of which 3 versions late leave 1/2, and a norm twice the limit another 1/2."""
    section = AggregationSection(mode="fedbuff", quality="size-exp-loss", clip_norm=0.5)
    late, fresh = accepted("a", base=4, examples=7), accepted("b", base=7, examples=7)
    plan = plan_merge(8, [late, fresh], section, parts, losses={late.update_id: 0.3, fresh.update_id: 0.3})
    assert weights(plan) == [0.125, 0.25]


# -- ca2fl ---


def life(site: str, version: int, *, staleness: int = 0) -> Known:
    """A merged update."""
    return Known(site, "", "merged", version=version, staleness=staleness, weight=0.5)


def test_the_last_merged_update_of_each_site() -> None:
    """Of two in one version the one from the later base, which is added later; none of what was not merged."""
    known = {
        "a1": life("anna", 1),
        "a3": life("anna", 3, staleness=2),
        "a4": life("anna", 3, staleness=0),
        "a2": life("anna", 2),
        "b1": life("bela", 1),
        "b2": Known("bela", "", "dropped", rule="run-complete"),
        "c1": Known("carl", "", "rejected", rule="too-stale"),
        "d1": Known("dora", "", "accepted"),
    }
    assert last_merged(known) == {"anna": "a4", "bela": "b1"}


def test_ca2fl_by_hand() -> None:
    """N = 3 sites, of which anna and carl have sent before; now anna and bela do, K = 2.

    v = (h_anna + 0 + h_carl) / 3 + (delta_anna - h_anna) / 2 + (delta_bela - 0) / 2: 1/2 of each new one, 1/3 - 1/2 of
    anna's old one, 1/3 of carl's.
    """
    section = AggregationSection(rule="ca2fl", staleness=CONSTANT)
    anna, bela = accepted("anna", base=4, examples=900), accepted("bela", base=1, examples=1)
    known = {"a0": life("anna", 2), "c0": life("carl", 3)}
    plan = plan_merge(5, [anna, bela], section, parts, known=known)
    assert weights(plan) == [0.5, 0.5]
    everybody = {anna.update_id, bela.update_id, "a0", "c0"}
    assert coefficients(plan, everybody) == {
        anna.update_id: 0.5,
        bela.update_id: 0.5,
        "a0": 1 / 3 - 0.5,
        "c0": 1 / 3,
    }


def test_ca2fl_counts_those_who_hold_a_tensor() -> None:
    """Of a tensor that bela's update lacks, anna is all of K, and N are anna and carl; that only carl holds stays."""
    section = AggregationSection(rule="ca2fl", staleness=CONSTANT)
    anna, bela = accepted("anna", base=4, examples=1), accepted("bela", base=4, examples=1)
    plan = plan_merge(5, [anna, bela], section, parts, known={"a0": life("anna", 2), "c0": life("carl", 3)})
    assert coefficients(plan, {anna.update_id, "a0", "c0"}) == {anna.update_id: 1.0, "a0": -0.5, "c0": 0.5}
    assert coefficients(plan, {bela.update_id}) == {bela.update_id: 1.0}
    assert coefficients(plan, {"a0", "c0"}) == {}


def test_ca2fl_of_everybody_is_the_mean() -> None:
    """When all sites that ever sent are in the round, what they sent before falls out."""
    section = AggregationSection(rule="ca2fl", staleness=CONSTANT)
    now = [accepted(site, base=4, examples=1) for site in ("anna", "bela")]
    plan = plan_merge(5, now, section, parts, known={"a0": life("anna", 2), "b0": life("bela", 3)})
    found = coefficients(plan, {"a0", "b0", *(update.update_id for update in now)})
    assert list(found.values()) == [0.5, 0.5, 0.0, 0.0]


def test_ca2fl_damps_the_correction_of_a_late_site() -> None:
    """Three versions late: (delta - h) counts by half, so 1/2 of the new one and 1 - 1/2 of the old one."""
    section = AggregationSection(mode="fedbuff", rule="ca2fl")
    late = accepted("anna", base=1, examples=1)
    plan = plan_merge(5, [late], section, parts, known={"a0": life("anna", 3)})
    assert coefficients(plan, {late.update_id, "a0"}) == {late.update_id: 0.5, "a0": 0.5}


def test_what_an_update_lacks_is_left_out_or_zero() -> None:
    """Of a tensor that c of 10, 30 and 60 examples lacks: 1/4 and 3/4, or 1/10 and 3/10 as if c's change were 0.

    One that all hold is the same either way, and one that nobody holds is not moved.
    """
    updates = [accepted(site, base=4, examples=n) for site, n in (("a", 10), ("b", 30), ("c", 60))]
    a, b, c = (update.update_id for update in updates)
    omitting = plan_merge(5, updates, AggregationSection(), parts)
    counting = plan_merge(5, updates, AggregationSection(missing="zero"), parts)
    assert coefficients(omitting, {a, b}) == {a: 0.25, b: 0.75}
    assert coefficients(counting, {a, b}) == {a: 0.1, b: 0.3}
    assert coefficients(counting, {a, b, c}) == coefficients(omitting, {a, b, c}) == {a: 0.1, b: 0.3, c: 0.6}
    assert coefficients(counting, set()) == {}


def test_lateness_and_loss_count_where_an_update_lacks_a_tensor() -> None:
    """B is three versions late, c as lossy as b: of what c lacks a has 2/4, b half of 1/4; c's quarter is no change."""
    section = AggregationSection(missing="zero", quality="size-exp-loss", size_power=0)
    updates = [accepted("a", base=4, examples=9), accepted("b", base=1, examples=9), accepted("c", base=4, examples=9)]
    a, b, c = (update.update_id for update in updates)
    plan = plan_merge(5, updates, section, parts, losses={a: 0.0, b: math.log(2), c: math.log(2)})
    assert coefficients(plan, {a, b}) == pytest.approx({a: 2 / 4, b: 1 / 8})


def test_other_rules_know_no_cache() -> None:
    """What was merged before counts in no other rule."""
    update = accepted("anna", base=4, examples=1)
    for rule in ("mean", "median", "krum"):
        section = AggregationSection(rule=rule)
        assert plan_merge(5, [update], section, parts, known={"a0": life("anna", 3)}).cached == ()


# -- krum ---


def test_of_too_few_updates_for_krum_the_median_is_taken() -> None:
    """F = 1 needs five, f = 2 seven; the plan says by which rule it is merged, and other rules stay."""
    for byzantine, needed in ((1, 5), (2, 7)):
        section = AggregationSection(rule="multi-krum", byzantine=byzantine)
        assert section.krum_min == needed
        assert [rule_for(section, count) for count in (needed - 1, needed)] == ["median", "multi-krum"]
        few = [accepted(f"s{number}", base=4, examples=1) for number in range(needed - 1)]
        assert plan_merge(5, few, section, parts).rule == "median"
    assert rule_for(AggregationSection(rule="trimmed-mean"), 1) == "trimmed-mean"


def test_what_krum_does_not_choose_counts_nothing() -> None:
    """Of five the second and fourth: half each, the others 0, and a late one that was left out slows nobody's step."""
    section = AggregationSection(mode="fedbuff", buffer=5, rule="multi-krum", staleness=CONSTANT)
    five = [accepted(f"s{number}", base=0 if number == 0 else 4, examples=1) for number in range(5)]
    plan = plan_merge(5, five, section, parts)
    assert (plan.latest, weights(plan)) == (4, [0.2] * 5)
    left = choosing(plan, {five[1].update_id, five[3].update_id})
    assert (left.latest, weights(left)) == (0, [0, 0.5, 0, 0.5, 0])
    assert coefficients(left, {update.update_id for update in five}) == {five[1].update_id: 0.5, five[3].update_id: 0.5}


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
