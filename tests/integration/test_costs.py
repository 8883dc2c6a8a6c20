"""What a run costs, counted and not timed: a change that makes it dearer fails here on any machine.

Six versions of noise that no compressor makes smaller, over a real Mosquitto; all ends in this process, so that their
syncs are counted together. Bounds are what was counted, and a little for what depends on the moment: how many chunks
one sync of the disk covers, and a status each second.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from bench.goodput import NoiseTrainer
from coordinator import core, service
from edge_client import agent
from shared import durable
from shared.link import Link, LinkOptions
from shared.manifest import Manifest, manifest_from_bytes
from tests.helpers import run_async
from tests.toys import toy_coordinator, toy_site, write_toy

VERSIONS = 6
CHUNKS = 13
"""Of 64 KiB, in 800 kB."""


class Costs:
    """Everything that was counted in one run, for each version."""

    def __init__(self, root: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        links: list[Link] = []

        def make_link(options: LinkOptions) -> Link:
            links.append(Link(options))
            return links[-1]

        syncs = durable.SyncCount()
        with monkeypatch.context() as patched:
            patched.setattr(durable, "SYNCS", syncs)
            patched.setattr(agent, "Link", make_link)
            write_toy(root, url, sites=1, versions=VERSIONS, parameters=200_000, link="")
            began = time.monotonic()
            run_async(_run(root), timeout_s=90)
            self.seconds = time.monotonic() - began
        (link,) = links
        self.counters = link.counters
        self.file_syncs = syncs.files / VERSIONS
        self.folder_syncs = syncs.folders / VERSIONS
        self.updates = [_manifest(path) for path in (root / "coordinator" / "updates").glob("*.manifest")]


async def _run(root: Path) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(toy_coordinator(root / "coordinator.toml"))
        group.create_task(toy_site(root / "site-1.toml", trainer=NoiseTrainer(0)))


def _manifest(path: Path) -> Manifest:
    return manifest_from_bytes(path.read_bytes())


def test_a_version_costs_what_it_did(tmp_path: Path, mosquitto_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes beyond the updates themselves, packets beyond their chunks, and syncs of the disk stay few."""
    costs = Costs(tmp_path, mosquitto_url, monkeypatch)
    assert [update.frames for update in costs.updates] == [CHUNKS] * VERSIONS
    assert costs.counters.reconnects == 0
    updates, a_status = sum(update.wire_bytes for update in costs.updates), 1 + costs.seconds
    # Headers, topics, manifests, acknowledgements, and a status of some 600 bytes each second; counted: 16 kB.
    assert costs.counters.bytes_sent - updates <= 0.005 * updates + 1_000 * a_status
    # Hello, offer, presence, and a bitmap for each batch of a state's chunks on the disk, at worst for each chunk;
    # counted: 3.5 a version.
    assert costs.counters.packets_sent - VERSIONS * CHUNKS <= VERSIONS * (CHUNKS + 6) + a_status
    # Two transfers sealed, two received in batches, at worst of one chunk each, master, journal, receipt, heads;
    # counted: 21 to 24, and 19.7 folders.
    assert costs.file_syncs <= 2 * CHUNKS + 12
    assert costs.folder_syncs <= 24


async def _crowd(root: Path, sites: int) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(toy_coordinator(root / "coordinator.toml"))
        for number in range(1, sites + 1):
            group.create_task(toy_site(root / f"site-{number}.toml", trainer=NoiseTrainer(number)))


def test_a_state_leaves_once_for_all_sites(tmp_path: Path, mosquitto_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three sites go in step: the coordinator sends little more than one of them hears, and not three times that."""
    links: list[Link] = []

    def make_link(options: LinkOptions) -> Link:
        links.append(Link(options))
        return links[-1]

    monkeypatch.setattr(service, "Link", make_link)
    monkeypatch.setattr(core, "DOWNLINK_MERGE_S", 10.0)  # however late a busy machine makes one of them
    write_toy(tmp_path, mosquitto_url, sites=3, versions=VERSIONS, parameters=400_000, link="window = 4\n")
    run_async(_crowd(tmp_path, 3), timeout_s=120)
    (link,) = links
    states = [_manifest(path) for path in (tmp_path / "coordinator" / "states").glob("*.manifest")]
    assert min(state.frames for state in states) >= 25, "many windows"
    assert link.counters.reconnects == 0
    # Counted: 1.01.
    assert link.counters.bytes_sent <= 1.1 * sum(state.wire_bytes for state in states)
