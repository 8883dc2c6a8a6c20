"""What sealing tells a person about a plan."""

from __future__ import annotations

from mailboat.sealing import describe
from shared.plan import SealedPlan
from tests.factories import make_federation, make_plan

FEDERATION = make_federation()


def lines(**changes: object) -> str:
    """What is said of a plan of two blocks of 60 and 40 parameters each, of 1,000 in all."""
    values = {
        "depth": 4,
        "layers": (2, 3),
        "tensors": {"model.layers.2.w": (60,), "model.layers.3.w": (8, 5)},
        "trained_parameters": 100,
        "total_parameters": 1000,
    }
    plan = SealedPlan.model_validate(make_plan(FEDERATION).model_dump() | values | changes)
    return "\n".join(describe(plan, FEDERATION))


def test_the_saving_is_told() -> None:
    """Parameters trained, of how many, and the share that never travels; a prefix that is computed once."""
    told = lines()
    assert "blocks 2, 3 of 0 to 3" in told
    assert "100 trained of 1,000: 90.0% of the model never travels" in told
    assert "below block 2 all is frozen" in told
    assert "personal" not in told


def test_a_plan_from_the_bottom_saves_no_work() -> None:
    """It sends as little as one from the top, and computes nothing in advance."""
    assert "a site runs the whole model in each epoch" in lines(layers=(0, 1))


def test_both_ways_are_told_where_importance_chooses() -> None:
    """By hand: a head of 7 and the larger block of 60 go up, 6.7 % of 1,000; 107 come down."""
    tensors = {"model.layers.2.w": (60,), "model.layers.3.w": (8, 5), "score.weight": (7,)}
    told = lines(at_once=1, tensors=tensors, trained_parameters=107)
    assert "107 trained of 1,000: 89.3% of the model never travels" in told
    assert "an update holds 1 of these blocks, at most 67 parameters: 93.3% never travels up; a state" in told


def test_what_stays_is_counted_apart() -> None:
    """Personal tensors are trained too; they are not in what travels."""
    assert "35 more parameters in 2 tensors are trained and stay" in lines(personal={"score.bias": (5,), "w": (5, 6)})
