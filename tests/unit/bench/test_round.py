"""Ratios of the round benchmark."""

from __future__ import annotations

from bench.round import Round, ratios


def one(run: str, place: str, seconds: list[float], plain_s: float | None = None) -> Round:
    """A measurement of which only times matter."""
    return Round(
        run=run,
        version="1",
        place=place,
        seconds=seconds,
        cpu_s={},
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
