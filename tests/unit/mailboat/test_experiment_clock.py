from __future__ import annotations

import itertools
import random

import pytest

from mailboat.experiment.clock import Clock, Line
from mailboat.experiment.spec import ClockSection, MachineSection
from mailboat.experiment.traces import Change, changes


def test_things_happen_in_order_of_their_time() -> None:
    """Earlier first, of one moment the one asked for first; what is asked for on the way is done too."""
    clock, seen = Clock(), []

    def note(word: str) -> None:
        seen.append((clock.now, word))

    clock.at(5, lambda: note("b"))
    clock.at(1, lambda: clock.later(4, lambda: note("c")))
    clock.at(5, lambda: note("d"))
    assert not clock.run(lambda: False, limit_s=10)
    assert seen == [(5, "b"), (5, "d"), (5, "c")]


def test_a_run_ends_when_its_condition_holds_or_time_is_up() -> None:
    """True for the condition; False for the limit, and nothing behind it was done."""
    clock = Clock()
    clock.at(1, lambda: None)
    clock.at(9, lambda: pytest.fail("behind the limit"))
    assert clock.run(lambda: clock.now == 1, limit_s=8)
    assert not clock.run(lambda: False, limit_s=8)


def test_packets_leave_one_after_the_other() -> None:
    """At 100 bytes a second, packets of 100 and 50 bytes are there after 1 and 1.5 s; the other way is free."""
    clock, arrived = Clock(), []
    line = Line(clock, up=100, down=100)
    line.connect()
    line.carry(line.up, 100, lambda: arrived.append(("up", clock.now)))
    line.carry(line.up, 50, lambda: arrived.append(("up", clock.now)))
    line.carry(line.down, 20, lambda: arrived.append(("down", clock.now)))
    assert line.receiving
    clock.run(lambda: False, limit_s=10)
    assert arrived == [("down", 0.2), ("up", 1.0), ("up", 1.5)]
    assert (line.up.count, line.down.count) == (150, 20)


def test_what_is_under_way_is_lost_when_the_line_breaks() -> None:
    """It neither arrives nor counts, and a line that is away takes nothing; a new connection starts free."""
    clock, arrived = Clock(), []
    line = Line(clock, up=100, down=100)
    line.carry(line.up, 1, lambda: arrived.append("before"))
    line.connect()
    line.carry(line.up, 100, lambda: arrived.append("lost"))
    clock.at(0.5, line.break_off)
    clock.at(0.6, line.connect)
    clock.at(0.6, lambda: line.carry(line.up, 10, lambda: arrived.append(f"{clock.now:.1f}")))
    clock.run(lambda: False, limit_s=10)
    assert arrived == ["0.7"]
    assert line.up.count == 10


def trace(machine: MachineSection, start_hour: float = 9.0) -> list[Change]:
    """A site's changes over two days."""
    return list(changes(ClockSection(days=2, start_hour=start_hour), machine, random.Random(3)))


def test_a_site_without_hours_is_always_there() -> None:
    """Link and machine are there from the beginning on, and nothing changes."""
    assert trace(MachineSection()) == [Change(0, "link up"), Change(0, "on")]


def test_nightly_hours_go_over_midnight() -> None:
    """A run from 9 o'clock on: away at once, there from 22 to 6, each night."""
    found = [change for change in trace(MachineSection(hours=(22, 6)), start_hour=9) if change.what != "on"]
    hours = [(change.at_s / 3600, change.what) for change in found][:5]
    assert hours == [(0, "link down"), (13, "link up"), (21, "link down"), (37, "link up"), (45, "link down")]


def test_a_run_that_begins_within_the_hours() -> None:
    """At 23 o'clock a site with the hours 22 to 6 is there, for seven hours."""
    found = [change for change in trace(MachineSection(hours=(22, 6)), start_hour=23) if change.what != "on"]
    assert [(change.at_s / 3600, change.what) for change in found][:2] == [(0, "link up"), (7, "link down")]


def test_times_off_have_their_share() -> None:
    """Over a long time a machine that is off for 30 % is off for about 30 %, in stretches of about an hour."""
    clock = ClockSection(days=2000)
    found = [
        each for each in changes(clock, MachineSection(off_share=0.3), random.Random(1)) if "link" not in each.what
    ]
    off = [later.at_s - each.at_s for each, later in itertools.pairwise(found) if each.what == "off"]
    assert [each.what for each in found[1:4]] in (["on", "off", "on"], ["off", "on", "off"])
    assert sum(off) / (2000 * 86400) == pytest.approx(0.3, abs=0.01)
    assert sum(off) / len(off) == pytest.approx(3600, rel=0.05)
