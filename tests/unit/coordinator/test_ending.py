"""How a run ends, and when the coordinator's process leaves."""

from __future__ import annotations

from typing import Any

from coordinator import decisions as d
from coordinator.records import Accepted, Dropped, Finished, VersionCommitted
from shared.messages import Announce, Probe, Receipt, Status
from tests.cores import STALL_S, CoordinatorBench, said, session_of
from tests.factories import make_federation, make_update


def _bench(versions: int = 3, config: dict[str, Any] | None = None) -> CoordinatorBench:
    federation = make_federation(federation={"name": "ward", "versions": versions}, aggregation={"mode": "fedasync"})
    return CoordinatorBench(federation, **(config or {}))


def _update_of(bench: CoordinatorBench, site: str, **changes: Any) -> Any:
    return make_update(bench.plan, site, bench.state, **changes)


def test_the_last_version_ends_the_run_for_all() -> None:
    """What waits is dropped with a receipt, the run is recorded as finished, the announcement says final."""
    bench = _bench(versions=1)
    merging = bench.upload("north", _update_of(bench, "north"))
    late = _update_of(bench, "south")
    bench.upload("south", late)
    decision = bench.merged(merging)
    assert [type(record) for record in decision.records] == [VersionCommitted, Dropped, Finished]
    assert decision.jobs == []
    (receipt,) = said(decision, Receipt, "south")
    assert (receipt.outcome, receipt.rule, receipt.update_id) == ("dropped", "run-complete", late.transfer_id)
    (announce,) = said(decision, Announce)
    assert announce.final
    assert announce.manifest.state.version == 1
    assert bench.core.ledger.pending == []


def test_no_version_before_the_last_one_ends_the_run() -> None:
    """The announcement of a version in the middle does not say final."""
    bench = _bench(versions=2)
    decision = bench.merged(bench.upload("north", _update_of(bench, "north")))
    assert [type(record) for record in decision.records] == [VersionCommitted]
    assert not said(decision, Announce)[0].final


def test_the_process_leaves_when_nobody_is_left_to_serve() -> None:
    """Not before the run is complete, not while a site is here, not before late ones had time to say hello."""
    bench = _bench(versions=1, config={"exit_when_done": True})
    bench.hello("north")
    assert bench.tick(100.0).jobs == []
    bench.merged(bench.upload("north", _update_of(bench, "north")))
    assert bench.tick(100.0).jobs == []
    bench.receive("north", Status(site="north", session=session_of("north"), phase="done", version=1))
    bench.gone("north")
    assert bench.tick().jobs == [d.Stop()]


def test_the_process_waits_for_a_site_whose_link_broke() -> None:
    """It may be in the middle of its last pull; it is given the time that a site takes to come back."""
    bench = _bench(versions=1, config={"exit_when_done": True})
    bench.hello("north")
    bench.merged(bench.upload("north", _update_of(bench, "north")))
    bench.gone("north")
    assert bench.tick(STALL_S).jobs == []
    bench.hello("north")
    assert bench.tick(100.0).jobs == []
    bench.gone("north")
    back_within_s = bench.core.back_within_s
    assert bench.tick(back_within_s - 0.1).jobs == []
    assert bench.tick(0.2).jobs == [d.Stop()]


def test_the_process_does_not_wait_for_a_site_of_which_nothing_is_heard() -> None:
    """A broker that drops messages may drop the word that a site is gone: it is asked, and its silence believed."""
    bench = _bench(versions=1, config={"exit_when_done": True})
    bench.hello("north")
    bench.merged(bench.upload("north", _update_of(bench, "north")))
    quiet_s = bench.core.quiet_s
    assert quiet_s > bench.core.back_within_s
    assert bench.tick(quiet_s - 0.1) == d.Decision()
    assert said(bench.tick(0.2), Probe, "north") == [Probe(session=session_of("north"))]
    assert bench.tick(STALL_S - 0.1).jobs == []
    bench.hello("north")  # the answer
    assert bench.tick(quiet_s - 0.1) == d.Decision()
    assert said(bench.tick(0.2), Probe, "north") == [Probe(session=session_of("north"))]
    assert bench.tick(STALL_S).jobs == [d.Stop()]


def test_the_process_lingers_for_those_who_are_just_coming() -> None:
    """For stall_s after the last version, and again after each start."""
    bench = _bench(versions=1, config={"exit_when_done": True})
    bench.merged(bench.upload("north", _update_of(bench, "north")))
    assert bench.tick(STALL_S - 0.1).jobs == []
    assert bench.tick(0.1).jobs == [d.Stop()]
    bench.boot()
    assert bench.tick().jobs == []
    assert bench.tick(STALL_S).jobs == [d.Stop()]


def test_a_coordinator_may_stay_for_ever() -> None:
    """Without exit_when_done late sites are served at any time."""
    bench = _bench(versions=1)
    bench.merged(bench.upload("north", _update_of(bench, "north")))
    assert bench.tick(1000.0).jobs == []


def test_an_empty_run_is_not_complete() -> None:
    """Nothing happened yet: the process stays, whoever is here."""
    bench = _bench(config={"exit_when_done": True})
    bench.tick()
    assert bench.tick(1000.0) == d.Decision()
    assert not [record for record in bench.records if isinstance(record, Accepted)]
