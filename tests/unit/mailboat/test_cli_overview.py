from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from coordinator.records import (
    Accepted,
    Contribution,
    Finished,
    Opened,
    Quarantined,
    Record,
    Released,
    VersionCommitted,
)
from coordinator.status import LiveStatus, SiteStatus
from coordinator.views import read_run
from mailboat.overview import Overview, overview
from tests.factories import digest, make_federation, make_plan, make_state

FEDERATION = make_federation()
PLAN = make_plan(FEDERATION)
NOW = 1000.0
OPENED = Opened(
    PLAN.fingerprint, PLAN.config_sha256, PLAN.frozen_sha256, make_state(PLAN, 0).to_bytes(), digest("master")
)


def accepted(site: str) -> Accepted:
    """An update of `site` on version 0."""
    return Accepted(digest(site)[:32], site, 0, 10, digest(f"m{site}"), digest(f"f{site}"), 1.0, 5.0)


def committed(*sites: str) -> VersionCommitted:
    """Version 1 from the updates of `sites`."""
    parts = tuple(Contribution(digest(site)[:32], site, 0, 0, 0.5) for site in sites)
    return VersionCommitted(1, parts, make_state(PLAN, 1).to_bytes(), digest("master 1"), None, 6.0)


def site_status(*, present: bool) -> SiteStatus:
    """A site that trains, or that is gone."""
    return SiteStatus(
        present=present,
        phase="training",
        version=0,
        progress=0.5,
        metrics={},
        bytes_up=1,
        bytes_down=2,
        outbox=0,
        reconnects=0,
        seen_at=NOW,
    )


def live(*present: str, away: tuple[str, ...] = (), **changes: Any) -> LiveStatus:
    """A live view as of one second ago."""
    sites = {name: site_status(present=name in present) for name in (*present, *away)}
    values: dict[str, Any] = {
        "boot": "b",
        "federation": "ward",
        "mode": "sync",
        "version": 0,
        "target": 3,
        "finished": False,
        "connected": True,
        "pending": 0,
        "merging": False,
        "bytes_up": 10,
        "bytes_down": 20,
        "at": NOW - 1,
        "sites": sites,
    }
    return LiveStatus(**{**values, **changes})


def seen(records: list[Record], status: LiveStatus | None, **aggregation: Any) -> Overview:
    """The overview of these records and this live view."""
    federation = make_federation(aggregation=aggregation)
    return overview(read_run([OPENED, *records], Path("storage")), status, federation, now=NOW)


@pytest.mark.parametrize(
    ("records", "status", "aggregation", "waiting_for"),
    [
        ([], None, {}, "the coordinator: start it with `mailboat coordinator run`"),
        ([], live("a", at=NOW - 60), {}, "the coordinator: start it with `mailboat coordinator run`"),
        ([], live("a", connected=False), {}, "the broker"),
        ([], live("a", merging=True), {}, "version 1, which is being merged"),
        ([], live(away=("a",)), {}, "sites: none is present"),
        ([accepted("a")], live("a", "b"), {}, "updates of b (or 3600 s, with 1 at least)"),
        ([accepted("a")], live("a"), {"quorum": 3}, "2 more updates"),
        ([accepted("a")], live("a"), {"mode": "fedbuff", "buffer": 4}, "3 more updates of 4"),
        ([], live("a"), {"mode": "fedasync"}, "the next update of any site"),
        ([accepted("a"), committed("a"), Finished(1, 7.0)], live("a"), {}, "nothing: the run is complete"),
    ],
)
def test_it_says_what_is_waited_for(
    records: list[Record], status: LiveStatus | None, aggregation: dict[str, Any], waiting_for: str
) -> None:
    """In each situation the overview names who or what must come next."""
    assert seen(records, status, **aggregation).waiting_for == waiting_for


@pytest.mark.parametrize(
    ("status", "coordinator"),
    [
        (None, "has not run yet"),
        (live(), "running, connected to the broker"),
        (live(connected=False), "running, NOT connected to the broker"),
        (live(at=NOW - 30), "not running, last seen 30 seconds ago"),
        (live(at=NOW - 600), "not running, last seen 10 minutes ago"),
        (live(at=NOW - 3 * 86_400), "not running, last seen 3 days ago"),
    ],
)
def test_it_says_how_the_coordinator_is(status: LiveStatus | None, coordinator: str) -> None:
    """A live view that is no longer renewed means that nobody runs."""
    assert seen([], status).coordinator == coordinator


def test_a_site_is_shown_from_both_sides() -> None:
    """Counts of updates are the journal's, presence and phase the live view's; sites of either one are listed."""
    rows = {row.site: row for row in seen([accepted("a"), accepted("b"), committed("a")], live("b", "c")).sites}
    assert list(rows) == ["a", "b", "c"]
    assert (rows["a"].merged, rows["a"].waiting, rows["a"].present, rows["a"].phase) == (1, 0, False, None)
    assert (rows["b"].merged, rows["b"].waiting, rows["b"].present, rows["b"].phase) == (0, 1, True, "training")
    assert (rows["c"].merged, rows["c"].present) == (0, True)


def test_nobody_is_present_where_the_coordinator_does_not_run() -> None:
    """Presence in a live view that is no longer renewed is not believed."""
    assert [row.present for row in seen([], live("a", at=NOW - 60)).sites] == [False]


def test_a_roster_is_listed_from_the_start() -> None:
    """Sites that are named in federation.toml are shown before they ever came."""
    federation = make_federation(federation={"sites": ["x", "y"]})
    shown = overview(read_run([OPENED], Path("storage")), None, federation, now=NOW)
    assert [row.site for row in shown.sites] == ["x", "y"]


def test_what_a_site_has_spent_is_shown() -> None:
    """As it last said itself, whether or not it is here; nothing for one that trains without privacy."""
    spent = site_status(present=False).model_copy(update={"metrics": {"epsilon": 2.5, "delta": 1e-5, "charges": 3.0}})
    rows = seen([], live("a", sites={"a": site_status(present=True), "b": spent})).sites
    assert [(row.site, row.epsilon, row.delta) for row in rows] == [("a", None, None), ("b", 2.5, 1e-5)]


def test_the_quarantine_is_counted() -> None:
    """Updates that are kept apart, and not those that were released; they are not among the waiting ones."""
    held: list[Record] = [accepted("a"), Quarantined(digest("a")[:32], "norm-max", "", 6.0)]
    released: list[Record] = [
        accepted("b"),
        Quarantined(digest("b")[:32], "norm-max", "", 6.0),
        Released(digest("b")[:32], 7.0),
    ]
    found = seen([*held, *released], live("a", "b"))
    assert (found.quarantined, found.pending) == (1, 1)


def test_renewals_that_nobody_took_are_those_of_a_coordinator_that_runs() -> None:
    """A live view that is no longer renewed says nothing about them."""
    assert seen([], live("a", renewals=("a", "b"))).renewals == ("a", "b")
    assert seen([], live("a", renewals=("a",), at=NOW - 60)).renewals == ()
