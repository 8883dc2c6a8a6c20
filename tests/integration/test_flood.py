"""A member that floods its own topics is not listened to for a while, over a real Mosquitto, and then is again."""

from __future__ import annotations

import asyncio
import secrets
from pathlib import Path

import pytest

from coordinator import earshot
from coordinator.records import VersionCommitted
from shared.config import BrokerSection, LinkSection
from shared.link import Connected, Link, LinkOptions
from shared.topics import Channel, topic
from tests.helpers import run_async
from tests.toys import toy_coordinator, toy_records, toy_site, write_toy

GARBAGE = secrets.token_bytes(64 * 1024)


@pytest.mark.parametrize("channel", [Channel.UP_DATA, Channel.UP_CTL], ids=["chunks", "messages"])
def test_a_flood_ends_at_the_broker(
    channel: Channel,
    tmp_path: Path,
    mosquitto_url: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The broker finds nobody who subscribes to the flood; the rounds need that site, and get its update afterwards."""
    monkeypatch.setattr(earshot, "MUTE_S", 2.0)
    monkeypatch.setattr(earshot, "BURST_BYTES", 1024 * 1024)
    write_toy(tmp_path, mosquitto_url, sites=2, versions=3, quorum=2, sealed=True)

    async def flood() -> None:
        broker = BrokerSection(url=mosquitto_url)
        async with Link(LinkOptions(broker, LinkSection(), "toy-hostile")) as link:
            async for event in link.events():
                if isinstance(event, Connected):
                    break
            for wanted in (True, False):  # until the coordinator listens, and then until it does no more
                heard = not wanted
                while heard is not wanted:
                    unmatched = link.counters.unmatched
                    await link.publish(topic("toy", channel, "site-2"), GARBAGE)
                    heard = link.counters.unmatched == unmatched

    async def everybody() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(toy_coordinator(tmp_path / "coordinator.toml"))
            group.create_task(toy_site(tmp_path / "site-1.toml"))
            await flood()
            await toy_site(tmp_path / "site-2.toml")

    run_async(everybody(), timeout_s=60)
    versions = [record for record in toy_records(tmp_path) if isinstance(record, VersionCommitted)]
    assert [{part.site for part in version.contributions} for version in versions] == [{"site-1", "site-2"}] * 3
    printed = capsys.readouterr()
    assert "a site floods" in printed.out + printed.err


def test_without_a_roster_nobody_is_muted(tmp_path: Path, mosquitto_url: str) -> None:
    """In an open federation anybody can speak under any name: no honest site is silenced by somebody else's flood."""
    write_toy(tmp_path, mosquitto_url, sites=1, versions=3, quorum=1)
    begun, done = asyncio.Event(), asyncio.Event()

    async def flood() -> int:
        broker = BrokerSection(url=mosquitto_url)
        async with Link(LinkOptions(broker, LinkSection(), "toy-hostile")) as link:
            async for event in link.events():
                if isinstance(event, Connected):
                    break
            while not done.is_set():
                await link.publish(topic("toy", Channel.UP_DATA, "site-1"), GARBAGE)
                begun.set()
            return link.counters.packets_sent

    async def everybody() -> int:
        flooding = asyncio.create_task(flood())
        await begun.wait()
        async with asyncio.TaskGroup() as group:
            group.create_task(toy_coordinator(tmp_path / "coordinator.toml"))
            group.create_task(toy_site(tmp_path / "site-1.toml"))
        done.set()
        return await flooding

    assert run_async(everybody(), timeout_s=60) > 0
    assert sum(isinstance(record, VersionCommitted) for record in toy_records(tmp_path)) == 3
