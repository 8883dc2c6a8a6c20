"""Whole runs over a real Mosquitto with real disks, in one process and as processes that are killed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from coordinator import aggregate
from coordinator.journal import Journal
from coordinator.merging import MergeResult
from coordinator.records import Finished, Record, Rejected, VersionCommitted
from edge_client.agent import Agent
from edge_client.outbox import Outbox
from edge_client.residual import Build
from edge_client.session import Identity
from mailboat.flaky import Conditions, FlakyProxy
from shared.config import FederationConfig, SiteConfig
from shared.configfile import load_config
from shared.errors import RefusedError, UnavailableError
from shared.ids import new_session_id
from shared.link.endpoints import parse_endpoints
from shared.manifest import Manifest
from shared.plan import load_plan
from shared.slices import FrameWriter
from tests.helpers import run_async, until
from tests.toys import INITIAL, ToyTrainer, toy_coordinator, toy_site, write_toy


def _records(root: Path) -> list[Record]:
    with Journal.open_read(root / "coordinator" / "journal.sqlite") as journal:
        return list(journal.replay())


def _versions(root: Path) -> list[VersionCommitted]:
    return [record for record in _records(root) if isinstance(record, VersionCommitted)]


@pytest.mark.parametrize("mode", ["sync", "fedbuff", "fedasync"])
def test_three_sites_reach_the_last_version(mode: str, tmp_path: Path, mosquitto_url: str) -> None:
    """In every mode the run ends for all, each update counts once, and the arithmetic is right."""
    write_toy(tmp_path, mosquitto_url, sites=3, versions=4, mode=mode, quorum=3)

    async def everybody() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(toy_coordinator(tmp_path / "coordinator.toml"))
            for number in (1, 2, 3):
                group.create_task(toy_site(tmp_path / f"site-{number}.toml"))

    run_async(everybody(), timeout_s=60)
    versions = _versions(tmp_path)
    assert [version.version for version in versions] == [1, 2, 3, 4]
    counted = [part.update_id for version in versions for part in version.contributions]
    assert len(counted) == len(set(counted))
    assert sum(isinstance(record, Finished) for record in _records(tmp_path)) == 1
    if mode == "sync":
        master = load_file(tmp_path / "coordinator" / "masters" / "v00000004.safetensors")
        for values in master.values():
            np.testing.assert_allclose(values, INITIAL + 4.0)


def test_two_processes_under_one_name_the_second_is_refused(tmp_path: Path, mosquitto_url: str) -> None:
    """The site that came second is refused under the rule duplicate-site, and the first goes on to the end."""
    write_toy(tmp_path, mosquitto_url, sites=2, versions=6, link="")  # whoever is silent for a while has left

    async def everybody() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(toy_coordinator(tmp_path / "coordinator.toml"))
            group.create_task(toy_site(tmp_path / "site-1.toml", seconds=1.0))
            while not list((tmp_path / "site-1" / "states").glob("*.manifest")):  # noqa: ASYNC110 - files have no event
                await asyncio.sleep(0.01)  # until then the second might be the first
            twin = (tmp_path / "site-1.toml").read_text().replace('storage = "site-1"', 'storage = "twin"')
            (tmp_path / "twin.toml").write_text(twin)
            with pytest.raises(RefusedError, match="site-1") as refused:
                await toy_site(tmp_path / "twin.toml", seconds=1.0)
            assert refused.value.rule == "duplicate-site"

    run_async(everybody(), timeout_s=60)
    assert len(_versions(tmp_path)) == 6


def test_what_a_crash_left_of_a_rejected_update_goes(tmp_path: Path, mosquitto_url: str) -> None:
    """A coordinator that died between rejecting an update and deleting its bytes deletes them when it is back."""
    write_toy(tmp_path, mosquitto_url, sites=1, versions=1)
    storage = tmp_path / "coordinator"
    rejected, unknown = "ab" * 16, "cd" * 16

    async def serve_once() -> None:
        (storage / "status.json").unlink(missing_ok=True)
        serving = asyncio.create_task(toy_coordinator(tmp_path / "coordinator.toml"))
        async with asyncio.timeout(20):
            while not (storage / "status.json").exists():  # noqa: ASYNC110 - a file
                await asyncio.sleep(0.01)
        serving.cancel()
        await asyncio.wait([serving])

    run_async(serve_once())
    with contextlib.closing(Journal(storage / "journal.sqlite")) as journal:
        journal.append([Rejected(rejected, "site-1", "0" * 64, "wrong-shape", "tensor w", 1.0)])
    for update_id in (rejected, unknown):
        for suffix in ("frames", "part.manifest"):
            (storage / "updates" / f"{update_id}.{suffix}").write_bytes(b"x")
    run_async(serve_once())
    assert {path.name.split(".")[0] for path in (storage / "updates").iterdir()} == {unknown}


class SlowOutbox(Outbox):
    """Seals only when it may."""

    may = threading.Event()

    def seal(
        self,
        frames: FrameWriter,
        build: Build,
        left: tuple[FrameWriter, Build] | None = None,
        own: Path | None = None,
    ) -> Manifest:
        """As ever, but later."""
        assert self.may.wait(30)
        return super().seal(frames, build, left, own)


def test_an_update_being_sealed_when_the_run_ends_gets_its_answer(tmp_path: Path, mosquitto_url: str) -> None:
    """A site does not leave with an update in its outbox that the coordinator has not spoken about."""
    write_toy(tmp_path, mosquitto_url, sites=2, versions=1, mode="fedasync")
    config = load_config(tmp_path / "site-2.toml", SiteConfig)
    federation = load_config(config.federation, FederationConfig)
    plan = load_plan(tmp_path / "coordinator" / "plan.json", federation)
    me = Identity("site-2", new_session_id(), plan.fingerprint, plan.config_sha256, plan.frozen_sha256, "toy")
    outbox = SlowOutbox(config.storage)
    slow = Agent(config, federation, me, outbox, ToyTrainer(step=1.0, seconds=0.0, examples=1))

    async def everybody() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(toy_coordinator(tmp_path / "coordinator.toml"))
            leaving = group.create_task(slow.run())
            while slow.session.training is None:  # noqa: ASYNC110 - the agent says nothing of it
                await asyncio.sleep(0.01)
            group.create_task(toy_site(tmp_path / "site-1.toml"))
            session = slow.session
            while not (session.announced and session.announced.final and session.pulls.pull is None):  # noqa: ASYNC110 - nor of that
                await asyncio.sleep(0.01)
            await asyncio.wait([leaving], timeout=1.0)  # it must not leave yet
            outbox.may.set()

    run_async(everybody(), timeout_s=60)
    (receipt,) = (tmp_path / "site-2" / "receipts").glob("*.json")
    assert json.loads(receipt.read_bytes())["rule"] == "run-complete"
    assert not list((tmp_path / "site-2" / "outbox").iterdir())


def test_kill_9_of_site_and_coordinator_in_mid_upload(tmp_path: Path, mosquitto_url: str) -> None:
    """Killed while an update is half there, both come back: the run ends, nothing is lost, nothing counts twice.

    The sites' lines run in this process, so no upload comes to its end between two looks at it.
    """

    async def start(role: str, name: str) -> asyncio.subprocess.Process:
        command = (sys.executable, "-m", "tests.toys", role, str(tmp_path / f"{name}.toml"))
        return await asyncio.create_subprocess_exec(*command, cwd=Path(__file__).parents[2])

    async def scenario() -> None:
        (place,) = parse_endpoints(mosquitto_url)
        async with FlakyProxy(place.host, place.port, conditions=Conditions(bytes_per_s=2_000_000)) as line:
            urls = {"site-1": line.url, "site-2": line.url}
            write_toy(tmp_path, mosquitto_url, sites=2, versions=3, parameters=500_000, quorum=2, urls=urls)
            running = {"coordinator": await start("coordinator", "coordinator")}
            running |= {name: await start("site", name) for name in urls}
            try:
                await until(lambda: bool(list(tmp_path.glob("coordinator/updates/*.part.manifest"))))
                for name, role in (("site-1", "site"), ("coordinator", "coordinator")):
                    running[name].kill()
                    await running[name].wait()
                    running[name] = await start(role, name)
                assert [await process.wait() for process in running.values()] == [0, 0, 0]
            finally:
                for process in running.values():
                    with contextlib.suppress(ProcessLookupError):
                        process.kill()
                    await process.wait()

    run_async(scenario(), timeout_s=90)
    versions = _versions(tmp_path)
    assert [version.version for version in versions] == [1, 2, 3]
    counted = [part.update_id for version in versions for part in version.contributions]
    assert len(counted) == len(set(counted))
    sealed = {path.stem for number in (1, 2) for path in (tmp_path / f"site-{number}" / "receipts").glob("*.json")}
    assert set(counted) <= sealed
    assert not [left for number in (1, 2) for left in (tmp_path / f"site-{number}" / "outbox").iterdir()]


def test_a_coordinator_told_to_stop_keeps_its_lock_until_its_merge_has_ended(
    tmp_path: Path, mosquitto_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one is refused until then, begins on what the merge left, and reaches the last version."""
    write_toy(tmp_path, mosquitto_url, sites=1, versions=3)
    merging, may_end = threading.Event(), threading.Event()

    def merge(*arguments: Any) -> MergeResult:
        merging.set()
        assert may_end.wait(60)
        return whole(*arguments)

    whole = aggregate.merge
    monkeypatch.setattr(aggregate, "merge", merge)

    async def everybody() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(toy_site(tmp_path / "site-1.toml"))
            first = asyncio.create_task(toy_coordinator(tmp_path / "coordinator.toml"))
            await until(merging.is_set)
            first.cancel()
            _, waiting = await asyncio.wait([first], timeout=1.0)
            assert waiting
            with pytest.raises(UnavailableError, match="another coordinator runs there"):
                await toy_coordinator(tmp_path / "coordinator.toml")
            may_end.set()
            await asyncio.wait([first])
            assert first.cancelled()
            group.create_task(toy_coordinator(tmp_path / "coordinator.toml"))

    run_async(everybody(), timeout_s=60)
    assert [version.version for version in _versions(tmp_path)] == [1, 2, 3]
