from __future__ import annotations

from pathlib import Path

from coordinator.journal import Journal
from mailboat.demo.facts import Facts, Meter, Traffic, Watcher, with_status
from tests.unit.mailboat.demo_samples import RUN, live, run_facts, site_status


def test_a_counter_survives_the_restart_of_its_process() -> None:
    """What the first process counted is added to what the second one counts."""
    meter = Meter()
    for reading in (10, 40, 5, 30):
        meter = meter.read(reading)
    assert meter.total == 70


def test_silence_after_a_restart_of_the_coordinator_is_no_restart_of_the_site() -> None:
    """A status in which the site has not spoken yet says nothing about its bytes."""
    traffic = Traffic().read(site_status(bytes_up=40, bytes_down=4))
    traffic = traffic.read(site_status(phase=None, bytes_up=0, bytes_down=0))
    traffic = traffic.read(site_status(bytes_up=50, bytes_down=5))
    assert (traffic.up.total, traffic.down.total) == (50, 5)


def test_traffic_is_added_up_by_site() -> None:
    """Each site has a meter of its own."""
    facts = with_status(Facts(), live({"site-1": site_status(bytes_up=1), "site-2": site_status(bytes_up=2)}))
    assert {name: traffic.up.total for name, traffic in facts.traffic.items()} == {"site-1": 1, "site-2": 2}


def test_transfers_are_counted_from_the_journal() -> None:
    """Up: accepted updates, merged or not. Down: states that were trained on, and the last one by each site."""
    facts = run_facts()
    assert facts.uplink_transfers == 4
    assert facts.downlink_transfers == 4 + 3


def test_the_watcher_reads_each_row_once(tmp_path: Path) -> None:
    """Records come in as the coordinator writes them, and none twice."""
    with Journal(tmp_path / "journal.sqlite") as journal:
        journal.append(RUN[:4])
        watcher = Watcher(tmp_path)
        assert watcher.read(Facts()) == Facts()
        (tmp_path / "status.json").write_text(live({"site-1": site_status()}).model_dump_json())
        facts = watcher.read(Facts())
        assert (facts.version, facts.finished, len(facts.accepted)) == (1, False, 2)
        journal.append(RUN[4:])
        facts = watcher.read(watcher.read(facts))
    assert (facts.version, facts.finished, len(facts.accepted), len(facts.rejected)) == (2, True, 4, 1)
    assert facts.opened == RUN[0]
