"""A member that floods the federation over a real Mosquitto: the others reach the end, and nothing of it is kept."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import pytest

from bench.hostile import HOSTILE, HostileSite
from coordinator.records import Finished, VersionCommitted
from shared.plan import SealedPlan
from tests.helpers import run_async
from tests.toys import toy_coordinator, toy_records, toy_site, write_toy

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]


def test_a_flooding_site_stops_nobody(tmp_path: Path, mosquitto_url: str) -> None:
    """Offers without end, chunks that nobody asked for and garbage: the honest sites' versions come, and no row of it.

    No update of its ever arrives whole, so nothing of it is recorded, and its spools are a few, not one for each offer.
    """
    write_toy(tmp_path, mosquitto_url, sites=2, versions=3, quorum=2)
    config = tmp_path / "coordinator.toml"
    config.write_text(config.read_text() + "[admission]\nupdates_per_hour = 20\nmessages_per_s = 20.0\n")
    plan = SealedPlan.model_validate_json((tmp_path / "coordinator" / "plan.json").read_bytes())

    async def everybody() -> int:
        flood = HostileSite(mosquitto_url, plan)
        flooding = asyncio.create_task(flood.run())
        async with asyncio.TaskGroup() as group:
            group.create_task(toy_coordinator(config))
            for number in (1, 2):
                group.create_task(toy_site(tmp_path / f"site-{number}.toml"))
        flooding.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await flooding
        return flood.sent

    assert run_async(everybody(), timeout_s=240) > 100
    records = toy_records(tmp_path)
    assert [record.version for record in records if isinstance(record, VersionCommitted)] == [1, 2, 3]
    assert any(isinstance(record, Finished) for record in records)
    assert [record for record in records if getattr(record, "site", "") == HOSTILE] == []
    assert len(list((tmp_path / "coordinator" / "updates").glob("*.part.manifest"))) <= 20
