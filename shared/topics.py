"""The topic grammar in one table; building, parsing and the broker's access list all come from it.

mb/v1/<federation>/announce                  retained announcement
mb/v1/<federation>/bulk                      state chunks for everybody
mb/v1/<federation>/site/<site>/up/ctl        hello, offer, want, status
mb/v1/<federation>/site/<site>/up/data       update chunks
mb/v1/<federation>/site/<site>/down/ctl      welcome, want, receipt, ...
mb/v1/<federation>/site/<site>/down/data     state chunks for one site
mb/v1/<federation>/site/<site>/presence      retained, last will
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from typing import Literal

ROOT = "mb/v1"

Role = Literal["coordinator", "site"]


class Channel(Enum):
    """One row of the table: path below the federation, who writes, who reads, whether the broker retains it."""

    ANNOUNCE = ("announce", "coordinator", "site", True)
    BULK = ("bulk", "coordinator", "site", False)
    UP_CTL = ("site/{site}/up/ctl", "site", "coordinator", False)
    UP_DATA = ("site/{site}/up/data", "site", "coordinator", False)
    DOWN_CTL = ("site/{site}/down/ctl", "coordinator", "site", False)
    DOWN_DATA = ("site/{site}/down/data", "coordinator", "site", False)
    PRESENCE = ("site/{site}/presence", "site", "coordinator", True)

    def __init__(self, path: str, writer: Role, reader: Role, retained: bool) -> None:  # noqa: FBT001 - a table's column
        self.path = path
        self.writer: Role = writer
        self.reader: Role = reader
        self.retained = retained

    @property
    def per_site(self) -> bool:
        """Whether each site has its own topic."""
        return "{site}" in self.path


@dataclass(frozen=True, slots=True)
class Address:
    """A parsed topic; `site` is None on shared channels."""

    federation: str
    channel: Channel
    site: str | None


def topic(federation: str, channel: Channel, site: str | None = None) -> str:
    """Build one topic; `site` must be given exactly where the channel has one per site ('+' subscribes to all)."""
    assert (site is not None) == channel.per_site, f"{channel.name} and site {site!r} do not fit"
    return f"{ROOT}/{federation}/{channel.path.format(site=site)}"


_IDENT = r"[a-z0-9_-]{1,64}"
_PATTERNS = {
    channel: re.compile(
        rf"{ROOT}/(?P<federation>{_IDENT})/" + channel.path.format(site=rf"(?P<site>{_IDENT})"),
    )
    for channel in Channel
}


def parse(name: str) -> Address | None:
    """Return what a topic means, or None when it is not ours."""
    for channel, pattern in _PATTERNS.items():
        if found := pattern.fullmatch(name):
            return Address(found["federation"], channel, found.groupdict().get("site"))
    return None


def subscriptions(federation: str, role: Role, site: str | None = None) -> list[str]:
    """All topics that `role` reads: of one site, or, for the coordinator, of every site."""
    return [
        topic(federation, channel, (site or "+") if channel.per_site else None)
        for channel in Channel
        if channel.reader == role
    ]
