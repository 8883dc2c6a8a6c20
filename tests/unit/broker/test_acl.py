"""The access list as text; that a real broker keeps to it is tested in tests/integration/test_broker.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from broker.acl import render_acl
from shared.errors import ConfigError
from shared.topics import Channel, topic

ROOT = Path(__file__).parents[3]


def test_every_channel_has_one_writer_and_one_reader() -> None:
    """Each row of the topic table appears once as write and once as read, and nothing else is allowed."""
    rules = {line for line in render_acl("ward").splitlines() if line.startswith(("topic ", "pattern "))}
    expected = set()
    for channel in Channel:
        for access, role in (("write", channel.writer), ("read", channel.reader)):
            kind, site = ("topic", "+") if role == "coordinator" else ("pattern", "%u")
            expected.add(f"{kind} {access} {topic('ward', channel, site if channel.per_site else None)}")
    assert rules == expected


def test_wide_rules_belong_to_the_coordinator_alone() -> None:
    """A plus sign stands only below the coordinator's user line, never in a pattern for everybody."""
    head, _, patterns = render_acl("ward", "merger").partition("# For every user")
    assert "user merger\n" in head
    assert "+" not in patterns
    assert "#" not in "".join(line for line in patterns.splitlines() if line.startswith("pattern"))


def test_a_barred_user_is_denied_everything_and_nobody_else_anything() -> None:
    """One line below its own name, and the rest of the list as it is without it."""
    rules = "user south\ntopic deny mb/v1/ward/#\n\n"
    assert render_acl("ward", barred=["south"]).replace(rules, "") == render_acl("ward")
    assert render_acl("ward", barred=["south"]).count(rules) == 1


@pytest.mark.parametrize("name", ["", "a b", "a/b", "+", "#", "%u", "a\nuser b", "A", "x" * 65])
def test_names_that_widen_a_rule_are_refused(name: str) -> None:
    """A federation or user name with a wildcard, a separator or a line break never reaches the file."""
    with pytest.raises(ConfigError, match="cannot stand in an access list"):
        render_acl(name)
    with pytest.raises(ConfigError, match="cannot stand in an access list"):
        render_acl("ward", name)
    with pytest.raises(ConfigError, match="cannot stand in an access list"):
        render_acl("ward", barred=[name])


def test_the_shipped_rules_are_the_generated_ones() -> None:
    """docker/broker/acl is what the code generates now for the federation of docker/federation.toml."""
    assert (ROOT / "docker/broker/acl").read_text() == render_acl("local")
    assert 'name = "local"' in (ROOT / "docker/federation.toml").read_text()
