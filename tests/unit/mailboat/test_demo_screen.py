from __future__ import annotations

import dataclasses
import io

import pytest
from rich.console import Console

from coordinator.status import SiteStatus
from mailboat.demo.facts import Facts, ProcessState, with_records, with_status
from mailboat.demo.live import Lines, Picture, render
from mailboat.demo.screen import Screen, build, clock, narrate, points, site_state, size, summary
from tests.unit.mailboat.demo_samples import PROCESSES, RUN, live, run_facts, site_status


def screen_of(facts: Facts) -> Screen:
    """The screen a minute into the run."""
    return build(facts, headline="federated training", target=2, news=("one", "two"), elapsed_s=61.0)


@pytest.mark.parametrize(
    ("process", "status", "state"),
    [
        ("absent", None, "never started"),
        ("running", None, "starting"),
        ("running", site_status(phase=None), "starting"),
        ("running", site_status(), "training"),
        ("running", site_status(phase="uploading"), "uploading"),
        ("running", site_status(present=False), "no link"),
        ("running", site_status(present=False, phase="done"), "done"),
        ("killed", site_status(), "killed"),
        ("ended", site_status(), "done"),
    ],
)
def test_a_sites_state_in_a_word(process: ProcessState, status: SiteStatus | None, state: str) -> None:
    """The process comes first, then the link, then what the site says of itself."""
    facts = Facts(processes={"site-1": process})
    if status is not None:
        facts = with_status(facts, live({"site-1": status}))
    assert site_state(facts, "site-1") == state


def test_a_row_shows_the_last_part_that_a_site_had() -> None:
    """Version, lateness, bytes and local F1 stand in the row of each site."""
    facts = with_status(run_facts(), live({"site-3": site_status(reconnects=2)}))
    facts = dataclasses.replace(facts, processes={**PROCESSES, "site-3": "running"})
    rows = {row.name: row for row in screen_of(facts).rows}
    assert rows["site-3"].state == "training 40%"
    assert rows["site-3"].last_update == "v2, 1 late"
    assert rows["site-2"].last_update == "v1, fresh"
    assert (rows["site-3"].up, rows["site-3"].down, rows["site-3"].reconnects) == ("1 kB", "2 kB", "2")
    assert rows["site-3"].score == "51.2"
    assert (rows["site-4"].state, rows["site-4"].last_update, rows["site-4"].score) == ("never started", "-", "-")


def test_the_picture_fits_eighty_columns() -> None:
    """Nothing that matters is cut off on a plain terminal."""
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(render(screen_of(run_facts())))
    text = console.export_text()
    for expected in ("version 2 of 2", "elapsed 1:01", "site-4", "never started", "v2, 1 late", "61.2", "two"):
        assert expected in text
    assert max(map(len, text.splitlines())) <= 80


def test_each_event_is_told_once() -> None:
    """Between two moments: connections, updates, refusals, versions, scores and the end."""
    before = Facts(processes=PROCESSES)
    after = run_facts()
    half = with_status(with_records(before, RUN[:4]), live({"site-1": site_status()}))
    told = [*narrate(before, half), *narrate(half, after), *narrate(after, after)]
    assert told == [
        "site-1: connected",
        "site-1: update on version 0 is durable (54 examples)",
        "site-2: update on version 0 is durable (54 examples)",
        "version 1 published: site-1, site-2",
        "site-1: update on version 1 is durable (54 examples)",
        "site-3: update on version 0 is durable (54 examples)",
        "site-2: update refused, rule norm",
        "version 2 published: site-1, site-3 (1 late)",
        "the run is complete at version 2",
        "base model: strict F1 1.0, lenient 5.0 on the held-out notes",
        "version 1: strict F1 40.0, lenient 50.0 on the held-out notes",
        "version 2: strict F1 61.2, lenient 70.3 on the held-out notes",
    ]


def test_a_lost_link_and_its_return_are_told() -> None:
    """A reader of the lines sees when a site was cut off."""
    here = with_status(Facts(processes=PROCESSES), live({"site-1": site_status()}))
    gone = with_status(here, live({"site-1": site_status(present=False)}))
    assert narrate(here, gone) == ("site-1: lost its link",)
    assert narrate(gone, here) == ("site-1: connected again",)


def test_a_first_connection_is_no_return() -> None:
    """A site whose presence was heard of before it said hello has not been here yet."""
    heard = with_status(Facts(processes=PROCESSES), live({"site-1": site_status(present=False, phase=None)}))
    here = with_status(heard, live({"site-1": site_status()}))
    assert narrate(heard, here) == ("site-1: connected",)


def test_a_quiet_moment_in_one_line() -> None:
    """While sites work it says how far they are; when they have left, how many versions have a score."""
    facts = with_status(Facts(processes={"site-1": "running", "site-4": "absent"}), live({"site-1": site_status()}))
    assert summary(facts) == "site-1 (training 40%), site-4 (never started)"
    assert summary(run_facts()) == "3 of 3 versions are scored"


def test_lines_come_with_their_time_and_without_colours() -> None:
    """Each event is one line, however narrow the window."""
    out = io.StringIO()
    times = iter([0.0, 1.0, 62.0])
    with Lines(Console(file=out, width=20), now=lambda: next(times)) as view:
        view.headline("training")
        view.say("a [markup] line that is longer than the window is wide", style="red")
    assert out.getvalue() == " 0:01  == training\n 1:02  a [markup] line that is longer than the window is wide\n"


def test_progress_is_told_only_after_a_silence() -> None:
    """While events come, they are progress enough."""
    out = io.StringIO()
    clock_now = [0.0]
    view = Lines(Console(file=out), now=lambda: clock_now[0])
    for clock_now[0], share in ((1.0, "10 %"), (9.0, "20 %"), (10.0, "30 %"), (18.0, "40 %")):
        view.progress(share)
    assert out.getvalue() == " 0:09  20 %\n 0:18  40 %\n"


def test_the_live_picture_ends_with_the_last_facts() -> None:
    """What stays on the terminal is the state at the end."""
    out = io.StringIO()
    with Picture(Console(file=out, width=100, force_terminal=True), target=2) as view:
        view.headline("federated training")
        view.say("the embedded broker is for demonstrations only", style="yellow")
        view.show(run_facts())
    text = out.getvalue()
    assert "the embedded broker is for demonstrations only" in text
    assert "version 2 of 2" in text
    assert "the run is complete at version 2" in text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (1_254_000, "1.25 MB"),
        (999_600, "1000 kB"),
        (52_300_000_000, "52.3 GB"),
    ],
)
def test_sizes(count: int, text: str) -> None:
    """Three digits and a decimal unit."""
    assert size(count) == text


def test_numbers_for_people() -> None:
    """Minutes and points."""
    assert (clock(125.9), points(0.6116)) == ("2:05", "61.2")
