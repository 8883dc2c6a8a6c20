"""A hospital's own task: the package of docs/tasks.md, installed in a folder, in a federation of real processes."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from coordinator.journal import Journal
from coordinator.records import Accepted, VersionCommitted
from mailboat.commands.init import init
from tests.commands import refused, running
from tests.unit.edge_client import tiny

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
SLOW_S = 240.0
STATES = {"never": "has never smoked", "former": "gave up smoking", "current": "smokes a pack"}
_FILE = re.compile(r"^`(?P<name>[\w./]+)`\n\n```\w+\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture
def site_packages(tmp_path: Path) -> Path:
    """A folder that holds the package of the page as pip would install it: its modules, and what describes them."""
    page = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
    files = {found["name"]: found["text"] for found in _FILE.finditer(page)}
    assert set(files) == {"pyproject.toml", "acme_smoking.py"}
    project = tomllib.loads(files["pyproject.toml"])["project"]
    folder = tmp_path / "site-packages"
    info = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir(parents=True)
    (folder / "acme_smoking.py").write_text(files["acme_smoking.py"])
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    groups = [
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in entries.items())
        for group, entries in project["entry-points"].items()
    ]
    (info / "entry_points.txt").write_text("\n".join(groups))
    return folder


@pytest.fixture
def folder(tmp_path: Path, mosquitto_url: str) -> Path:
    """Two sites with notes of their own kind, and a federation whose file names their task."""
    model = tiny.save_model(tmp_path / "model", "llama")
    init(tmp_path, name="smoke", model=str(model), broker=mosquitto_url, sites=2)
    path = tmp_path / "federation.toml"
    text = path.read_text()
    for old, new in (
        ('# kind = "ner"', 'kind = "smoking"'),
        ('labels = ["problem", "treatment", "test"]', f"labels = {json.dumps(list(STATES))}"),
        ("# max_length = 192", "max_length = 48"),
        ('plan = "top:6"', 'plan = "top:2"'),
        ("versions = 10", "versions = 2"),
        ("# quorum = 1", "quorum = 2"),
    ):
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    draw = random.Random(0)
    for name in ("site-1", "site-2", "heldout"):
        (tmp_path / "notes" / name).mkdir(parents=True)
        states = [draw.choice(list(STATES)) for _ in range(12)]
        rows = [f"{name}-{n}\t{state}\tpatient was noted , {STATES[state]} today" for n, state in enumerate(states)]
        (tmp_path / "notes" / name / "notes.tsv").write_text("\n".join(rows) + "\n")
    return tmp_path


def test_a_task_that_mailboat_does_not_know_runs_by_its_name(folder: Path, site_packages: Path) -> None:
    """Two sites train on notes of their own format, every update counts, and the model is scored by its own measure."""
    path = os.pathsep.join((str(ROOT), str(site_packages)))
    with (
        running(folder, "coordinator", "run", PYTHONPATH=path) as coordinator,
        running(folder, "site", "run", "--config", "site-1.toml", PYTHONPATH=path) as first,
        running(folder, "site", "run", "--config", "site-2.toml", PYTHONPATH=path) as second,
    ):
        coordinator.wait_for('"event": "finished"', SLOW_S)
        assert "LlamaForSequenceClassification" in coordinator.text()
        assert (first.process.wait(SLOW_S), second.process.wait(SLOW_S)) == (0, 0)
        assert "current_recall=" in first.text() or '"current_recall"' in first.text()
        assert coordinator.end(signal.SIGTERM) == 0
    with Journal.open_read(folder / "coordinator-storage" / "journal.sqlite") as journal:
        records = list(journal.replay())
    accepted = [record for record in records if isinstance(record, Accepted)]
    versions = [record for record in records if isinstance(record, VersionCommitted)]
    assert [record.version for record in versions] == [1, 2]
    assert sorted((update.site, update.base_version, update.examples) for update in accepted) == [
        (site, version, 11) for site in ("site-1", "site-2") for version in (0, 1)
    ]
    scored = subprocess.run(
        [sys.executable, "-m", "mailboat", "evaluate", "--notes", "notes/heldout", "--json"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
        timeout=SLOW_S,
    )
    told = json.loads(scored.stdout)
    assert {"micro_f1", "macro_f1", "current_recall"} <= told.keys()
    assert told["labels"].keys() == STATES.keys()


def test_a_site_without_the_package_is_told_what_is_missing(folder: Path) -> None:
    """Where the task is not installed the site ends with 2 and lists the tasks that are."""
    said = refused(folder, "site", "run", "--config", "site-1.toml", status=2, timeout_s=SLOW_S)
    assert "task.kind = 'smoking': no such task is installed here; known: " in said
    assert "multilabel" in said


def test_a_bad_line_of_a_package_s_own_format_is_named_and_never_quoted(folder: Path, site_packages: Path) -> None:
    """A reader that a hospital wrote gets the same messages: file and line, and nothing of the note."""
    notes = folder / "notes" / "site-1" / "notes.tsv"
    notes.write_text(notes.read_text() + "site-1-x\tpatient Example smokes\n")
    path = os.pathsep.join((str(ROOT), str(site_packages)))
    with running(folder, "site", "run", "--config", "site-1.toml", PYTHONPATH=path) as site:
        assert site.process.wait(SLOW_S) == 3
        assert "notes.tsv, line 13: not id, status and text" in site.text()
        assert "Example" not in site.text()
