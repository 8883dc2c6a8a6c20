"""Whole runs over brokers that are not a Mosquitto as we would set it up."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from broker import launcher
from broker.config import local_config
from broker.launcher import find_mosquitto, run_broker
from coordinator.records import Accepted, VersionCommitted
from mailboat.flaky import Conditions, FlakyProxy
from shared.link.endpoints import parse_endpoints
from tests.helpers import run_async
from tests.toys import HASTY, INITIAL, toy_coordinator, toy_records, toy_site, write_toy

pytestmark = pytest.mark.integration

SITES = (1, 2, 3)
VERSIONS = 3
WIDE = "stall_s = 1.0\nbackoff_cap_s = 2.0\nkeepalive_s = 5\nwindow = 8\n"
"""[link] whose window is more than the narrow broker keeps, with impatient time-outs."""


async def _whole_run(root: Path, url: str, *, far: str | None = None, link: str = HASTY) -> None:
    """Sites at `url`, the coordinator there too or at `far`."""
    urls = {"coordinator": far or url}
    write_toy(
        root,
        url,
        sites=len(SITES),
        versions=VERSIONS,
        parameters=200_000,
        quorum=len(SITES),
        slice_kib=64,
        link=link,
        urls=urls,
    )
    async with asyncio.TaskGroup() as group:
        group.create_task(toy_coordinator(root / "coordinator.toml"))
        for number in SITES:
            group.create_task(toy_site(root / f"site-{number}.toml"))


def _assert_complete(root: Path) -> None:
    """Every site is in every version once, all that was accepted is counted, and the sum is right."""
    records = toy_records(root)
    versions = [record for record in records if isinstance(record, VersionCommitted)]
    assert [{part.site for part in version.contributions} for version in versions] == [
        {f"site-{number}" for number in SITES}
    ] * VERSIONS
    counted = [part.update_id for version in versions for part in version.contributions]
    assert sorted(counted) == sorted(record.update_id for record in records if isinstance(record, Accepted))
    assert not list(root.glob("site-*/outbox/*"))
    for values in load_file(root / "coordinator" / "masters" / f"v{VERSIONS:08d}.safetensors").values():
        np.testing.assert_allclose(values, INITIAL + VERSIONS)


def test_a_whole_run_over_the_embedded_broker(tmp_path: Path) -> None:
    """MQTT 3.1.1, sessions in memory: the run ends as it does over Mosquitto."""

    async def scenario() -> None:
        async with run_broker("amqtt", tmp_path / "broker") as broker:
            await _whole_run(tmp_path, broker.url)

    run_async(scenario(), timeout_s=100)
    _assert_complete(tmp_path)


def test_a_broker_that_drops_what_it_cannot_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mosquitto with one message in flight and room for five more, far below a window: it drops, the run ends.

    The coordinator's acknowledgements take a while: a quick one could empty the queue as fast as a site fills it. What
    is dropped may be the word that a site has left.
    """
    if find_mosquitto() is None:
        pytest.skip("Mosquitto is not installed: apt-get install mosquitto")

    def narrow(host: str, port: int) -> str:
        text = re.sub(
            r"^max_inflight_messages .*", "max_inflight_messages 1", local_config(host, port), flags=re.MULTILINE
        )
        return re.sub(r"^max_queued_messages .*", "max_queued_messages 5", text, flags=re.MULTILINE)

    monkeypatch.setattr(launcher, "local_config", narrow)

    async def scenario() -> str:
        async with run_broker("mosquitto", tmp_path / "broker") as broker:
            (place,) = parse_endpoints(broker.url)
            async with FlakyProxy(place.host, place.port, conditions=Conditions(latency_s=0.02)) as proxy:
                await _whole_run(tmp_path, broker.url, far=proxy.url, link=WIDE)
            return broker.log.read_text()

    log = run_async(scenario(), timeout_s=100)
    assert "Outgoing messages are being dropped" in log
    _assert_complete(tmp_path)
