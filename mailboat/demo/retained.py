"""Leaving somebody else's broker as it was found: what a run left retained there is cleared."""

from __future__ import annotations

import asyncio

from shared.config import BrokerSection, LinkSection
from shared.errors import UnavailableError
from shared.link import Connected, Link, LinkOptions
from shared.topics import Channel, topic

CLEAR_S = 10.0


async def clear_retained(broker_url: str, federation: str, sites: tuple[str, ...]) -> None:
    """Replace the announcement and each site's presence by nothing (an empty retained message deletes).

    UnavailableError when the broker does not take it within ten seconds.
    """
    names = [
        topic(federation, channel, site) for channel in Channel if channel.retained for site in _sites(channel, sites)
    ]
    options = LinkOptions(broker=BrokerSection(url=broker_url), link=LinkSection(), client_id=f"{federation}-clear")
    try:
        async with asyncio.timeout(CLEAR_S), Link(options) as link:
            events = link.events()
            while not isinstance(await anext(events), Connected):
                pass
            for name in names:
                await link.publish(name, b"", retain=True)
    except TimeoutError:
        raise UnavailableError(
            f"{broker_url} still holds {len(names)} retained messages of {federation}",
            hint="they do no harm; a broker forgets them when it is told to, or started afresh without persistence",
        ) from None


def _sites(channel: Channel, sites: tuple[str, ...]) -> tuple[str | None, ...]:
    return sites if channel.per_site else (None,)
