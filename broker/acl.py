"""The broker's access list, generated from the one topic table that the code itself uses.

A site's user name is its name, so one pattern serves every site, and adding a site changes nothing here. What the list
does not name is denied: a site reads the shared channels and its own `down`, writes its own `up` and presence, and can
neither read nor write what is another site's.

Mosquitto takes every subscription and filters what it delivers; a denied site sees an empty channel, not a refusal.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from shared.errors import ConfigError
from shared.topics import ROOT, Channel, Role, topic

_NAME = re.compile(r"[a-z0-9_-]{1,64}")


def render_acl(federation: str, coordinator_user: str = "coordinator", *, barred: Iterable[str] = ()) -> str:
    """The text of Mosquitto's acl_file for one federation; ConfigError for a name that could widen a rule.

    No site may be called as the coordinator's user is: the broker could not tell them apart. `barred` users may do
    nothing, also on a connection that stands when Mosquitto reads the list again: a list of revoked certificates alone
    would only keep them from connecting anew.
    """
    barred = sorted(barred)
    for name in (federation, coordinator_user, *barred):
        if _NAME.fullmatch(name) is None:
            raise ConfigError(
                f"{name!r} cannot stand in an access list", hint="use 1 to 64 of: lower-case letters, digits, - and _"
            )
    lines = [
        f"# Access rules of the federation {federation}, generated from the topic table. What is not named is denied.",
        "",
        f"user {coordinator_user}",
        *(f"topic {access} {name}" for access, name in _rules(federation, "coordinator", "+")),
        "",
        *(line for name in barred for line in (f"user {name}", f"topic deny {ROOT}/{federation}/#", "")),
        "# For every user: %u is the name that the broker has verified.",
        "# (Mosquitto remarks at its start that the shared channels have no %u. They are meant for every site.)",
        *(f"pattern {access} {name}" for access, name in _rules(federation, "site", "%u")),
        "",
    ]
    return "\n".join(lines)


def _rules(federation: str, role: Role, site: str) -> list[tuple[str, str]]:
    """What `role` may do on each channel: ('read' or 'write', topic filter with `site` in the site's place)."""
    rules = []
    for channel in Channel:
        name = topic(federation, channel, site if channel.per_site else None)
        if channel.writer == role:
            rules.append(("write", name))
        if channel.reader == role:
            rules.append(("read", name))
    return rules
