"""What is trained, by name from federation.toml, in real runs over a real Mosquitto with a tiny real model."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_run import run_tiny, updates_of, write_tiny

pytestmark = pytest.mark.integration


@pytest.mark.parametrize(
    ("plan", "blocks"),
    [
        ("top:0.5", {2, 3}),
        ("bottom:2", {0, 1}),
        ("middle:2", {1, 2}),
        ("random:2", {1, 3}),
        ("0,2", {0, 2}),
        ("all", {0, 1, 2, 3}),
    ],
)
def test_a_plan_runs_by_its_name(plan: str, blocks: set[int], tmp_path: Path, mosquitto_url: str) -> None:
    """Each site's updates hold the plan's blocks and the head, and no other block."""
    write_tiny(tmp_path, mosquitto_url, federation=f'[layers]\nplan = "{plan}"\n')
    found = run_tiny(tmp_path)
    assert {loaded.plan.layers for loaded in found.values()} == {tuple(sorted(blocks))}
    updates = updates_of(tmp_path)
    assert set(updates) == {(site, version) for site in ("site-1", "site-2") for version in (0, 1)}
    for tensors in updates.values():
        held = {int(name.split(".")[2]) for name in tensors if name.startswith("model.layers.")}
        assert held == blocks
        assert "score.weight" in tensors
        assert ("model.embed_tokens.weight" in tensors) == (plan == "all")
