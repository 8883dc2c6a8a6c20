"""Sites that are sent the chunks of one transfer at the same time, so that each chunk goes once to all of them.

Theory of operation
-------------------
    gathering    whoever pulls joins, until all who could are here or the first one has waited for long enough
    on its way   everything in front of `front` was sent to each member, or it holds it

A convoy moves when each member has room for half a window, by as many chunks as all of them have room for: it has the
pace of its slowest member. One that lets the others wait for longer than they should is left behind. What it was not
sent then is sent to it alone, as is what a member's link has lost; a site that lacks nothing in front of `front` any
more is a member again. One that is further on by more than a window, because it came with a part of the transfer, goes
on alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from shared.transfer import Sender


@dataclass(slots=True)
class Convoy:
    """See the module's docstring."""

    window: int
    """Chunks that may be in flight to a member; a site that wants fewer at a time goes alone."""
    leaves_at: float | None
    """Monotonic seconds when those who are ready go on without the others; None while none of them waits."""
    front: int | None = None
    """None while it gathers."""
    members: dict[str, None] = field(default_factory=dict)
    """A set with an order."""
    _waited_for: set[str] = field(default_factory=set)

    @property
    def complete(self) -> bool:
        """Whether all members are ready."""
        return not self._waited_for

    @property
    def held(self) -> bool:
        """Whether some of them wait for others."""
        return bool(self._waited_for) and len(self._waited_for) < len(self.members)

    def set_out(self, senders: Mapping[str, Sender]) -> None:
        """Those who gathered were sent a first window; whoever is further on than the others by one goes alone."""
        self.front = min((each.next_index for each in senders.values() if each.next_index is not None), default=0)
        self.leaves_at = None
        for site, sender in senders.items():
            self.settle(site, sender)

    def settle(self, site: str, sender: Sender) -> bool:
        """Whether a site is a member, now that something has happened to it."""
        place = sender.next_index
        assert self.front is not None
        if sender.window < self.window or place is None or not self.front <= place <= self.front + self.window:
            self.part(site)
            return False
        self.members[site] = None
        if sender.room >= min(max(1, self.window // 2), sender.unsent):
            self._waited_for.discard(site)
        else:
            self._waited_for.add(site)
        return True

    def part(self, site: str) -> None:
        """This site is no member any more."""
        self.members.pop(site, None)
        self._waited_for.discard(site)

    def leave_late(self) -> None:
        """Its time has come: go on without those whom others wait for."""
        self.leaves_at = None
        for site in list(self._waited_for) if self.held else []:
            self.part(site)

    def wait(self, until: float) -> None:
        """The ones who are ready wait for the others, until then at the longest."""
        if self.leaves_at is None:
            self.leaves_at = until

    def move(self, senders: Collection[Sender]) -> int:
        """Return the new `front`: the members, who have these senders, are to be sent all that they lack before it."""
        places = [(each.next_index, each.room) for each in senders]
        self.front = min(place for place, _ in places if place is not None) + min(room for _, room in places)
        self.leaves_at = None
        return self.front
