"""Disks that fill up or rot in mid-run, over a real Mosquitto: nothing ends or is lost, all goes on by itself."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import subprocess
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from coordinator import admission
from coordinator.disk import Disk
from coordinator.records import Accepted, VersionCommitted
from shared import room
from shared.errors import NoRoomError
from shared.plan import SealedPlan
from shared.store import FrameStore, Stored
from tests.helpers import run_async
from tests.toys import toy_coordinator, toy_records, toy_site, write_toy

POLL_S = 0.02


async def until(condition: Callable[[], bool]) -> None:
    """Wait until something is so."""
    while not condition():  # noqa: ASYNC110 - files of another process tell it
        await asyncio.sleep(POLL_S)


def status(root: Path) -> dict[str, Any]:
    """The coordinator's live view; empty until there is one."""
    try:
        loaded: dict[str, Any] = json.loads((root / "coordinator" / "status.json").read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return loaded


def counted(root: Path) -> list[str]:
    """Updates in versions, in order; asserts that each is there once, and that each accepted one is."""
    records = toy_records(root)
    parts = [part.update_id for each in records if isinstance(each, VersionCommitted) for part in each.contributions]
    assert len(parts) == len(set(parts))
    assert set(parts) == {each.update_id for each in records if isinstance(each, Accepted)}
    return parts


async def beside(root: Path, story: Coroutine[Any, Any, None]) -> None:
    """A coordinator, one site and a story until all are done."""
    async with asyncio.TaskGroup() as group:
        group.create_task(toy_coordinator(root / "coordinator.toml"))
        group.create_task(toy_site(root / "site-1.toml"))
        group.create_task(story)


def test_a_full_coordinator_takes_nothing_and_goes_on_when_there_is_room(
    tmp_path: Path, mosquitto_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The site keeps its update sealed and waits; status says why; with room again the run ends with all counted."""
    write_toy(tmp_path, mosquitto_url, sites=1, versions=2)
    full = True
    free = room.free_bytes
    monkeypatch.setattr(
        room, "free_bytes", lambda folder: 0 if full and "coordinator" in folder.parts else free(folder)
    )

    async def story() -> None:
        nonlocal full
        await until(lambda: "stay free" in status(tmp_path).get("held", ""))
        assert len(FrameStore(tmp_path / "site-1" / "outbox").ids()) == 1
        assert not any(isinstance(record, Accepted) for record in toy_records(tmp_path))
        full = False
        await until(lambda: status(tmp_path).get("held", "?") == "")

    run_async(beside(tmp_path, story()), timeout_s=120)
    assert len(counted(tmp_path)) == 2


def test_a_full_site_does_not_train_and_goes_on_when_there_is_room(
    tmp_path: Path, mosquitto_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its status says held; nothing is trained that could not be sealed."""
    write_toy(tmp_path, mosquitto_url, sites=1, versions=1)
    full = True
    free = room.free_bytes
    monkeypatch.setattr(room, "free_bytes", lambda folder: 0 if full and "site-1" in folder.parts else free(folder))

    async def story() -> None:
        nonlocal full
        await until(lambda: status(tmp_path).get("sites", {}).get("site-1", {}).get("phase") == "held")
        assert FrameStore(tmp_path / "site-1" / "outbox").ids() == []
        full = False

    run_async(beside(tmp_path, story()), timeout_s=120)
    assert len(counted(tmp_path)) == 1


def test_an_update_that_rots_on_arrival_is_sent_again(
    tmp_path: Path, mosquitto_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The coordinator's disk spoils a frame before it is verified: no record, no end, and the second copy counts."""
    write_toy(tmp_path, mosquitto_url, sites=1, versions=1)
    verify = admission.verify
    spoilt: list[str] = []

    def spoil_first(stored: Stored, plan: SealedPlan) -> admission.Admitted:
        if not spoilt:
            spoilt.append(stored.manifest.transfer_id)
            data = bytearray(stored.path.read_bytes())
            data[len(data) // 2] ^= 1
            stored.path.write_bytes(bytes(data))
        return verify(stored, plan)

    monkeypatch.setattr(admission, "verify", spoil_first)
    run_async(beside(tmp_path, asyncio.sleep(0)), timeout_s=120)
    assert counted(tmp_path) == spoilt


def test_a_state_that_rots_at_a_site_is_fetched_again(
    tmp_path: Path, mosquitto_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The site's disk spoils a state before it is trained on: the run ends as it should."""
    write_toy(tmp_path, mosquitto_url, sites=1, versions=1)
    used: list[str] = []
    usual = Stored.plain

    def spoil_first(stored: Stored) -> Any:
        used.append(stored.manifest.transfer_id)
        if len(used) == 1:
            data = bytearray(stored.path.read_bytes())
            data[len(data) // 2] ^= 1
            stored.path.write_bytes(bytes(data))
        return usual(stored)

    monkeypatch.setattr(Stored, "plain", spoil_first)
    run_async(beside(tmp_path, asyncio.sleep(0)), timeout_s=120)
    assert len(counted(tmp_path)) == 1
    assert used[0] == used[1]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system of 8 MiB; skipped where one may not be mounted."""
    folder = tmp_path / "coordinator"
    folder.mkdir()
    mount, umount = shutil.which("mount"), shutil.which("umount")
    if mount is None or umount is None:
        pytest.skip("no mount command")
    done = subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"a small file system may not be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run([umount, "-l", str(folder)], check=True)


def test_a_disk_that_is_really_full_ends_nothing(
    small_disk: Path, tmp_path: Path, mosquitto_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between acceptance and merge another program takes all that is left: the version is made when it lets go."""
    write_toy(tmp_path, mosquitto_url, sites=2, versions=1, quorum=2)
    config = tmp_path / "coordinator.toml"
    config.write_text(config.read_text().replace("min_free_mib = 1", "min_free_mib = 0"))
    ballast = small_disk / "ballast"
    held: list[NoRoomError] = []
    hold = Disk.hold

    def noted(disk: Disk, error: NoRoomError, needed: int = 0) -> None:
        held.append(error)
        hold(disk, error, needed)

    monkeypatch.setattr(Disk, "hold", noted)

    def fill() -> None:
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    async def story(group: asyncio.TaskGroup) -> None:
        await until(lambda: any(isinstance(record, Accepted) for record in recorded()))
        await asyncio.to_thread(fill)
        group.create_task(toy_site(tmp_path / "site-2.toml"))
        await until(lambda: len(FrameStore(tmp_path / "site-2" / "outbox").ids()) == 1)
        await until(lambda: bool(held))
        assert not any(isinstance(record, VersionCommitted) for record in recorded())
        ballast.unlink()

    def recorded() -> list[Any]:
        return toy_records(tmp_path) if (small_disk / "journal.sqlite").exists() else []

    async def scenario() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(toy_coordinator(config))
            group.create_task(toy_site(tmp_path / "site-1.toml"))
            await story(group)

    run_async(scenario(), timeout_s=120)
    assert len(counted(tmp_path)) == 2
