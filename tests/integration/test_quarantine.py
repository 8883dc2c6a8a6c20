"""An update that is out of line, over a real Mosquitto: kept apart, released or dropped by a person, and on record."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from coordinator.records import Dropped, Quarantined, Released, VersionCommitted
from tests.commands import call
from tests.helpers import run_async, until
from tests.toys import toy_coordinator, toy_records, toy_site, write_toy

SITES = ("site-1", "site-2")


@pytest.mark.parametrize("verdict", ["release", "drop"])
def test_a_person_decides_about_an_update_that_is_out_of_line(verdict: str, tmp_path: Path, mosquitto_url: str) -> None:
    """The round goes on without it, under its rule; released it is part of a version, dropped of none.

    The other updates of the same run come in time and count; `quarantine list` shows this one until it is decided.
    """
    write_toy(tmp_path, mosquitto_url, sites=2, versions=4, quorum=1, sealed=True)
    config = tmp_path / "coordinator.toml"
    config.write_text(config.read_text() + "[admission]\nexamples_max = 50\n")

    async def decide() -> None:
        held: list[str] = []
        while not held:
            listed = await asyncio.to_thread(call, tmp_path, "quarantine", "list", "--json")
            held = [each["update_id"] for each in json.loads(listed.stdout or "[]")]
            await asyncio.sleep(0.1)
        decided = await asyncio.to_thread(call, tmp_path, "quarantine", verdict, held[0])
        assert decided.returncode == 0, decided.stderr
        await until(lambda: any(isinstance(record, Released | Dropped) for record in toy_records(tmp_path)))

    async def everybody() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(toy_coordinator(config))
            boastful = group.create_task(toy_site(tmp_path / "site-2.toml", examples=500))
            await decide()
            group.create_task(toy_site(tmp_path / "site-1.toml", seconds=0.3))
            await boastful

    run_async(everybody(), timeout_s=110)
    records = toy_records(tmp_path)
    first = next(record for record in records if isinstance(record, Quarantined))
    assert first.rule == "examples-max"
    merged = {part.update_id for each in records if isinstance(each, VersionCommitted) for part in each.contributions}
    assert (first.update_id in merged) == (verdict == "release")
    told = call(tmp_path, "audit", "tail", "--rule", "examples-max", "--json").stdout.splitlines()
    assert first.update_id in {json.loads(line)["update_id"] for line in told}
    assert call(tmp_path, "audit", "verify").returncode == 0
