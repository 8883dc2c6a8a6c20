"""What a site may bring: rates that put an offer off, and rules under which a sound update is kept apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from coordinator import decisions as d
from coordinator.ledger import Ledger
from coordinator.quarantine import FOLDER, forget_ruling, rule_on, rulings
from coordinator.records import Accepted, Dropped, Quarantined, Released
from coordinator.snapshots import from_bytes, to_bytes
from shared.bucket import Bucket
from shared.config import AdmissionSection
from shared.manifest import Manifest
from shared.messages import Offer, Receipt, Wait
from tests.cores import CoordinatorBench, bits, jobs, said
from tests.factories import make_federation, make_update, update_id_of


def _bench(mode: str = "sync", quorum: int = 2, versions: int = 9, **admission: Any) -> CoordinatorBench:
    federation = make_federation(
        federation={"name": "ward", "versions": versions},
        aggregation={"mode": mode, "quorum": quorum, "staleness": {"limit": 1}},
    )
    return CoordinatorBench(federation, admission=admission)


def _update(bench: CoordinatorBench, site: str, number: int = 0, **changes: Any) -> Manifest:
    return make_update(bench.plan, site, bench.state, update_id=update_id_of(site, str(number)), **changes)


def _arrives(bench: CoordinatorBench, site: str, update: Manifest, norm: float) -> d.Decision:
    update_id = update.transfer_id
    bench.receive(site, Offer(manifest=update))
    bench.handle(d.SpoolOpened(update_id, bits(update.frames)))
    bench.handle(d.ChunksStored(update_id, tuple(range(update.frames))))
    return bench.handle(d.Verified(update_id, norm))


def test_a_bucket_starts_full_and_refills_evenly() -> None:
    """Ten at once, then one a second; what is larger than the bucket waits for a full one."""
    bucket = Bucket(10, 1.0)
    for _ in range(10):
        assert bucket.wait(1, 100.0) == 0
        bucket.take(1, 100.0)
    assert bucket.wait(1, 100.0) == 1.0
    assert bucket.wait(1, 101.0) == 0
    assert bucket.wait(50, 101.0) == 9.0
    assert bucket.wait(1, 50.0) == 0, "a clock that went back takes nothing away"


def test_an_offer_beyond_the_rate_is_put_off_and_leaves_no_trace() -> None:
    """The third new update of an hour waits for its turn; another site's does not, and an hour later it is taken."""
    bench = _bench(updates_per_hour=2)
    for number in range(2):
        _arrives(bench, "north", _update(bench, "north", number), 1.0)
    third = Offer(manifest=_update(bench, "north", 2))
    decision = bench.receive("north", third)
    (wait,) = said(decision, Wait, "north")
    assert (wait.rule, wait.retry_s, decision.records, decision.jobs) == ("rate-updates", 1800.0, [], [])
    assert jobs(bench.receive("south", Offer(manifest=_update(bench, "south"))), d.OpenSpool)
    bench.now += wait.retry_s
    assert jobs(bench.receive("north", third), d.OpenSpool)


def test_refused_offers_count_too() -> None:
    """Each refusal is a row of the journal: beyond the rate there is no more of them, but a word to wait."""
    bench = _bench(updates_per_hour=2)
    written, rules = 0, []
    for number in range(5):
        sound = _update(bench, "north", number)
        decision = bench.receive("north", Offer(manifest=sound.model_copy(update={"federation": "elsewhere"})))
        written += len(decision.records)
        rules += [wait.rule for wait in said(decision, Wait, "north")]
    assert (written, rules) == (2, ["rate-updates"] * 3)


def test_an_update_that_is_offered_again_counts_once() -> None:
    """A site on a bad link repeats its offer as often as it likes."""
    bench = _bench(updates_per_hour=1)
    offer = Offer(manifest=_update(bench, "north"))
    for _ in range(5):
        assert said(bench.receive("north", offer), Wait, "north") == []


def test_bytes_have_a_rate_of_their_own() -> None:
    """Beyond it the rule is rate-bytes."""
    bench = _bench(mib_per_hour=1)
    size = _update(bench, "north").wire_bytes
    rules = []
    for number in range(2 * (1 << 20) // size):
        decision = bench.receive("north", Offer(manifest=_update(bench, "north", number)))
        rules += [wait.rule for wait in said(decision, Wait, "north")]
    assert rules
    assert set(rules) == {"rate-bytes"}


def test_a_flood_of_messages_is_not_looked_at() -> None:
    """Ten seconds' worth at once, then so many a second; another site is heard."""
    bench = _bench(messages_per_s=5.0)
    heard = [bench.core.intake.hears("north", bench.now) for _ in range(200)]
    assert heard == [True] * 50 + [False] * 150
    assert bench.core.intake.hears("south", bench.now)
    assert bench.core.intake.hears("north", bench.now + 1)


ODD: dict[str, tuple[dict[str, Any], float, int]] = {
    "norm-max": ({"norm_max": 5.0}, 5.1, 10),
    "norm-factor": ({"norm_factor": 3.0}, 3.1, 10),
    "examples-min": ({"examples_min": 20}, 1.0, 19),
    "examples-max": ({"examples_max": 20}, 1.0, 21),
}


@pytest.mark.parametrize("rule", ODD)
def test_a_sound_update_out_of_line_is_kept_apart(rule: str) -> None:
    """It is accepted, and not merged; its site is told the rule; the round does not wait for it."""
    section, norm, examples = ODD[rule]
    bench = _bench(**section)
    for number in range(8):
        update = _update(bench, f"s{number}", examples=20)
        bench.core.intake.saw(Accepted(update.transfer_id, "s", 0, 20, "00" * 32, "00" * 32, 1.0, 0.0))
    odd = _update(bench, "north", examples=examples)
    decision = _arrives(bench, "north", odd, norm)
    kinds = [type(record) for record in decision.records]
    assert kinds == [Accepted, Quarantined]
    (receipt,) = said(decision, Receipt, "north")
    assert (receipt.outcome, receipt.rule) == ("accepted", rule)
    ledger = bench.core.ledger
    assert ([*ledger.quarantined], ledger.pending) == ([odd.transfer_id], [])
    assert bench.core._answered == {"north"}
    assert vars(from_bytes(to_bytes(ledger))) == vars(ledger)


def test_what_is_usual_is_not_known_from_few() -> None:
    """The first updates of a run are nobody's outliers."""
    bench = _bench(norm_factor=2.0)
    for number, norm in enumerate((1.0, 50.0, 1.0)):
        _arrives(bench, f"s{number}", _update(bench, f"s{number}"), norm)
    assert bench.core.ledger.quarantined == {}


@pytest.mark.parametrize("release", [True, False])
def test_a_person_decides(release: bool) -> None:
    """Released it waits behind the others and is merged; dropped it never is; a second decision changes nothing."""
    bench = _bench(quorum=2, norm_max=5.0)
    odd = _update(bench, "north")
    _arrives(bench, "north", odd, 9.0)
    _arrives(bench, "south", _update(bench, "south"), 1.0)
    decision = bench.handle(d.Ruled(odd.transfer_id, release=release))
    assert [type(record) for record in decision.records] == [Released if release else Dropped]
    assert said(decision, Receipt, "north")[0].outcome == ("accepted" if release else "dropped")
    order = [update.site for update in bench.core.ledger.pending]
    assert order == (["south", "north"] if release else ["south"])
    assert bench.handle(d.Ruled(odd.transfer_id, release=True)).records == []
    after = Ledger()
    for record in bench.records:
        after.apply(record)
    assert vars(after) == vars(bench.core.ledger)


def test_who_is_released_too_late_is_dropped() -> None:
    """The limit of staleness counts from when the update would be merged."""
    bench = _bench(mode="fedasync", norm_max=5.0)
    odd = _update(bench, "north")
    _arrives(bench, "north", odd, 9.0)
    for number in range(2):
        bench.merged(_arrives(bench, "south", _update(bench, "south", number), 1.0))
    (dropped,) = bench.handle(d.Ruled(odd.transfer_id, release=True)).records
    assert isinstance(dropped, Dropped)
    assert dropped.rule == "too-stale"


def test_the_end_of_the_run_empties_the_quarantine() -> None:
    """Nothing is left without an answer."""
    bench = _bench(mode="fedasync", versions=1, norm_max=5.0)
    odd = _update(bench, "north")
    _arrives(bench, "north", odd, 9.0)
    bench.merged(_arrives(bench, "south", _update(bench, "south"), 1.0))
    assert bench.core.ledger.receipt(odd.transfer_id).rule == "run-complete"
    assert bench.core.ledger.quarantined == {}


def test_decisions_travel_as_files(tmp_path: Path) -> None:
    """What a person leaves is found, once each, and gone when it was carried out; other files are nobody's business."""
    assert list(rulings(tmp_path)) == []
    rule_on(tmp_path, "ab" * 16, "release")
    rule_on(tmp_path, "cd" * 16, "drop")
    (tmp_path / FOLDER / "note.txt").touch()
    first, second = rulings(tmp_path)
    assert (first, second) == (d.Ruled("ab" * 16, release=True), d.Ruled("cd" * 16, release=False))
    forget_ruling(tmp_path, first)
    assert list(rulings(tmp_path)) == [second]


@pytest.mark.parametrize(
    "section", [{"examples_min": 5, "examples_max": 4}, {"norm_max": -1.0}, {"messages_per_s": 0}, {"norm": 1}]
)
def test_a_section_that_makes_no_sense_is_refused(section: dict[str, Any]) -> None:
    """At the start, not at the first update."""
    with pytest.raises(ValidationError):
        AdmissionSection.model_validate(section)
