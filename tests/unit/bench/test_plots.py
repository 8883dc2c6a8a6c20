"""Pictures of what was measured; measuring itself takes real processes."""

from __future__ import annotations

from pathlib import Path

from bench.plots import PLOTS, draw_all

RESULTS = Path(__file__).parents[3] / "docs" / "results"


def test_what_was_published_can_be_drawn(tmp_path: Path) -> None:
    """The files that the benchmarks write have all that their pictures show."""
    drawn = list(draw_all(RESULTS, tmp_path))
    assert len(drawn) == len(PLOTS)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
