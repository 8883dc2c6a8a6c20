from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.journal import Journal
from coordinator.records import (
    Accepted,
    Contribution,
    Dropped,
    Finished,
    Opened,
    Record,
    Rejected,
    Validated,
    VersionCommitted,
)
from coordinator.views import (
    RunView,
    SiteSummary,
    UpdateLife,
    find_update,
    find_version,
    load_run,
    read_run,
    summarise_sites,
)
from shared.errors import ConfigError
from tests.factories import digest, make_federation, make_plan, make_state

PLAN = make_plan(make_federation())
STATES = [make_state(PLAN, version) for version in range(3)]
STORAGE = Path("storage")


def accepted(update_id: str, site: str, base: int, at: float) -> Accepted:
    """An update of 10 examples, or 20 from site b."""
    examples = 20 if site == "b" else 10
    return Accepted(update_id, site, base, examples, digest(f"m{update_id}"), digest(f"f{update_id}"), 1.5, at)


def committed(version: int, at: float, *parts: Contribution) -> VersionCommitted:
    """A version without server slots."""
    return VersionCommitted(version, parts, STATES[version].to_bytes(), digest(f"master {version}"), None, at)


A1, A2, B1, C1 = "a1" * 16, "a2" * 16, "b1" * 16, "c1" * 16
RECORDS: list[Record] = [
    Opened(PLAN.fingerprint, PLAN.config_sha256, PLAN.frozen_sha256, STATES[0].to_bytes(), digest("master 0")),
    accepted(A1, "a", 0, 1.0),
    Rejected(C1, "c", digest("mc"), "not-finite", "tensor w", 2.0),
    accepted(B1, "b", 0, 3.0),
    committed(1, 4.0, Contribution(A1, "a", 0, 0, 0.25), Contribution(B1, "b", 0, 0, 0.75)),
    accepted(A2, "a", 1, 5.0),
]
ENDED: list[Record] = [Dropped(A2, "run-complete", 6.0), Finished(1, 6.0)]


def run_view(records: list[Record]) -> RunView:
    """The view of these records."""
    return read_run(records, STORAGE)


def test_versions_are_numbered_and_carry_their_contributions() -> None:
    """Version 0 stands first and came from nobody; version 1 lists its updates in order of acceptance."""
    run = run_view(RECORDS)
    assert [view.version for view in run.versions] == [0, 1]
    assert run.versions[0].contributions == ()
    assert [part.update_id for part in run.versions[1].contributions] == [A1, B1]
    assert run.current.state == STATES[1]
    assert run.finished_at is None


def test_an_update_tells_its_loss() -> None:
    """From the row beside its acceptance; others have none."""
    measured = [*RECORDS[:2], Validated(A1, 0.75, 1.0), *RECORDS[2:]]
    assert [life.loss for life in run_view(measured).updates.values()] == [0.75, None, None, None]


def test_a_merged_update_tells_its_whole_life() -> None:
    """A merged update knows when it was accepted and merged, into which version, how late and with which weight."""
    assert run_view(RECORDS).updates[B1] == UpdateLife(
        update_id=B1,
        site="b",
        manifest_sha256=digest(f"m{B1}"),
        decided_at=3.0,
        fate="merged",
        base_version=0,
        examples=20,
        norm=1.5,
        file_digest=digest(f"f{B1}"),
        settled_at=4.0,
        version=1,
        staleness=0,
        weight=0.75,
    )


@pytest.mark.parametrize(
    ("records", "update_id", "fate", "rule", "settled_at"),
    [
        (RECORDS, A2, "waiting", None, None),
        (RECORDS, C1, "rejected", "not-finite", None),
        ([*RECORDS, *ENDED], A2, "dropped", "run-complete", 6.0),
    ],
)
def test_other_fates(
    records: list[Record], update_id: str, fate: str, rule: str | None, settled_at: float | None
) -> None:
    """An update that is not merged waits, or says under which rule it was rejected or dropped, and when."""
    life = run_view(records).updates[update_id]
    assert (life.fate, life.rule, life.settled_at, life.version) == (fate, rule, settled_at, None)


def test_each_site_is_summed_up() -> None:
    """Counts are of updates, examples of merged updates only, and the time is that of the last decision."""
    assert summarise_sites(run_view([*RECORDS, *ENDED])) == (
        SiteSummary("a", waiting=0, merged=1, rejected=0, dropped=1, examples=10, last_at=6.0),
        SiteSummary("b", waiting=0, merged=1, rejected=0, dropped=0, examples=20, last_at=4.0),
        SiteSummary("c", waiting=0, merged=0, rejected=1, dropped=0, examples=0, last_at=2.0),
    )


def test_the_first_digits_of_an_id_are_enough() -> None:
    """A prefix finds the one update that has it, in either case."""
    run = run_view(RECORDS)
    assert find_update(run, "b1b").update_id == B1
    assert find_update(run, "B1").update_id == B1


@pytest.mark.parametrize(
    ("prefix", "message"),
    [("ff", "no update with an id that starts with 'ff'"), ("a", "2 updates start with 'a': a1a1a, a2a2a")],
)
def test_an_id_that_is_unknown_or_ambiguous_is_refused(prefix: str, message: str) -> None:
    """No update and several are two different errors; the second one shows what to tell them apart by."""
    with pytest.raises(ConfigError, match=message):
        find_update(run_view(RECORDS), prefix)


def test_a_version_is_found_by_number_or_as_the_newest() -> None:
    """None means the newest version; one that was never published is refused with the range."""
    run = run_view(RECORDS)
    assert find_version(run, None).version == 1
    assert find_version(run, 0).version == 0
    for wrong in (-1, 2):
        with pytest.raises(ConfigError, match="there is no version") as caught:
            find_version(run, wrong)
        assert caught.value.hint == "versions 0 to 1 have been published"


def test_a_journal_is_read_while_it_is_written(tmp_path: Path) -> None:
    """The view of a journal that a coordinator holds open is that of its records."""
    with Journal(tmp_path / "journal.sqlite") as journal:
        journal.append(RECORDS)
        assert load_run(tmp_path) == run_view(RECORDS)


def test_a_run_that_has_not_begun_is_said_so(tmp_path: Path) -> None:
    """Neither a folder without a journal nor an empty journal is a run."""
    with pytest.raises(ConfigError, match="no run has begun"):
        load_run(tmp_path)
    Journal(tmp_path / "journal.sqlite").close()
    with pytest.raises(ConfigError, match="no run has begun"):
        load_run(tmp_path)
