"""Private federations over a real Mosquitto: what leaves a site, what it charges, and what a kill -9 leaves of it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from coordinator.records import Accepted
from edge_client.privacy.accounting import epsilon_of
from edge_client.privacy.ledger import LEDGER, Row, charges_of, read_ledger
from mailboat.commands import audit, site, status
from shared.config import FederationConfig
from shared.configfile import load_config
from shared.errors import CorruptError
from shared.faultpoint import VARIABLE
from shared.store import FrameStore
from tests.helpers import run_async
from tests.private_toys import DIE_VARIABLE, RECORDS, PrivateToy, private_site
from tests.toys import toy_coordinator, toy_records, write_toy

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
DELTA = 1e-5
PRIVATE = f"[training]\nbatch_size = 8\n[privacy]\ndelta = {DELTA}\nnoise_multiplier = 1.2\n"


def write(
    root: Path,
    url: str,
    *,
    sites: int = 1,
    versions: int = 3,
    quorum: int = 1,
    deadline_s: float = 30.0,
    steps: int = 0,
) -> None:
    """A private toy federation."""
    write_toy(root, url, sites=sites, versions=versions, quorum=quorum, steps=steps, extra=PRIVATE)
    federation = root / "federation.toml"
    text = federation.read_text().replace("deadline_s = 30.0", f"deadline_s = {deadline_s}")
    federation.write_text(text)
    reseal(root)


def reseal(root: Path) -> None:
    """The plan for a federation.toml that was changed after the toy sealed it."""
    path = root / "coordinator" / "plan.json"
    changed = load_config(root / "federation.toml", FederationConfig).config_sha256
    path.write_text(json.dumps({**json.loads(path.read_text()), "config_sha256": changed}))


def ledger_of(root: Path, name: str = "site-1") -> tuple[Row, ...]:
    """What a site has charged."""
    rows, torn = read_ledger(root / name / LEDGER)
    assert not torn
    return rows


def accepted(root: Path, name: str = "site-1") -> list[Accepted]:
    """A site's updates that the coordinator has."""
    return [record for record in toy_records(root) if isinstance(record, Accepted) and record.site == name]


def live(root: Path) -> dict[str, Any]:
    """The coordinator's live view; empty until there is one."""
    try:
        loaded: dict[str, Any] = json.loads((root / "coordinator" / "status.json").read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return loaded


def cost(root: Path, trainings: int) -> float:
    """The epsilon of so many updates of a toy."""
    charge = PrivateToy(load_config(root / "federation.toml", FederationConfig)).charge
    return epsilon_of([charge.times(trainings)], DELTA)


@pytest.mark.parametrize("steps", [0, 2])
def test_every_update_says_what_was_spent_and_nothing_else(
    steps: int, tmp_path: Path, mosquitto_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Epsilon stands in each update, in status and in audit; neither loss nor score has left the site.

    As much is spent where versions travel as steps.
    """
    write(tmp_path, mosquitto_url, sites=2, quorum=2, steps=steps)
    seen: list[dict[str, float]] = []

    async def watch() -> None:
        while not live(tmp_path).get("finished"):
            seen.extend(each["metrics"] for each in live(tmp_path).get("sites", {}).values())
            await asyncio.sleep(0.02)

    async def everybody() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(toy_coordinator(tmp_path / "coordinator.toml"))
            group.create_task(private_site(tmp_path / "site-1.toml"))
            group.create_task(private_site(tmp_path / "site-2.toml"))
            group.create_task(watch())

    run_async(everybody(), timeout_s=90)
    updates = FrameStore(tmp_path / "coordinator" / "updates")
    told = {}
    for record in accepted(tmp_path):
        stored = updates.get(record.update_id)
        assert stored is not None
        told[record.base_version] = stored.manifest.update.metrics
    assert sorted(told) == [0, 1, 2]
    for version, metrics in told.items():
        assert metrics == {
            "steps": 5.0,
            "epsilon": pytest.approx(cost(tmp_path, version + 1)),
            "delta": DELTA,
            "charges": version + 1.0,
        }
    assert {record.examples for record in accepted(tmp_path)} == {RECORDS}
    assert all(set(metrics) <= {"steps", "epsilon", "delta", "charges"} for metrics in seen)
    capsys.readouterr()  # the log
    status.status(config=tmp_path / "coordinator.toml", as_json=True)
    sites = json.loads(capsys.readouterr().out)["sites"]
    assert [(each["epsilon"], each["delta"]) for each in sites] == [(pytest.approx(cost(tmp_path, 3)), DELTA)] * 2
    status.status(config=tmp_path / "coordinator.toml")
    shown = capsys.readouterr().out.splitlines()
    (title,) = (line for line in shown if line.startswith("site "))
    assert title.split()[-1] == "epsilon"
    assert [line.split()[-1] for line in shown if line.startswith("site-")] == [f"{cost(tmp_path, 3):.3g}"] * 2
    audit.show(accepted(tmp_path)[-1].update_id, config=tmp_path / "coordinator.toml")
    assert f"epsilon {cost(tmp_path, 3):.4g} at delta {DELTA:g} by then" in capsys.readouterr().out


def test_past_its_budget_a_site_stays_and_does_not_train(tmp_path: Path, mosquitto_url: str) -> None:
    """It is held, says so, goes on pulling states to the last one, and leaves in good order; the other goes on."""
    write(tmp_path, mosquitto_url, sites=2, versions=5, deadline_s=5.0)
    budget = (cost(tmp_path, 2) + cost(tmp_path, 3)) / 2
    path = tmp_path / "site-1.toml"
    path.write_text(path.read_text() + f"[privacy]\nbudget_epsilon = {budget}\n")
    held: list[int] = []

    async def watch() -> None:
        while not live(tmp_path).get("finished"):
            mine = live(tmp_path).get("sites", {}).get("site-1", {})
            if mine.get("phase") == "held":
                assert mine["metrics"]["epsilon"] == pytest.approx(cost(tmp_path, 2))
                held.append(live(tmp_path)["version"])
            await asyncio.sleep(0.02)

    async def everybody() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(toy_coordinator(tmp_path / "coordinator.toml"))
            group.create_task(private_site(path))
            group.create_task(private_site(tmp_path / "site-2.toml"))
            group.create_task(watch())

    run_async(everybody(), timeout_s=90)
    assert len(ledger_of(tmp_path)) == len(accepted(tmp_path)) == 2
    assert len(accepted(tmp_path, "site-2")) == 5
    assert held
    states = FrameStore(tmp_path / "site-1" / "states")
    pulled = [stored.manifest.state.version for each in states.ids() if (stored := states.get(each)) is not None]
    assert max(pulled) == 5


@pytest.mark.parametrize(
    ("environment", "released"),
    [
        ({DIE_VARIABLE: "2"}, True),  # the delta is in the scratch folder, nothing is charged
        ({VARIABLE: "train.after:2"}, False),  # charged, not sealed
        ({VARIABLE: "seal.before:2"}, False),  # charged, its frames written, not sealed
        ({VARIABLE: "seal.after:2"}, True),  # sealed
    ],
    ids=["before-charge", "before-seal", "in-seal", "after-seal"],
)
def test_kill_9_never_undercounts(
    tmp_path: Path, mosquitto_url: str, environment: dict[str, str], *, released: bool
) -> None:
    """Killed around its second charge and started again, each update names a row, and no row is of two updates.

    What was charged and not sealed is charged again; what was not charged had not left the scratch folder.
    """
    write(tmp_path, mosquitto_url)
    command = [sys.executable, "-m", "tests.private_toys", str(tmp_path / "site-1.toml")]

    async def everybody() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(toy_coordinator(tmp_path / "coordinator.toml"))
            for extra, ends in ((environment, -signal.SIGKILL), ({}, 0)):
                process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, env={**os.environ, **extra})
                assert await process.wait() == ends

    run_async(everybody(), timeout_s=100)
    rows, updates = ledger_of(tmp_path), accepted(tmp_path)
    assert len(updates) == 3
    assert len(rows) == (3 if released else 4)
    assert [row.base_version for row in rows] == ([0, 1, 2] if released else [0, 1, 1, 2])
    kept = FrameStore(tmp_path / "coordinator" / "updates")
    named = []
    for update in updates:
        stored = kept.get(update.update_id)
        assert stored is not None
        metrics = stored.manifest.update.metrics
        number = int(metrics["charges"])
        assert rows[number - 1].base_version == update.base_version
        assert metrics["epsilon"] == pytest.approx(epsilon_of(charges_of(rows[:number]), DELTA))
        named.append(number)
    assert named == ([1, 2, 3] if released else [1, 3, 4])
    assert not list((tmp_path / "site-1" / "work").iterdir())


def test_a_ledger_that_was_deleted_stops_the_site(
    tmp_path: Path, mosquitto_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It does not begin to count from nothing, and fsck says what is wrong."""
    write(tmp_path, mosquitto_url, versions=2)

    async def everybody() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(toy_coordinator(tmp_path / "coordinator.toml"))
            group.create_task(private_site(tmp_path / "site-1.toml"))

    run_async(everybody(), timeout_s=60)
    site.fsck(config=tmp_path / "site-1.toml")
    assert "privacy   2 trainings charged" in capsys.readouterr().out
    (tmp_path / "site-1" / LEDGER).unlink()
    with pytest.raises(CorruptError, match="an update names row 2"):
        run_async(private_site(tmp_path / "site-1.toml"))
    with pytest.raises(CorruptError, match="short-ledger"):
        site.fsck(config=tmp_path / "site-1.toml")
    assert not (tmp_path / "site-1" / LEDGER).exists()
