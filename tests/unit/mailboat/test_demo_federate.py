from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from mailboat.demo.facts import Facts, with_records, with_status
from mailboat.demo.federate import Federation, Patience
from mailboat.demo.live import Lines
from mailboat.demo.plan import DemoOptions, make_plan
from mailboat.demo.processes import Children
from mailboat.demo.scoring import Scorer
from tests.unit.mailboat.demo_samples import PROCESSES, RUN, live, run_facts, site_status


def federation(tmp_path: Path) -> Federation:
    """A federation of four sites, one absent, that was not started."""
    plan = make_plan(DemoOptions(workdir=tmp_path / "run", versions=2, absent=1))
    children = Children(tmp_path / "logs", tmp_path)
    return Federation(plan, children, Scorer.__new__(Scorer), Lines.__new__(Lines))


def test_whoever_is_late_is_named(tmp_path: Path) -> None:
    """A person reads which version stands, and what each site does."""
    running = federation(tmp_path)
    facts = with_records(
        Facts(processes={**dict.fromkeys(("site-1", "site-2", "site-3"), "running"), "site-4": "absent"}), RUN[:4]
    )
    running.facts = with_status(facts, live({"site-1": site_status(), "site-2": site_status(present=False)}))
    said = running.waiting_for()
    assert said == "version 1 of 2 is published; site-1 (training 40%), site-2 (no link), site-3 (starting)"


def test_after_the_end_it_is_the_sites_that_stay_or_the_scores(tmp_path: Path) -> None:
    """A complete run waits for sites to leave, then for scores."""
    running = federation(tmp_path)
    running.facts = dataclasses.replace(run_facts(), processes={**PROCESSES, "site-2": "running"})
    assert running.waiting_for() == "the run is complete, but not everybody has left: site-2 (done)"
    running.facts = dataclasses.replace(run_facts(), scores={})
    assert running.waiting_for() == "3 versions are still being scored"


def test_patience_ends_when_nothing_moves() -> None:
    """Only a change of what counts starts the waiting anew; bytes on the wire do not."""
    patience = Patience(10.0)
    facts = with_status(Facts(processes=PROCESSES), live({"site-1": site_status(progress=0.1)}))
    assert not patience.spent(facts, 100.0)
    facts = with_status(facts, live({"site-1": site_status(progress=0.2)}))
    assert not patience.spent(facts, 109.0)
    facts = with_status(facts, live({"site-1": site_status(progress=0.2, bytes_up=999_999)}))
    assert not patience.spent(facts, 118.0)
    assert patience.spent(facts, 120.0)


@pytest.mark.parametrize("moved", [RUN[:2], RUN[:4], RUN])
def test_every_record_counts_as_movement(moved: tuple[object, ...]) -> None:
    """An update or a version that arrives starts the waiting anew."""
    patience = Patience(10.0)
    assert not patience.spent(Facts(), 0.0)
    assert not patience.spent(with_records(Facts(), moved), 11.0)  # type: ignore[arg-type]
