"""The picture of many sites; what is measured takes real processes."""

from __future__ import annotations

import json
from pathlib import Path

from bench.sites import draw

RESULTS = Path(__file__).parents[3] / "docs" / "results" / "sites.json"


def test_what_was_published_can_be_drawn(tmp_path: Path) -> None:
    """The file that the bench writes has all that its picture shows."""
    draw(json.loads(RESULTS.read_text())["runs"], tmp_path / "sites.png")
    assert (tmp_path / "sites.png").read_bytes().startswith(b"\x89PNG")
