"""Who is there when: the hours of a link, and the times for which a machine is off."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from mailboat.experiment.spec import ClockSection, MachineSection

HOUR_S, DAY_S = 3600.0, 86400.0


@dataclass(frozen=True, slots=True)
class Change:
    """At a second of the run, one thing about one site."""

    at_s: float
    what: Literal["link up", "link down", "on", "off"]


def changes(clock: ClockSection, machine: MachineSection, rng: random.Random) -> Iterator[Change]:
    """Yield a site's changes in order of time, to the end of the run; the first say how it is at second 0.

    Times off are exponential with mean `off_s`, times on with the mean that makes their share 1 - `off_share`.
    """
    yield from sorted([*_hours(clock, machine), *_power(clock, machine, rng)], key=lambda change: change.at_s)


def _hours(clock: ClockSection, machine: MachineSection) -> Iterator[Change]:
    if machine.hours is None:
        yield Change(0.0, "link up")
        return
    begins, ends = machine.hours
    now_h = clock.start_hour
    inside = begins <= now_h < ends if begins < ends else now_h >= begins or now_h < ends
    yield Change(0.0, "link up" if inside else "link down")
    for day in range(int(clock.days) + 2):
        for hour, what in ((begins, "link up"), (ends, "link down")):
            at_s = day * DAY_S + (hour - now_h) * HOUR_S
            if at_s > 0:
                yield Change(at_s, "link up" if what == "link up" else "link down")


def _power(clock: ClockSection, machine: MachineSection, rng: random.Random) -> Iterator[Change]:
    if not machine.off_share:
        yield Change(0.0, "on")
        return
    at_s, on = 0.0, rng.random() >= machine.off_share
    on_s = machine.off_s * (1 - machine.off_share) / machine.off_share
    while at_s < clock.days * DAY_S:
        yield Change(at_s, "on" if on else "off")
        at_s += rng.expovariate(1 / (on_s if on else machine.off_s))
        on = not on
