"""A whole run over three NATS servers as one MQTT broker, one of which is killed."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from coordinator.records import Accepted, Finished, VersionCommitted
from mailboat.flaky import Conditions, FlakyProxy
from tests.helpers import run_async
from tests.nats import Cluster, find_nats, run_cluster
from tests.toys import INITIAL, toy_coordinator, toy_records, toy_site, write_toy

pytestmark = [pytest.mark.cluster, pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(1200)]

POLL_S = 0.005
SITES = (1, 2)


def _accepted(root: Path) -> list[str]:
    return [record.update_id for record in toy_records(root) if isinstance(record, Accepted)]


async def _uploading(root: Path) -> str:
    """The id of an update that has begun to arrive and is not there yet."""
    while True:
        begun = {path.name.partition(".")[0] for path in root.glob("coordinator/updates/*.part.manifest")}
        if begun:
            return min(begun)
        await asyncio.sleep(POLL_S)


async def _kill_a_node_in_mid_upload(root: Path, cluster: Cluster) -> str:
    """Kill the node of the site whose update is on its way; returns the update's id."""
    update_id = await _uploading(root)
    sites = {path.parts[-3]: path for path in root.glob(f"site-*/outbox/{update_id}.manifest")}
    (site,) = sites
    node = await asyncio.to_thread(cluster.node_of, f"toy-{site}-")
    assert node is not None
    assert update_id not in _accepted(root)
    await node.kill()
    return update_id


@pytest.mark.skipif(find_nats() is None, reason="nats-server is not installed: apt-get install nats-server")
def test_a_node_killed_in_mid_upload_costs_nothing_but_time(tmp_path: Path) -> None:
    """Everybody moves to the nodes that are left; each update counts once, and the arithmetic is right.

    The sites' lines are slow, and run in this process: an upload lasts until its node is found and killed.
    """

    async def scenario() -> str:
        async with run_cluster(tmp_path) as cluster, contextlib.AsyncExitStack() as lines:
            slow = Conditions(bytes_per_s=500_000)
            proxies = [FlakyProxy("127.0.0.1", node.mqtt_port, conditions=slow) for node in cluster.nodes]
            for each in proxies:
                await lines.enter_async_context(each)
            far = "mqtt://" + ",".join(f"127.0.0.1:{each.port}" for each in proxies)
            urls = {f"site-{number}": far for number in SITES}
            write_toy(tmp_path, cluster.url, sites=2, versions=2, parameters=400_000, quorum=2, slice_kib=32, urls=urls)
            async with asyncio.TaskGroup() as group:
                group.create_task(toy_coordinator(tmp_path / "coordinator.toml"))
                for number in SITES:
                    group.create_task(toy_site(tmp_path / f"site-{number}.toml"))
                return await _kill_a_node_in_mid_upload(tmp_path, cluster)

    interrupted = run_async(scenario(), timeout_s=1100)
    records = toy_records(tmp_path)
    versions = [record for record in records if isinstance(record, VersionCommitted)]
    assert [version.version for version in versions] == [1, 2]
    assert sum(isinstance(record, Finished) for record in records) == 1
    counted = [part.update_id for version in versions for part in version.contributions]
    assert interrupted in counted
    assert sorted(counted) == sorted(_accepted(tmp_path))
    assert len(counted) == len(set(counted)) == len(SITES) * len(versions)
    assert not list(tmp_path.glob("site-*/outbox/*"))
    for values in load_file(tmp_path / "coordinator" / "masters" / "v00000002.safetensors").values():
        np.testing.assert_allclose(values, INITIAL + 2.0)
