"""The bench of local training compares like with like."""

from __future__ import annotations

from typing import Any

from bench.local import REFERENCE, UNCACHED, WAYS, summarize


def run(way: str, seconds: float, loss: float = 0.5) -> dict[str, Any]:
    """What one process told."""
    return {
        "way": way,
        "epoch_s": [seconds, 3 * seconds, seconds],
        "epoch_processor_s": [seconds / 2],
        "prepare_s": 1.0,
        "idle_bytes": 100_000_000,
        "ready_bytes": 150_000_000,
        "peak_bytes": 400_000_000,
        "kept_bytes": 0 if way in UNCACHED else 2_000_000,
        "loss": [loss],
    }


def test_a_summary_takes_medians_and_compares_with_the_kept_prefix() -> None:
    """By hand: epochs of 6 s are three times those of 2 s; memory is what lies above the idle process."""
    found = summarize([run(way, 2.0 if way == REFERENCE else 6.0) for way in WAYS])
    assert found["equal_losses"]
    assert found["ways"]["full"] == {
        "epoch_s": 6.0,
        "epoch_processor_s": 3.0,
        "prepare_s": 1.0,
        "ready_mb": 50,
        "peak_mb": 300,
        "kept_mb": 0.0,
        "epoch_s_of_cached": 3.0,
        "epoch_processor_s_of_cached": 3.0,
    }


def test_losses_that_differ_are_told() -> None:
    """Only those that must be equal to the bit: neither full training nor 16 bits are."""
    for way, equal in (
        ("layer skipping", False),
        ("cached, first start", False),
        ("full", True),
        ("cached, bf16", True),
    ):
        runs = [run(each, 1.0, 0.25 if each == way else 0.5) for each in WAYS]
        assert summarize(runs)["equal_losses"] == equal
