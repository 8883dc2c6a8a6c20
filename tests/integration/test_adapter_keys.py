"""What `[adapter]` says beside its kind, by name from federation.toml, in real runs with a tiny real model.

The kinds run in test_adapters.py, in processes of their own.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from mailboat.commands.export import export
from tests.tiny_run import run_tiny, updates_of, write_tiny

pytestmark = pytest.mark.integration

RANK, ALPHA = 4, 8
ATTENTION = {f"self_attn.{letter}_proj" for letter in "qkvo"}
LINEARS = ATTENTION | {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}


@pytest.mark.parametrize(
    ("plan", "keys", "blocks", "linears", "scale"),
    [
        ("all", "", {0, 1, 2, 3}, LINEARS, ALPHA / RANK),
        ("top:2", 'targets = ["q_proj", "mlp.down_proj"]\n', {2, 3}, {"self_attn.q_proj", "mlp.down_proj"}, 2),
        ("top:1", "rank_stabilized = true\n", {3}, LINEARS, ALPHA / RANK**0.5),
    ],
    ids=["plan-all", "targets", "rank_stabilized"],
)
def test_what_has_an_adapter_is_said_by_name(
    plan: str, keys: str, blocks: set[int], linears: set[str], scale: float, tmp_path: Path, mosquitto_url: str
) -> None:
    """Each update holds A and B of these layers in these blocks, and the head; the model that comes out is W + s B A.

    Layers without an adapter come out as they were.
    """
    adapter = f'[adapter]\nkind = "lora"\nrank = {RANK}\nalpha = {ALPHA}\n{keys}[training]\nlr = 0.02\n'
    write_tiny(tmp_path, mosquitto_url, federation=f'[layers]\nplan = "{plan}"\n{adapter}')
    run_tiny(tmp_path)
    wanted = {f"layers.{block}.{linear}" for block in blocks for linear in linears}
    updates = updates_of(tmp_path)
    assert set(updates) == {(site, version) for site in ("site-1", "site-2") for version in (0, 1)}
    for tensors in updates.values():
        found = {re.sub(r"^.*(layers\.\d+\..*)\.lora_([AB])\.weight$", r"\1 \2", name) for name in tensors}
        assert {name for name in found if "score" not in name} == {f"{name} {each}" for name in wanted for each in "AB"}
        assert len(found) == 2 * len(wanted) + 2
    export(out=tmp_path / "whole", merged=True, config=tmp_path / "coordinator.toml")
    base, whole = (
        load_file(tmp_path / "model" / "model.safetensors"),
        load_file(tmp_path / "whole" / "model.safetensors"),
    )
    master = load_file(tmp_path / "coordinator" / "masters" / "v00000002.safetensors")
    for name, before in base.items():
        added, layer = np.zeros_like(before), name.removesuffix(".weight")
        if layer in wanted:
            a, b = (master[f"base_model.model.model.{layer}.lora_{each}.weight"] for each in "AB")
            added = scale * (b @ a)
            assert np.abs(added).max() > 1e-4
        np.testing.assert_allclose(whole[f"model.{name}"], before + added, rtol=1e-5, atol=1e-6)
