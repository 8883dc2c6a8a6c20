"""The live view says what the core knows, and nothing that was not said."""

from __future__ import annotations

import json

from coordinator.status import LiveStatus, live_status
from shared.messages import Status
from tests.cores import BOOT, CoordinatorBench, session_of
from tests.factories import make_federation, make_update


def _live(bench: CoordinatorBench) -> LiveStatus:
    return live_status(bench.core, connected=True, bytes_up=11, bytes_down=22, at=5.0)


def test_a_coordinator_that_just_started() -> None:
    """Everything is there, and nobody has been heard of."""
    status = _live(CoordinatorBench(make_federation(aggregation={"mode": "fedbuff"})))
    assert status == LiveStatus(
        boot=BOOT,
        federation="ward",
        mode="fedbuff",
        version=0,
        target=3,
        finished=False,
        connected=True,
        pending=0,
        merging=False,
        bytes_up=11,
        bytes_down=22,
        at=5.0,
        sites={},
    )


def test_a_site_as_it_last_said_itself() -> None:
    """Its own words, whether it is present, and when it was last heard."""
    bench = CoordinatorBench()
    bench.hello("north")
    said = Status(
        site="north",
        session=session_of("north"),
        phase="training",
        version=0,
        progress=0.5,
        metrics={"loss": 0.25},
        bytes_up=1,
        bytes_down=2,
        outbox=3,
        reconnects=4,
    )
    bench.receive("north", said)
    site = _live(bench).sites["north"]
    assert site.model_dump(exclude={"present", "seen_at"}) == said.model_dump(exclude={"site", "session"})
    assert site.present
    assert site.seen_at == 1e9 + bench.now
    bench.now += 7
    bench.gone("north")
    assert not _live(bench).sites["north"].present
    assert _live(bench).sites["north"].phase == "training"
    assert _live(bench).sites["north"].seen_at == 1e9 + bench.now


def test_a_site_that_has_said_nothing_of_itself() -> None:
    """Present, with blanks where nothing is known."""
    bench = CoordinatorBench()
    bench.hello("north")
    site = _live(bench).sites["north"]
    assert (site.present, site.phase, site.version, site.metrics, site.bytes_up) == (True, None, None, {}, 0)


def test_updates_and_merges_show() -> None:
    """Pending updates, a merge under way, and the end of the run."""
    bench = CoordinatorBench(make_federation(aggregation={"quorum": 1}, federation={"name": "ward", "versions": 1}))
    accepted = bench.upload("north", make_update(bench.plan, "north", bench.state))
    assert (_live(bench).pending, _live(bench).merging) == (1, False)
    merging = bench.tick(10.0)
    assert not accepted.jobs
    assert _live(bench).merging
    bench.merged(merging)
    status = _live(bench)
    assert (status.version, status.finished, status.pending, status.merging) == (1, True, 0, False)


def test_the_file_survives_being_written_and_read() -> None:
    """`mailboat status` reads what the service wrote."""
    bench = CoordinatorBench()
    bench.hello("north")
    status = _live(bench)
    assert LiveStatus.model_validate(json.loads(status.model_dump_json())) == status
