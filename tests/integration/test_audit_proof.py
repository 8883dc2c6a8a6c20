"""Proving, recomputing and handing over runs that real sites and a real coordinator made over a real Mosquitto."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from broker.launcher import find_mosquitto, run_broker
from coordinator.journal import Journal
from coordinator.records import Accepted, VersionCommitted
from tests.audited import spoilt
from tests.commands import call, refused
from tests.helpers import run_async
from tests.toys import toy_coordinator, toy_site, write_toy

MODES = ["sync", "fedbuff", "fedasync"]
VERSIONS = 3
SITES = (1, 2, 3)
ONE_MODE = pytest.mark.parametrize("run", ["fedbuff"], indirect=True)
MOMENTUM = '[aggregation.server]\noptimizer = "momentum"\nlr = 0.7\n'
FADAS = '[aggregation.server]\noptimizer = "fadas"\n'
EXTRA = {"sync": MOMENTUM, "fedbuff": FADAS, "fedasync": ""}


@asynccontextmanager
async def _everything(root: Path, mode: str) -> AsyncIterator[None]:
    async with run_broker("mosquitto", root / "mosquitto") as broker:
        write_toy(root, broker.url, sites=3, versions=VERSIONS, mode=mode, quorum=3, extra=EXTRA[mode])
        async with asyncio.TaskGroup() as group:
            group.create_task(toy_coordinator(root / "coordinator.toml"))
            for number in SITES:
                # Sites of different size and speed: weights differ, and some updates come late.
                path = root / f"site-{number}.toml"
                group.create_task(toy_site(path, step=0.1 * number, seconds=0.05 * number, examples=7 * number))
        yield


@pytest.fixture(scope="module", params=MODES)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a complete run in each mode, with slots at the server if there are any; no test changes it."""
    if find_mosquitto() is None:
        pytest.skip("Mosquitto is not installed: apt-get install mosquitto")
    root = tmp_path_factory.mktemp(request.param)

    async def to_the_end() -> None:
        async with _everything(root, request.param):
            pass

    run_async(to_the_end(), timeout_s=60)
    return root


def _receipts() -> list[str]:
    return [word for number in SITES for word in ("--receipts", f"site-{number}/receipts")]


def _records(root: Path) -> list[object]:
    with Journal.open_read(root / "coordinator" / "journal.sqlite") as journal:
        return list(journal.replay())


def test_nothing_is_wrong_with_what_they_left(run: Path) -> None:
    """Journal, trail, files and the receipts of all sites agree."""
    accepted = sum(isinstance(record, Accepted) for record in _records(run))
    done = call(run, "audit", "verify", *_receipts(), "--json")
    assert done.returncode == 0, done.stdout
    told = json.loads(done.stdout)
    assert (told["version"], told["updates"], told["findings"]) == (VERSIONS, accepted, [])
    assert told["receipts"] >= sum(len(each.contributions) for each in _versions(run))


def _versions(root: Path) -> list[VersionCommitted]:
    return [record for record in _records(root) if isinstance(record, VersionCommitted)]


def test_a_fresh_process_computes_the_same_versions(run: Path, tmp_path: Path) -> None:
    """`replay --all` ends with status 0, says so for each version, and leaves nothing behind."""
    done = call(run, "audit", "replay", "--all", "--scratch", str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert [line.split("  ")[0] for line in lines] == [f"version {v} of {VERSIONS}" for v in range(VERSIONS + 1)]
    assert all(line.endswith("the same, bit for bit") for line in lines)
    assert list(tmp_path.iterdir()) == []


@ONE_MODE
def test_a_copy_of_the_folder_is_enough(run: Path, tmp_path: Path) -> None:
    """On another machine: the storage folder and federation.toml, inside or beside, and no coordinator.toml."""
    shutil.copytree(run / "coordinator", tmp_path / "copy")
    shutil.copy(run / "federation.toml", tmp_path)
    done = call(tmp_path, "audit", "replay", "--version", "1", "--storage", "copy", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["same"], [each["version"] for each in told["versions"]]) == (True, [0, 1])
    (tmp_path / "federation.toml").rename(tmp_path / "copy" / "federation.toml")
    done = call(tmp_path, "audit", "verify", "--storage", "copy")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "nothing is wrong"


@ONE_MODE
def test_a_changed_bit_is_told_with_status_3(run: Path) -> None:
    """A bit of a kept update: `verify` lists it, `replay` ends at its version, and both name update and frame."""
    version = _versions(run)[1]
    name = f"updates/{version.contributions[0].update_id}.frames"
    with spoilt(run / "coordinator" / name, 8 * 40):
        done = call(run, "audit", "verify", "--json")
        assert done.returncode == 3
        assert [each["where"] for each in json.loads(done.stdout)["findings"]] == [f"{name}: frame 0"]
        said = refused(run, "audit", "replay", status=3)
    assert f"version {version.version} differs: {name}: frame 0" in said


@ONE_MODE
def test_an_outsider_checks_the_bundle(run: Path, tmp_path: Path) -> None:
    """The exported file is checked by its own script, alone; what lies under its name is not overwritten."""
    done = call(run, "audit", "export", "--out", str(tmp_path / "run.tar"))
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["sha256", "last"]
    with tarfile.open(tmp_path / "run.tar") as tar:
        tar.extractall(tmp_path, filter="data")
    script = tmp_path / f"toy-v{VERSIONS:08d}" / "verify.py"
    done = subprocess.run([sys.executable, "-I", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "already there" in refused(run, "audit", "export", "--out", str(tmp_path / "run.tar"), status=2)


@ONE_MODE
def test_a_site_that_holds_a_receipt_is_heard(run: Path, tmp_path: Path) -> None:
    """A receipt for an update that no row knows is told, by its file."""
    folder = tmp_path / "site-1" / "receipts"
    shutil.copytree(run / "site-1" / "receipts", folder)
    first = min(folder.glob("*.json"))
    other = folder / f"{'ab' * 16}.json"
    other.write_text(json.dumps({**json.loads(first.read_text()), "update_id": other.stem}))
    said = refused(run, "audit", "verify", "--receipts", str(folder), status=3)
    assert f"site-1/receipts/{other.name}: the site was told" in said
    assert "receipt-unknown-update" in said


@ONE_MODE
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["replay", "--all", "--version", "1"], "--all and --version"),
        (["replay", "--version", "99"], "there is no version 99"),
        (["verify", "--receipts", "nowhere"], "nowhere is not a folder"),
        (["verify", "--storage", "site-1/receipts"], "site-1/federation.toml: no such file"),
    ],
)
def test_wrong_words_are_told(run: Path, words: list[str], said: str) -> None:
    """What cannot be done as asked ends with status 2 and says why."""
    assert said in refused(run, "audit", *words, status=2)
