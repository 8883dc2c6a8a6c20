"""The durable state as a fold over records: what follows from each, and what cannot follow."""

from __future__ import annotations

import pytest

from coordinator.ledger import Ledger, Published
from coordinator.records import Accepted, Contribution, Dropped, Finished, Opened, Record, Rejected, VersionCommitted
from shared.manifest import Manifest
from shared.messages import Receipt
from tests.factories import digest, make_federation, make_plan, make_state

PLAN = make_plan(make_federation())
OPENED = Opened(
    PLAN.fingerprint, PLAN.config_sha256, PLAN.frozen_sha256, make_state(PLAN, 0).to_bytes(), digest("master")
)
ONE, TWO, THREE = (digest(text)[:32] for text in ("one", "two", "three"))


def _accepted(update_id: str, site: str = "a", base: int = 0) -> Accepted:
    return Accepted(update_id, site, base, 10, digest(update_id), digest("file"), 1.5, 1.0)


def _rejected(update_id: str) -> Rejected:
    return Rejected(update_id, "a", digest(update_id), "non-finite", "tensor w holds NaN", 1.0)


def _committed(version: int, *update_ids: str) -> VersionCommitted:
    parts = tuple(Contribution(update_id, "a", 0, version - 1, 0.25) for update_id in update_ids)
    return VersionCommitted(version, parts, make_state(PLAN, version).to_bytes(), digest("m"), None, 2.0)


def whole(state: Manifest) -> Published:
    """A version that travels whole."""
    return Published(state.file_digest, state, None)


def _ledger(*records: Record) -> Ledger:
    ledger = Ledger()
    for record in (OPENED, *records):
        ledger.apply(record)
    return ledger


def test_before_anything_was_recorded_there_is_no_version() -> None:
    """A fresh ledger says so instead of naming a version that nobody published."""
    ledger = Ledger()
    assert (ledger.version, ledger.finished, ledger.pending) == (-1, False, [])
    with pytest.raises(KeyError):
        _ = ledger.newest


def test_opening_publishes_version_0() -> None:
    """The run's first record carries the state that everybody starts from."""
    ledger = _ledger()
    assert ledger.version == 0
    assert ledger.newest == whole(make_state(PLAN, 0))


def test_accepted_updates_wait_in_the_order_of_acceptance() -> None:
    """The order is what a replay of the merge depends on."""
    ledger = _ledger(_accepted(TWO), _accepted(ONE), _accepted(THREE))
    assert [update.update_id for update in ledger.pending] == [TWO, ONE, THREE]


def test_a_version_takes_its_updates_out_and_leaves_the_rest() -> None:
    """Merged updates do not wait any more; those accepted meanwhile do."""
    ledger = _ledger(_accepted(ONE), _accepted(TWO), _accepted(THREE), _committed(1, THREE, ONE))
    assert [update.update_id for update in ledger.pending] == [TWO]
    assert ledger.version == 1
    assert ledger.newest == whole(make_state(PLAN, 1))
    assert set(ledger.published) == {0, 1}


@pytest.mark.parametrize(
    ("records", "outcome", "details"),
    [
        ([_accepted(ONE)], "accepted", {}),
        ([_rejected(ONE)], "rejected", {"rule": "non-finite", "detail": "tensor w holds NaN"}),
        ([_accepted(ONE), _committed(1, ONE)], "merged", {"version": 1, "staleness": 0, "weight": 0.25}),
        ([_accepted(ONE), Dropped(ONE, "run-complete", 3.0)], "dropped", {"rule": "run-complete"}),
    ],
)
def test_a_receipt_says_what_became_of_an_update(
    records: list[Record], outcome: str, details: dict[str, object]
) -> None:
    """Each outcome has its receipt, with rule or version and weight, about the manifest that was decided on."""
    receipt = _ledger(*records).receipt(ONE)
    wanted = {"update_id": ONE, "manifest_sha256": digest(ONE), "outcome": outcome, **details}
    assert receipt == Receipt.model_validate(wanted)


def test_there_is_no_receipt_for_what_was_never_decided() -> None:
    """Asking for one is a mistake of the caller."""
    with pytest.raises(KeyError):
        _ledger().receipt(ONE)


def test_a_dropped_update_does_not_wait_any_more() -> None:
    """It is taken out of the round, and only it."""
    ledger = _ledger(_accepted(ONE), _accepted(TWO), Dropped(ONE, "run-complete", 3.0))
    assert [update.update_id for update in ledger.pending] == [TWO]


def test_a_finished_run_stays_at_its_version() -> None:
    """The record only says that no version follows."""
    ledger = _ledger(_accepted(ONE), _committed(1, ONE), Finished(1, 3.0))
    assert ledger.finished
    assert ledger.version == 1


@pytest.mark.parametrize(
    "records",
    [
        [_accepted(ONE), _accepted(ONE)],
        [_accepted(ONE), _rejected(ONE)],
        [_rejected(ONE), _accepted(ONE)],
        [_rejected(ONE), _rejected(ONE)],
        [_accepted(ONE), _committed(2, ONE)],
        [_accepted(ONE), _committed(0, ONE)],
        [_accepted(ONE), _committed(1, ONE), _committed(2, ONE)],
        [_accepted(ONE), Dropped(ONE, "run-complete", 3.0), _committed(1, ONE)],
        [_rejected(ONE), _committed(1, ONE)],
    ],
)
def test_what_cannot_follow_is_not_believed(records: list[Record]) -> None:
    """An update is decided once and counts once, and versions follow one another: anything else is a bug of ours."""
    with pytest.raises(AssertionError):
        _ledger(*records)


@pytest.mark.parametrize("record", [_committed(1, ONE), Dropped(ONE, "run-complete", 3.0)])
def test_an_update_that_nobody_accepted_cannot_count(record: Record) -> None:
    """Neither as merged nor as dropped."""
    with pytest.raises(KeyError):
        _ledger(record)
