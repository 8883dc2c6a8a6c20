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
from tests.commands import call, refused, running
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


def run(folder: Path, kind: str) -> None:
    """Run the federation to its end, and compute its versions again."""
    with (
        running(folder, "coordinator", "run") as coordinator,
        running(folder, "site", "run", "--config", "site-1.toml") as first,
        running(folder, "site", "run", "--config", "site-2.toml") as second,
    ):
        coordinator.wait_for('"event": "finished"', SLOW_S)
        assert f"{kind} of rank 4 on all linear layers" in coordinator.text()
        assert (first.process.wait(SLOW_S), second.process.wait(SLOW_S)) == (0, 0)
        assert coordinator.end(signal.SIGTERM) == 0
    replayed = call(folder, "audit", "replay", timeout_s=SLOW_S)
    assert replayed.returncode == 0, replayed.stdout + replayed.stderr


def f1_of(
    folder: Path, capsys: pytest.CaptureFixture[str], model: Path | None = None, site: Path | None = None
) -> dict[str, Any]:
    """What `mailboat evaluate` measures on the held-out notes, of the newest version, a folder or a site."""
    capsys.readouterr()
    evaluate(
        notes=folder / "notes" / "heldout", model=model, site=site, config=folder / "coordinator.toml", as_json=True
    )
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
    run(tmp_path, kind)
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

    scored, config = f1_of(tmp_path, capsys), tmp_path / "coordinator.toml"
    export(out=tmp_path / "whole", merged=True, config=config)
    assert f1_of(tmp_path, capsys, tmp_path / "whole") == scored
    if kind == "fedex-lora":
        with pytest.raises(ConfigError, match="more than its adapters"):
            export(out=tmp_path / "adapters", config=config)
    else:
        export(out=tmp_path / "adapters", config=config)
        assert f1_of(tmp_path, capsys, tmp_path / "adapters") == scored
        predict_elsewhere(tmp_path)


def predict_elsewhere(folder: Path) -> None:
    """Adapters carried to a machine that has the base model in another place find what the whole model finds there."""
    away = folder / "away"
    away.mkdir()
    for name in ("adapters", "whole"):
        (folder / name).rename(away / name)
    (folder / "model").rename(away / "base")
    (away / "note.txt").write_text("patient was given aspirin\n\nchest pain noted and fever")
    words = ("predict", "--notes", "note.txt", "--model")
    assert "predict --base" in refused(away, *words, "adapters", "--out", "none.jsonl", status=2, timeout_s=SLOW_S)
    for name, *base in (("adapters", "--base", "base"), ("whole",)):
        done = call(away, *words, name, "--out", f"{name}.jsonl", *base, timeout_s=SLOW_S)
        assert done.returncode == 0, done.stderr
    assert (away / "adapters.jsonl").read_text() == (away / "whole.jsonl").read_text()
    card = (away / "adapters" / "README.md").read_text()
    assert "library_name: peft" in card
    assert "| site-1 | 2 | " in card
    assert 'base_model: "model"' in card


def test_a_run_in_which_every_b_stays(tmp_path: Path, mosquitto_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Under fedsa-lora B never leaves its site: what a site exports has the common A and its own B, and its own F1."""
    begin(tmp_path, mosquitto_url, "llama", "fedsa-lora")
    run(tmp_path, "fedsa-lora")
    master = load_file(tmp_path / "coordinator-storage" / "masters" / "v00000002.safetensors")
    assert {name.split(".")[-2] for name in master if "lora" in name} == {"lora_A"}
    written = []
    for name in ("site-1", "site-2"):
        config = tmp_path / f"{name}.toml"
        export(out=tmp_path / f"{name}-adapters", site=config)
        assert f1_of(tmp_path, capsys, tmp_path / f"{name}-adapters") == f1_of(tmp_path, capsys, site=config)
        written.append(load_file(tmp_path / f"{name}-adapters" / "adapter_model.safetensors"))
    first, second = written
    assert all(np.array_equal(first[name], second[name]) != ("lora_B" in name) for name in first)
