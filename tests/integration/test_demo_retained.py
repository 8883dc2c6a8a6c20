from __future__ import annotations

import asyncio

import pytest

from mailboat.demo.retained import clear_retained
from shared.config import BrokerSection, LinkSection
from shared.errors import UnavailableError
from shared.link import Connected, Link, LinkOptions, Packet
from tests.helpers import run_async

pytestmark = pytest.mark.integration

ANNOUNCE = "mb/v1/demo-test/announce"
PRESENCE = "mb/v1/demo-test/site/site-1/presence"
OTHER = "mb/v1/another/announce"


async def retained(url: str, *publish: str) -> set[str]:
    """Publish something retained on these topics, and return what a newcomer is given."""
    end = "mb/v1/demo-test/end"
    options = LinkOptions(BrokerSection(url=url), LinkSection(), "test-reader", subscriptions=("mb/#",))
    found: set[str] = set()
    async with Link(LinkOptions(BrokerSection(url=url), LinkSection(), "test-writer")) as writer:
        await anext(writer.events())
        for name in publish:
            await writer.publish(name, b"x", retain=True)
        async with Link(options) as reader:
            async for event in reader.events():
                if isinstance(event, Connected):
                    await reader.publish(end, b"x")
                if isinstance(event, Packet) and event.topic == end:
                    return found
                if isinstance(event, Packet) and event.retained:
                    found.add(event.topic)
    return found


def test_a_run_leaves_nothing_behind_at_a_strange_broker(mosquitto_url: str) -> None:
    """Announcement and presence of this run are gone, those of others stay."""
    assert run_async(retained(mosquitto_url, ANNOUNCE, PRESENCE, OTHER)) == {ANNOUNCE, PRESENCE, OTHER}
    run_async(clear_retained(mosquitto_url, "demo-test", ("site-1", "site-2")))
    assert run_async(retained(mosquitto_url)) == {OTHER}


def test_a_broker_that_does_not_answer_is_not_waited_for(free_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demonstration ends all the same, and says what is left."""
    monkeypatch.setattr("mailboat.demo.retained.CLEAR_S", 0.2)
    with pytest.raises(UnavailableError, match="still holds 2 retained messages"):
        asyncio.run(clear_retained(f"mqtt://127.0.0.1:{free_port}", "demo-test", ("site-1",)))
