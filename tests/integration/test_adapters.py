"""Federations of adapters: real coordinator, sites and Mosquitto, a tiny model of each family, and what comes out."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from coordinator.journal import Journal
from coordinator.records import VersionCommitted
from mailboat.commands.export import evaluate, export
from mailboat.commands.init import init
from shared.errors import ConfigError
from tests.commands import call, running
from tests.unit.edge_client import tiny

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(600)]

SLOW_S = 240.0


def begin(folder: Path, url: str, model_type: str, kind: str) -> None:
    """Two sites with notes, and a federation of adapters in the top two blocks of a tiny model."""
    model = tiny.save_model(folder / "model", model_type)
    init(folder, name="ward", model=str(model), broker=url, sites=2)
    path = folder / "federation.toml"
    text = path.read_text()
    for old, new in (
        ('# kind = "none"', f'kind = "{kind}"'),
        ("# rank = 16", "rank = 4"),
        ("# alpha = 64", "alpha = 8"),
        ('plan = "top:6"', 'plan = "top:2"'),
        ("# max_length = 192", "max_length = 32"),
        ("versions = 10", "versions = 2"),
        ("# quorum = 1", "quorum = 2"),
        ("# lr = 0.001", "lr = 0.02"),
    ):
        assert old in text, old
        text = text.replace(old, new)
    path.write_text(text)
    for seed, name in enumerate(("site-1", "site-2", "heldout")):
        (folder / "notes" / name).mkdir(parents=True)
        tiny.write_conll(folder / "notes" / name / "notes.conll", tiny.notes(6, seed=seed))


def f1_of(folder: Path, capsys: pytest.CaptureFixture[str], model: Path | None = None) -> dict[str, Any]:
    """What `mailboat evaluate` measures on the held-out notes, of the newest version or of a folder."""
    capsys.readouterr()
    evaluate(notes=folder / "notes" / "heldout", model=model, config=folder / "coordinator.toml", as_json=True)
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    del found["model"]
    return found


@pytest.mark.parametrize(
    ("model_type", "kind"),
    [
        ("llama", "lora"),
        ("mistral", "ffa-lora"),
        ("qwen2", "lora"),
        ("bert", "fedex-lora"),
        ("gpt2", "fedex-lora"),
    ],
)
def test_a_run_of_adapters(
    tmp_path: Path, mosquitto_url: str, capsys: pytest.CaptureFixture[str], model_type: str, kind: str
) -> None:
    """Two versions of two sites each; a replay gives the same bits; every form of the export has the version's F1."""
    begin(tmp_path, mosquitto_url, model_type, kind)
    with (
        running(tmp_path, "coordinator", "run") as coordinator,
        running(tmp_path, "site", "run", "--config", "site-1.toml") as first,
        running(tmp_path, "site", "run", "--config", "site-2.toml") as second,
    ):
        coordinator.wait_for('"event": "finished"', SLOW_S)
        assert f"{kind} of rank 4 on all linear layers" in coordinator.text()
        assert (first.process.wait(SLOW_S), second.process.wait(SLOW_S)) == (0, 0)
        assert coordinator.end(signal.SIGTERM) == 0
    storage = tmp_path / "coordinator-storage"
    with Journal.open_read(storage / "journal.sqlite") as journal:
        versions = [record for record in journal.replay() if isinstance(record, VersionCommitted)]
    assert [[part.site for part in sorted(version.contributions, key=lambda p: p.site)] for version in versions] == [
        ["site-1", "site-2"]
    ] * 2
    master = load_file(storage / "masters" / "v00000002.safetensors")
    factors = {name.split(".")[-2] for name in master if "lora" in name}
    assert factors == ({"lora_B"} if kind == "ffa-lora" else {"lora_A", "lora_B"})
    residuals = [values for name, values in master.items() if name.endswith(".residual")]
    assert bool(residuals) == (kind == "fedex-lora")
    assert all(np.abs(values).max() > 0 for values in residuals)

    replayed = call(tmp_path, "audit", "replay", timeout_s=SLOW_S)
    assert replayed.returncode == 0, replayed.stdout + replayed.stderr

    scored, config = f1_of(tmp_path, capsys), tmp_path / "coordinator.toml"
    export(out=tmp_path / "whole", merged=True, config=config)
    assert f1_of(tmp_path, capsys, tmp_path / "whole") == scored
    if kind == "fedex-lora":
        with pytest.raises(ConfigError, match="more than its adapters"):
            export(out=tmp_path / "adapters", config=config)
    else:
        export(out=tmp_path / "adapters", config=config)
        assert f1_of(tmp_path, capsys, tmp_path / "adapters") == scored
