"""States and steps on their way out: requests of a moment are merged, each wanted chunk goes once to everybody.

Every site that pulls has a sender of its own. What (nearly) all present sites would be sent goes once on the bulk topic
and counts as sent for each of them; anything else goes to each site alone, because whoever is present hears the bulk
topic, and it is the sites' links that are slow, not ours. Sites hear of a version at the same time, so a fresh pull
waits a moment for others to join, and they stay together from then on (`coordinator.convoy`), as long as all who hear
the topic keep up. Chunks leave in the order in which each site's sender counts them, whatever their topic: a sender
takes what was sent before an acknowledged chunk for lost.

A site needs each chunk of a state once, and again what its link has lost: that much is sent at once, and beyond it one
window for each `stall_s`, so that a site which asks for the same without end takes little of our link from the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby

from coordinator.convoy import Convoy
from coordinator.decisions import Decision, Serve
from shared.bucket import Bucket
from shared.manifest import Manifest
from shared.messages import Want
from shared.transfer import Bitmap, Sender

BYSTANDERS = 0.1
"""A first window goes to everybody when it reaches at most this many sites in vain for each that it serves."""

LOST_WINDOWS = 8
"""Windows that a bad link may lose of one state before what is lost again is sent more slowly."""


@dataclass(slots=True)
class Pull:
    """One site's pull of one state or step."""

    transfer_id: str
    sender: Sender
    last_want: float
    """Monotonic seconds."""


@dataclass(slots=True)
class Fetched:
    """What one site was sent of the newest version that it has asked for, and how much may be sent again."""

    version: int
    chunks: dict[str, Bitmap]
    """By transfer: a version may be had whole and as a step."""
    again: Bucket

    def count(self, transfer_id: str, indices: list[int], now: float) -> None:
        """These chunks go out; of an older version, each is one that is sent again."""
        sent = self.chunks.get(transfer_id)
        again = sum(sent is None or not sent.add(index) for index in indices)
        self.again.take(again, now)


class Downlink:
    """All pulls under way; at most one per site."""

    def __init__(self, *, merge_s: float, idle_s: float, stall_s: float, window: int) -> None:
        """`window` is the most that is in flight to one site, in chunks, whatever it asks for: all share our link.

        `merge_s` is how long sites wait for each other to be sent the same.
        """
        self.window = window
        self.stall_s = stall_s
        self.merge_s = merge_s
        self.idle_s = idle_s
        self._pulls: dict[str, Pull] = {}
        self._convoys: dict[str, Convoy] = {}
        """By transfer; of one that has no convoy (any more), each site is sent what it lacks when it says so."""
        self._fetched: dict[str, Fetched] = {}

    @property
    def active(self) -> frozenset[str]:
        """Sites that are pulling."""
        return frozenset(self._pulls)

    def want(self, site: str, want: Want, state: Manifest, present: frozenset[str], now: float, out: Decision) -> None:
        """A site says what it lacks of a state."""
        pull = self._pulls.get(site)
        fresh = pull is None or pull.transfer_id != want.transfer_id
        if pull is None or fresh:
            self._forget(site)
            pull = self._pulls[site] = Pull(want.transfer_id, Sender(state.frames), now)
        elif want.restart:
            pull.sender.restart()
        pull.last_want = now
        paced = self._of(site, state).again.wait(1, now) > 0
        pull.sender.on_want(want.have, 0 if paced else min(want.window, self.window))
        if pull.sender.have.full:
            self._forget(site)
            return
        if fresh and pull.transfer_id not in self._convoys:
            self._convoys[pull.transfer_id] = Convoy(self.window, until=now + self.merge_s)
        convoy = self._convoys.get(pull.transfer_id)
        if convoy is None:
            self._send({site: pull}, 1, now, out)
        elif convoy.front is None:
            convoy.members[site] = None
            if fresh and present <= self._pulls.keys():
                self._set_out(present, now, out)
        else:
            self._send({site: pull}, 1, now, out, below=convoy.front)  # what its link has lost
            convoy.settle(site, pull.sender)
            self._go_on(pull.transfer_id, present, now, out)

    def tick(self, present: frozenset[str], now: float, out: Decision) -> None:
        """Send what has waited long enough; forget sites that went quiet (they will want again)."""
        for site in [site for site, pull in self._pulls.items() if now - pull.last_want > self.idle_s]:
            self._forget(site)
        due = [name for name, convoy in self._convoys.items() if convoy.until is not None and now >= convoy.until]
        gathering = [name for name in due if self._convoys[name].front is None]
        for transfer_id in due:
            if transfer_id not in gathering:
                self._wait_no_longer(transfer_id, present, now, out)
        if gathering:
            self._set_out(present, now, out)

    def site_gone(self, site: str) -> None:
        """The site is away."""
        self._forget(site)

    def reset(self) -> None:
        """Our own link dropped: nothing is in flight to anybody, and every site will want again."""
        self._pulls.clear()
        self._convoys.clear()

    def _forget(self, site: str) -> None:
        pull = self._pulls.pop(site, None)
        convoy = self._convoys.get(pull.transfer_id) if pull is not None else None
        if pull is not None and convoy is not None:
            convoy.part(site)
            if not convoy.members:
                del self._convoys[pull.transfer_id]

    # -- together ---

    def _set_out(self, present: frozenset[str], now: float, out: Decision) -> None:
        """Whoever gathers is sent what its window admits: chunks of one convoy, or parts of several."""
        gathering = [name for name, convoy in self._convoys.items() if convoy.front is None]
        pulls = {name: self._members(name) for name in gathering}
        together = {site: pull for each in pulls.values() for site, pull in each.items()}
        self._send(together, self._hearers(present), now, out)
        for transfer_id in gathering:
            self._convoys[transfer_id].set_out({site: pull.sender for site, pull in pulls[transfer_id].items()})
            self._go_on(transfer_id, present, now, out)

    def _go_on(self, transfer_id: str, present: frozenset[str], now: float, out: Decision) -> None:
        """Send what all members have room for."""
        convoy, hearers = self._convoys[transfer_id], self._hearers(present)
        while convoy.ready and len(convoy.members) >= max(2, hearers):
            pulls = self._members(transfer_id)
            self._send(pulls, hearers, now, out, below=convoy.move([pull.sender for pull in pulls.values()]))
            for site, pull in pulls.items():
                convoy.settle(site, pull.sender)
        if len(convoy.members) < max(2, hearers):
            self._part_ways(transfer_id, now, out)
        else:
            convoy.wait(now + self.merge_s)

    def _wait_no_longer(self, transfer_id: str, present: frozenset[str], now: float, out: Decision) -> None:
        """Its time has come: whoever was waited for is away since, or too slow for the others."""
        if self._convoys[transfer_id].ready:
            self._go_on(transfer_id, present, now, out)
        else:
            self._part_ways(transfer_id, now, out)

    def _part_ways(self, transfer_id: str, now: float, out: Decision) -> None:
        """Each goes on alone from here, and is sent what it has room for."""
        del self._convoys[transfer_id]
        pulls = {site: pull for site, pull in self._pulls.items() if pull.transfer_id == transfer_id}
        for site, pull in pulls.items():
            self._send({site: pull}, 1, now, out)

    def _members(self, transfer_id: str) -> dict[str, Pull]:
        return {site: self._pulls[site] for site in self._convoys[transfer_id].members}

    def _hearers(self, present: frozenset[str]) -> int:
        """Sites that hear what goes to everybody; a want may overtake its site's hello."""
        return len(present | self._pulls.keys())

    # -- chunks ---

    def _send(
        self, pulls: Mapping[str, Pull], hearers: int, now: float, out: Decision, *, below: int | None = None
    ) -> None:
        """Send what the windows of these admit; `hearers` sites hear what goes to everybody."""
        chosen = {site: (pull.transfer_id, pull.sender.take(below=below)) for site, pull in pulls.items()}
        demand: dict[tuple[str, int], list[str]] = {}
        for site, (transfer_id, indices) in chosen.items():
            self._fetched[site].count(transfer_id, indices, now)
            for index in indices:
                demand.setdefault((transfer_id, index), []).append(site)
        # Senders take their chunks in ascending order.
        told = [(key[0], _audience(demand[key], hearers), key[1]) for key in sorted(demand)]
        for (transfer_id, audience), run in groupby(told, key=lambda each: each[:2]):
            together = tuple(index for _, _, index in run)
            out.jobs.extend(Serve(transfer_id, hearer, together) for hearer in audience)

    def _of(self, site: str, state: Manifest) -> Fetched:
        """The books of one site; each newer version begins new ones."""
        version, fetched = state.version, self._fetched.get(site)
        if fetched is None or fetched.version < version:
            again = Bucket(state.frames + LOST_WINDOWS * self.window, self.window / self.stall_s)
            fetched = self._fetched[site] = Fetched(version, {}, again)
        if version == fetched.version:
            fetched.chunks.setdefault(state.transfer_id, Bitmap(state.frames))
        return fetched


def _audience(sites: list[str], hearers: int) -> tuple[str | None, ...]:
    """Whom to send a chunk that these sites want: everybody at once, or each of them."""
    count = len(sites)
    return (None,) if count > 1 and hearers - count <= BYSTANDERS * count else tuple(sites)
