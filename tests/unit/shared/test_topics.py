"""The topic grammar: built and parsed from one table, and nothing else is taken for ours."""

from __future__ import annotations

import pytest

from shared.topics import Address, Channel, parse, subscriptions, topic

TABLE = {
    Channel.ANNOUNCE: "mb/v1/ward/announce",
    Channel.BULK: "mb/v1/ward/bulk",
    Channel.UP_CTL: "mb/v1/ward/site/north/up/ctl",
    Channel.UP_DATA: "mb/v1/ward/site/north/up/data",
    Channel.DOWN_CTL: "mb/v1/ward/site/north/down/ctl",
    Channel.DOWN_DATA: "mb/v1/ward/site/north/down/data",
    Channel.PRESENCE: "mb/v1/ward/site/north/presence",
}


@pytest.mark.parametrize("channel", Channel)
def test_each_channel_has_its_topic_and_the_topic_its_meaning(channel: Channel) -> None:
    """These names are the wire format: releases that are out there speak them."""
    site = "north" if channel.per_site else None
    assert topic("ward", channel, site) == TABLE[channel]
    assert parse(TABLE[channel]) == Address("ward", channel, site)


@pytest.mark.parametrize("channel", Channel)
def test_a_site_is_named_exactly_where_the_channel_has_one_each(channel: Channel) -> None:
    """A topic for nobody, or a shared one for somebody, is a mistake of the caller."""
    with pytest.raises(AssertionError):
        topic("ward", channel, None if channel.per_site else "north")


@pytest.mark.parametrize(
    "name",
    [
        "",
        "mb/v1/ward",
        "mb/v2/ward/announce",
        "mb/v1/ward/announce/",
        "/mb/v1/ward/announce",
        "mb/v1/ward/announce\n",
        "mb/v1//announce",
        "mb/v1/Ward/announce",
        "mb/v1/a/b/announce",
        "mb/v1/ward/site//up/ctl",
        "mb/v1/ward/site/a.b/up/ctl",
        "mb/v1/ward/site/north/up",
        "mb/v1/ward/site/north/up/ctl/x",
        "mb/v1/ward/site/+/up/ctl",
        "mb/v1/ward/site/a/b/presence",
        f"mb/v1/ward/site/{'x' * 65}/presence",
        "$SYS/broker/version",
    ],
)
def test_what_is_not_ours_has_no_meaning(name: str) -> None:
    """Anything but the table's topics, with names of the right shape, is ignored."""
    assert parse(name) is None


def test_a_site_hears_what_is_for_all_and_what_is_for_it() -> None:
    """Never what another site says or is told."""
    assert set(subscriptions("ward", "site", "north")) == {
        TABLE[channel] for channel in (Channel.ANNOUNCE, Channel.BULK, Channel.DOWN_CTL, Channel.DOWN_DATA)
    }


def test_the_coordinator_hears_every_site() -> None:
    """And not its own words."""
    assert set(subscriptions("ward", "coordinator")) == {
        "mb/v1/ward/site/+/up/ctl",
        "mb/v1/ward/site/+/up/data",
        "mb/v1/ward/site/+/presence",
    }


def test_only_words_that_must_outlive_their_saying_are_retained() -> None:
    """The announcement and who is present; a retained chunk or receipt would be told to the wrong process."""
    assert {channel for channel in Channel if channel.retained} == {Channel.ANNOUNCE, Channel.PRESENCE}
