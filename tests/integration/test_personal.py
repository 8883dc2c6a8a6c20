"""Tensors that stay at their sites, in real processes over a real Mosquitto with a tiny real model."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import AutoModelForTokenClassification

from edge_client import pipe
from edge_client.outbox import newest_own, receipt_paths
from edge_client.worker import Worker
from edge_client.worker_client import load_request
from mailboat import cli, console
from mailboat.commands.init import init
from mailboat.synth import make_notes
from shared import durable
from shared.config import FederationConfig, SiteConfig
from shared.configfile import load_config
from shared.faultpoint import VARIABLE
from shared.store import FrameStore
from tests.commands import running
from tests.unit.edge_client import tiny

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(600)]

SLOW_S = 240.0
HEAD = {"score.bias", "score.weight"}


@pytest.fixture
def folder(tmp_path: Path, mosquitto_url: str) -> Path:
    """Two sites that keep their heads, for two versions."""
    model = tiny.save_model(tmp_path / "model", "llama")
    init(tmp_path, name="ward", model=str(model), broker=mosquitto_url, sites=2)
    make_notes(tmp_path / "notes", sites=2, notes=4, alpha=1.0, seed=0, heldout=3)
    path = tmp_path / "federation.toml"
    text = path.read_text()
    for old, new in (
        ("# personal = []", 'personal = ["score.*"]'),
        ('plan = "top:6"', 'plan = "top:2"'),
        ("versions = 10", "versions = 2"),
        ("# quorum = 1", "quorum = 2"),
        ("# max_length = 192", "max_length = 64"),
        ("# lr = 0.001", "lr = 0.01"),
    ):
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    return tmp_path


def test_heads_stay_and_survive_a_crash(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No head travels; each site's goes on from its last sealed update, also when killed between the two.

    Killed before its second update counts and started again, site-1 ends with the very head of an undisturbed run.
    """
    monkeypatch.chdir(folder)

    def site(number: int, **env: str) -> object:
        return running(folder, "site", "run", "--config", f"site-{number}.toml", **env)

    with running(folder, "coordinator", "run") as coordinator:
        with running(folder, "site", "run", "--config", "site-2.toml") as second:
            with running(folder, "site", "run", "--config", "site-1.toml", **{VARIABLE: "seal.before:2"}) as first:
                assert first.process.wait(SLOW_S) == -signal.SIGKILL
            with running(folder, "site", "run", "--config", "site-1.toml") as first:
                coordinator.wait_for('"event": "finished"', SLOW_S)
                assert (first.process.wait(SLOW_S), second.process.wait(SLOW_S)) == (0, 0)
        assert "2 tensors are trained and stay at each site" in coordinator.text()
        assert coordinator.end(signal.SIGTERM) == 0
    for store in (FrameStore(folder / "coordinator-storage" / name) for name in ("updates", "states")):
        for transfer in store.ids():
            stored = store.get(transfer)
            assert stored is not None
            with stored.open_tensors(verify=True) as reader:
                assert not HEAD & set(reader.shapes)
                assert "model.norm.weight" in reader.shapes
    heads = {}
    for name in ("site-1", "site-2"):
        assert len(receipt_paths(folder / f"{name}-storage")) == 2
        own = newest_own(folder / f"{name}-storage")
        assert own is not None
        heads[name] = load_file(own)
        assert set(heads[name]) == HEAD
    assert not np.array_equal(heads["site-1"]["score.weight"], heads["site-2"]["score.weight"])
    undisturbed = _head_of_two_updates(folder)
    assert all(np.array_equal(heads["site-1"][name], undisturbed[name]) for name in HEAD)
    _look_at_models(folder, heads["site-1"], capsys)


def _head_of_two_updates(folder: Path) -> dict[str, np.ndarray]:
    """What site-1's head becomes when it trains on versions 0 and 1 one after the other."""
    config = load_config(folder / "site-1.toml", SiteConfig)
    federation = load_config(config.federation, FederationConfig)
    worker = Worker(lambda _: None)
    assert isinstance(worker.handle(load_request(config, federation)), pipe.Loaded)
    store, own = FrameStore(folder / "coordinator-storage" / "states"), None
    states = {stored.manifest.state.version: stored for each in store.ids() if (stored := store.get(each))}
    for version in (0, 1):
        state, out = folder / f"state-{version}", folder / f"delta-{version}"
        durable.write_scratch(state, states[version].plain())
        trained = worker.handle(pipe.Train(state=state, base_version=version, out=out, own=own))
        assert isinstance(trained, pipe.Trained)
        own = trained.own
    assert own is not None
    return load_file(own)


def _look_at_models(folder: Path, head: dict[str, np.ndarray], capsys: pytest.CaptureFixture[str]) -> None:
    """A site exports and scores its own head; the coordinator the one that all began with, and says so."""

    def here(*words: str) -> tuple[str, str]:
        capsys.readouterr()
        status = console.run(lambda: cli.app(list(words)))
        said = capsys.readouterr()
        assert status == 0, said
        return said.out, said.err

    _, said = here("export", "--out", "general")
    assert "2 tensors of layers.personal, score.bias first, are as every site began with them" in said
    _, said = here("export", "--out", "ours", "--site", "site-1.toml")
    assert "version 2 at site-1" in said
    assert "are site-1's own" in said
    exported = {
        name: AutoModelForTokenClassification.from_pretrained(folder / name).state_dict()
        for name in ("general", "ours")
    }
    assert np.array_equal(exported["ours"]["score.weight"].numpy(), head["score.weight"])
    assert not np.array_equal(exported["general"]["score.weight"].numpy(), head["score.weight"])
    notes = str(folder / "notes" / "heldout")
    told = json.loads(here("evaluate", "--notes", notes, "--site", "site-1.toml", "--json")[0])
    again = json.loads(here("evaluate", "--notes", notes, "--model", "ours", "--json")[0])
    assert (told.pop("model"), again.pop("model")) == ("version 2 at site-1", "ours")
    assert told == again
