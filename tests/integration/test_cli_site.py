"""`mailboat site run` and what becomes of its work, in real processes with a tiny real model."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from coordinator.masters import master_path
from mailboat import cli, console
from mailboat.commands.init import init
from mailboat.synth import make_notes
from tests.commands import refused, running
from tests.unit.edge_client import tiny

pytestmark = [pytest.mark.integration, pytest.mark.slow]

SLOW_S = 90.0
"""Processes that import torch, several at a time, on two busy cores."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random LLaMA of four blocks with a tokenizer of its own."""
    return tiny.save_model(tmp_path_factory.mktemp("model") / "llama", "llama")


@pytest.fixture
def folder(tmp_path: Path, model: Path, mosquitto_url: str) -> Path:
    """What `init` and `data make` leave for one site, set to make one version of two blocks."""
    init(tmp_path, name="ward", model=str(model), broker=mosquitto_url, sites=1)
    make_notes(tmp_path / "notes", sites=1, notes=4, alpha=1.0, seed=0, heldout=3)
    edit(tmp_path / "federation.toml", 'plan = "top:6"', 'plan = "top:2"')
    edit(tmp_path / "federation.toml", "versions = 10", "versions = 1")
    edit(tmp_path / "federation.toml", "# max_length = 192", "max_length = 64")
    return tmp_path


def edit(path: Path, old: str, new: str) -> None:
    """Replace a text that is there."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_notes_that_are_not_there_are_named(folder: Path) -> None:
    """A site whose data folder is empty ends with 3, names the folder and says what was looked for."""
    shutil.rmtree(folder / "notes" / "site-1")
    (folder / "notes" / "site-1").mkdir()
    said = refused(folder, "site", "run", status=3, timeout_s=SLOW_S)
    assert "notes/site-1 holds no notes" in said
    assert "txt/NAME.txt and concept/NAME.con" in said


def test_a_label_outside_the_set_is_named_by_file_and_line(folder: Path) -> None:
    """An annotation with a label that was not agreed on ends the site with 3; the note's words are not shown."""
    edit(folder / "federation.toml", 'labels = ["problem", "treatment", "test"]', 'labels = ["problem", "treatment"]')
    said = refused(folder, "site", "run", status=3, timeout_s=SLOW_S)
    assert "a label is not one of the label set (problem, treatment)" in said
    assert ".con, line " in said
    assert 'c="' not in said


def test_a_model_without_weights_is_refused(
    folder: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model's folder that lacks its safetensors file ends the command with 2 and says what is missing."""
    bare = tmp_path / "bare"
    shutil.copytree(model, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    edit(folder / "federation.toml", str(model), str(bare))
    words = ["coordinator", "seal", "--config", str(folder / "coordinator.toml")]
    assert console.run(lambda: cli.app(words)) == 2
    assert f"error: {bare} has no weights: no *.safetensors file\n hint: " in capsys.readouterr().err


@pytest.mark.parametrize("words", [["site", "run"], ["coordinator", "run"]])
def test_a_plan_deeper_than_the_model_is_refused(folder: Path, words: list[str]) -> None:
    """A layer plan that asks for more blocks than there are ends with 2 and says how many there are."""
    edit(folder / "federation.toml", 'plan = "top:2"', 'plan = "top:9"')
    said = refused(folder, *words, status=2, timeout_s=SLOW_S)
    assert "asks for 9 blocks, the model has 4" in said


@pytest.mark.timeout(300)
def test_a_second_process_under_one_name_is_refused(folder: Path) -> None:
    """Of two processes with the same site name the second ends with 3 and is told why; the first goes on."""
    edit(folder / "coordinator.toml", '"coordinator-storage"', '"coordinator"')
    with running(folder, "coordinator", "run") as coordinator:
        coordinator.wait_for("announced", SLOW_S)
        shutil.copy(folder / "site.toml", folder / "first.toml")
        with running(folder, module=["tests.toys", "site", "first.toml"], TOY_SECONDS="600") as first:
            edit(folder / "site.toml", '"site-1-storage"', '"twin-storage"')
            first.wait_for("pulled", SLOW_S)
            said = refused(folder, "site", "run", status=3, timeout_s=SLOW_S)
            assert "site site-1 was refused: another process already runs as site site-1" in said
            assert first.process.poll() is None


@pytest.mark.timeout(300)
def test_a_site_by_hand_from_init_to_the_exported_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Site first, worker killed, coordinator later: the run ends, and its model loads, scores and passes the doctor."""
    monkeypatch.chdir(folder)

    def here(*words: str) -> str:
        """What a command prints, called in this process, which has torch already."""
        capsys.readouterr()
        status = console.run(lambda: cli.app(list(words)))
        said = capsys.readouterr()
        assert status == 0, said
        return said.out

    with running(folder, "site", "run") as site:
        site.wait_for('"event": "loading"', SLOW_S)
        site.wait_for('"event": "connected"', SLOW_S)
        os.kill(worker_of(site.process.pid), signal.SIGKILL)
        with running(folder, "coordinator", "run") as coordinator:
            coordinator.wait_for('"event": "finished"', SLOW_S)
            assert "blocks 2, 3 of 0 to 3 in LlamaForTokenClassification" in coordinator.text()
            assert site.process.wait(SLOW_S) == 0
            assert "it was killed (SIGKILL), most likely by the system because memory ran out" in site.text()
            checked = here("doctor", "-c", "coordinator.toml", "-c", "site.toml")
            assert coordinator.end(signal.SIGTERM) == 0
    assert re.search(r"OK   clock        \d+\.\d s (ahead of|behind) the coordinator's", checked)
    assert "the same as in the coordinator's announcement" in checked

    here("export", "--out", "exported")
    notes = str(folder / "notes" / "heldout")
    told = json.loads(here("evaluate", "--notes", notes, "--json"))
    again = json.loads(here("evaluate", "--model", "exported", "--notes", notes, "--json"))
    assert (told.pop("model"), again.pop("model")) == ("version 1", "exported")
    assert told == again
    assert told["notes"] == 3
    loads_plainly(folder / "exported")
    here("export", "--full-precision", "--out", "whole")
    rounded, whole = (load_file(folder / name / "model.safetensors") for name in ("exported", "whole"))
    master = load_file(master_path(folder / "coordinator-storage" / "masters", 1))
    assert all(np.array_equal(whole[name], values) for name, values in master.items())
    differing = {name for name, values in whole.items() if not np.array_equal(values, rounded[name])}
    assert differing <= master.keys()
    assert differing


def loads_plainly(folder: Path) -> None:
    """The folder is a model for anybody who has transformers."""
    from transformers import AutoModelForTokenClassification, AutoTokenizer

    loaded = AutoModelForTokenClassification.from_pretrained(folder, local_files_only=True)
    assert loaded.config.id2label[1] == "B-problem"
    assert AutoTokenizer.from_pretrained(folder, local_files_only=True).is_fast


def worker_of(pid: int) -> int:
    """The one child of a site's process."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    assert len(children) == 1
    return int(children[0])
