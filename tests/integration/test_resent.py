"""What a cut costs in bytes, counted where the bad link is, over a real Mosquitto with the default link settings."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Literal

import pytest

from bench.goodput import NOISE_BITS, NoiseTrainer, Result, Settings, measure
from broker.launcher import find_mosquitto, run_broker
from coordinator.records import Accepted, VersionCommitted
from mailboat.flaky import Conditions, FlakyProxy
from shared.link.endpoints import parse_endpoints
from tests.helpers import run_async
from tests.toys import toy_coordinator, toy_records, toy_site, write_toy

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(find_mosquitto() is None, reason="Mosquitto is not installed: apt-get install mosquitto"),
]

PAYLOAD = 2_000_000
SLICE_KIB = 16
HEADERS = 0.02
"""Of a transfer in such small chunks, for chunk headers, MQTT, bitmaps and the offer."""
CONTROL_PER_S = 2000
"""Status, its acknowledgement, and pings."""


def assert_little_was_resent(result: Result) -> None:
    """At most one window and 1 % of the transfer for each cut, beyond what the same transfer needs without cuts."""
    needed = result.wire_bytes * (1 + HEADERS) + CONTROL_PER_S * result.taken_s
    resent = result.crossed_bytes - needed
    assert resent <= result.cuts * (result.window_bytes + 0.01 * result.wire_bytes)
    assert result.crossed_bytes >= result.wire_bytes


def assert_counted_once(root: Path) -> None:
    """One update, one version."""
    records = toy_records(root)
    (accepted,) = (record for record in records if isinstance(record, Accepted))
    (version,) = (record for record in records if isinstance(record, VersionCommitted))
    assert [part.update_id for part in version.contributions] == [accepted.update_id]


@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_connection_that_is_cut_after_some_bytes(direction: Literal["up", "down"], tmp_path: Path) -> None:
    """Three connections end in the midst of a chunk: each costs at most a window, up as well as down."""
    settings = Settings(
        direction=direction,
        payload_bytes=PAYLOAD,
        bytes_per_s=500_000,
        cut_every_s=math.inf,
        outage_s=0.0,
        cut_after=(400_000, 500_000, 600_000),
        slice_kib=SLICE_KIB,
    )
    result = run_async(measure(settings, tmp_path), timeout_s=240)
    assert result.cuts == 3
    assert_little_was_resent(result)
    assert_counted_once(tmp_path)


@pytest.mark.parametrize("fault", ["reset", "hole", "down"])
def test_a_link_that_fails_again_and_again(fault: Literal["reset", "hole", "down"], tmp_path: Path) -> None:
    """A slow link with an outage every few seconds, loud or silent: the upload gets through, and little is resent."""
    settings = Settings(
        payload_bytes=PAYLOAD // 2,
        bytes_per_s=250_000,
        cut_every_s=4.0,
        fault=fault,
        outage_s=0.5,
        slice_kib=SLICE_KIB,
        seed=7,
    )
    result = run_async(measure(settings, tmp_path), timeout_s=240)
    assert_little_was_resent(result)
    assert_counted_once(tmp_path)


def test_a_deep_buffer_before_a_slow_line(tmp_path: Path) -> None:
    """A box that takes whole updates at once and needs 2.1 s for a chunk is cut once, in the first of them.

    That doubles the patience to 3 s. A broker that is busy for a second just then costs one cut more, and no third.
    """
    versions, payload = 3, 1_000_000

    async def run() -> tuple[int, int]:
        async with run_broker("mosquitto", tmp_path / "broker") as broker:
            (place,) = parse_endpoints(broker.url)
            slow = Conditions(bytes_per_s=190_000, deep=True)
            async with FlakyProxy(place.host, place.port, conditions=slow) as proxy, asyncio.TaskGroup() as group:
                write_toy(
                    tmp_path,
                    broker.url,
                    sites=1,
                    versions=versions,
                    parameters=payload * 8 // NOISE_BITS,
                    slice_kib=512,
                    link="",
                    urls={"site-1": proxy.url},
                )
                group.create_task(toy_coordinator(tmp_path / "coordinator.toml"))
                await group.create_task(toy_site(tmp_path / "site-1.toml", trainer=NoiseTrainer(0)))
            return proxy.traffic.up, proxy.accepted

    crossed, connections = run_async(run(), timeout_s=120)
    assert versions * payload <= crossed <= 1.5 * versions * payload
    assert connections in {2, 3}
