"""Ratios of the round benchmark."""

from __future__ import annotations

from bench.round import Round, ratios


def one(run: str, place: str, seconds: list[float], *, plain_s: float | None = None, cpu_s: float = 0.0) -> Round:
    """A measurement of which only times matter."""
    return Round(
        run=run,
        version="1",
        place=place,
        seconds=seconds,
        cpu_s={"server": cpu_s, "sites": 1.0},
        server_mb=0.0,
        server_anonymous_mb=0.0,
        server_idle_mb=0.0,
        site_mb=0.0,
        broker_mb=0.0,
        loopback_mb=0.0,
        wire_mb={},
        plain_s=plain_s,
    )


def test_a_ratio_is_one_of_medians_over_all_turns() -> None:
    """All rounds of all turns count, and only those at the same place."""
    found = [
        one("mailboat f32", "tmpfs", [1.0, 3.0]),
        one("flare", "tmpfs", [4.0, 4.0]),
        one("mailboat f32", "tmpfs", [2.0]),
        one("flare", "disk", [9.0]),
    ]
    assert ratios(found) == {"mailboat f32 / flare, tmpfs": 0.5}


def test_on_the_disk_a_round_may_take_what_a_plain_writer_takes() -> None:
    """The larger of the time on tmpfs and the plain writer's is the measure."""
    found = [one("mailboat bf16", "tmpfs", [2.0]), one("mailboat bf16", "disk", [6.0], plain_s=5.0)]
    assert ratios(found) == {"mailboat bf16 / the larger of tmpfs and plain writer, disk": 1.2}


def test_what_sealing_costs_is_told_in_seconds_and_in_processor_seconds() -> None:
    """Beside the same run open, at the same place: 3.3 s to 3.0, and 2.2 processor seconds to 2.0."""
    found = [
        one("mailboat bf16", "tmpfs", [3.0], cpu_s=1.0),
        one("mailboat bf16 sealed", "tmpfs", [3.3], cpu_s=1.2),
        one("mailboat int8", "tmpfs", [9.0]),
    ]
    pair = "mailboat bf16 sealed / mailboat bf16, tmpfs"
    assert ratios(found) == {pair: 1.1, f"{pair}, processor": 1.1}
