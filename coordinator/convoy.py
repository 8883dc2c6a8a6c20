"""Sites that are sent the chunks of one transfer at the same time, so that each chunk goes once to all of them.

Theory of operation
-------------------
    gathering    whoever pulls joins, until all who could are here or the first one has waited for long enough
    on its way   everything in front of `front` was sent to each member, or it holds it
    gone         each goes on alone

A convoy moves when each member has room for half a window, by as many chunks as all of them have room for. What one
member's link has lost is sent again to that one, before the next chunks for all.

Whoever hears the topic for all gets what goes there, room or not. For a slow link that would queue up at the broker,
counted by nobody, up to the whole transfer. So a convoy goes on only as long as all who hear the topic are members that
keep up and lack all that is to come. It ends when one lets the others wait for too long, when one comes that lacks more
than a window of what they have had, is further on by more than one or holds parts of what follows, and when one pulls
nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from shared.transfer import Sender


@dataclass(slots=True)
class Convoy:
    """See the module's docstring."""

    window: int
    """Chunks that may be in flight to a member; a site that wants fewer at a time is none."""
    until: float | None
    """Monotonic seconds for which it waits for those who are not ready; None while none is."""
    front: int | None = None
    """None while it gathers."""
    members: dict[str, None] = field(default_factory=dict)
    """A set with an order."""
    _waited_for: set[str] = field(default_factory=set)

    @property
    def ready(self) -> bool:
        """Whether all members are."""
        return not self._waited_for

    def set_out(self, senders: Mapping[str, Sender]) -> None:
        """Those who gathered were sent a first window."""
        self.front = min((each.next_index for each in senders.values() if each.next_index is not None), default=0)
        self.until = None
        for site, sender in senders.items():
            self.settle(site, sender)

    def settle(self, site: str, sender: Sender) -> None:
        """Something has happened to a site: whether it is a member, and ready."""
        place = sender.next_index
        assert self.front is not None
        in_step = (
            sender.window >= self.window
            and place is not None
            and self.front <= place <= self.front + self.window
            and sender.unsent == sender.have.size - place  # it would hear what it holds, counted by nobody
        )
        if not in_step:
            self.part(site)
            return
        self.members[site] = None
        if sender.room >= min(max(1, self.window // 2), sender.unsent):
            self._waited_for.discard(site)
        else:
            self._waited_for.add(site)

    def part(self, site: str) -> None:
        """This site is no member any more."""
        self.members.pop(site, None)
        self._waited_for.discard(site)

    def wait(self, until: float) -> None:
        """Members who are ready wait for the others, until then at the longest."""
        if self.until is None and len(self._waited_for) < len(self.members):
            self.until = until

    def move(self, senders: Collection[Sender]) -> int:
        """Return the new `front`: the members, who have these senders, are to be sent all that they lack before it."""
        places = [(each.next_index, each.room) for each in senders]
        self.front = min(place for place, _ in places if place is not None) + min(room for _, room in places)
        self.until = None
        return self.front
