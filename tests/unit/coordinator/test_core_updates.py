"""What becomes of an offered update: each way to its one outcome, recorded before it is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from coordinator import decisions as d
from coordinator.records import Accepted, Dropped, Rejected
from shared.manifest import Manifest
from shared.messages import LOST, Offer, Receipt, Wait, Want
from tests.cores import CoordinatorBench, bits, said
from tests.factories import SLICE, digest, make_federation, make_state, make_update, update_id_of


def _bench(versions: int = 9, limit: int = 1, mode: str = "fedasync") -> CoordinatorBench:
    return CoordinatorBench(
        make_federation(
            federation={"name": "ward", "versions": versions},
            aggregation={"mode": mode, "staleness": {"limit": limit}},
        )
    )


def _update(bench: CoordinatorBench, site: str = "north", **changes: Any) -> Manifest:
    return make_update(bench.plan, site, bench.state, **changes)


def _advance(bench: CoordinatorBench, versions: int) -> None:
    """Let versions go by."""
    for _ in range(versions):
        bench.merged(bench.upload("other", _update(bench, "other")))


def test_a_sound_update_is_accepted_with_all_that_the_merge_needs() -> None:
    """The record carries the manifest's facts and digest, and the norm that admission measured."""
    bench = _bench(mode="sync")
    update = _update(bench, examples=17)
    decision = bench.upload("north", update)
    assert decision.records == [
        Accepted(
            update_id=update.transfer_id,
            site="north",
            base_version=0,
            examples=17,
            manifest_sha256=update.digest,
            file_digest=update.file_digest,
            norm=1.0,
            at=1e9 + bench.now,
        )
    ]
    assert decision.sends == [
        d.Send("north", Receipt(update_id=update.transfer_id, manifest_sha256=update.digest, outcome="accepted"))
    ]


def test_an_update_that_fails_admission_is_rejected_and_its_bytes_go() -> None:
    """The receipt names the rule; the run goes on without it."""
    bench = _bench()
    update = _update(bench)
    bench.receive("north", Offer(manifest=update))
    bench.handle(d.SpoolOpened(update.transfer_id, bits(5, *range(5))))
    decision = bench.handle(d.VerifyFailed(update.transfer_id, "non-finite", "tensor w holds NaN"))
    assert decision.records == [
        Rejected(update.transfer_id, "north", update.digest, "non-finite", "tensor w holds NaN", 1e9 + bench.now)
    ]
    assert decision.jobs == [d.Discard(update.transfer_id)]
    (receipt,) = said(decision, Receipt, "north")
    assert (receipt.outcome, receipt.rule, receipt.detail) == ("rejected", "non-finite", "tensor w holds NaN")
    assert bench.core.uploads.reserved == 0


def test_a_long_reason_is_cut_to_what_a_record_holds() -> None:
    """A detail of any length is told in its first 500 characters."""
    bench = _bench()
    update = _update(bench)
    bench.receive("north", Offer(manifest=update))
    decision = bench.handle(d.VerifyFailed(update.transfer_id, "manifest-changed", "x" * 1000))
    assert said(decision, Receipt, "north")[0].detail == "x" * 500


def _forged(bench: CoordinatorBench, **facts: Any) -> Manifest:
    update = _update(bench)
    return update.model_copy(update={"facts": update.update.model_copy(update=facts)})


OFFERS: dict[str, Callable[[CoordinatorBench], Manifest]] = {
    "other-federation": lambda bench: _update(bench).model_copy(update={"federation": "other"}),
    "other-fingerprint": lambda bench: _update(bench).model_copy(update={"fingerprint": digest("x")}),
    "other-codec": lambda bench: _update(bench).model_copy(update={"codec": "bf16"}),
    "other-slice-size": lambda bench: _update(bench).model_copy(
        update={"slice_size": 2 * SLICE, "file_size": 10 * SLICE}
    ),
    "too-large": lambda bench: _update(bench, frames=24_000),
    "inflated-frames": lambda bench: _update(bench).model_copy(update={"frame_lengths": (900_000,) * 5}),
    "base-unknown": lambda bench: _forged(bench, base_digest=digest("x")),
}


@pytest.mark.parametrize("rule", OFFERS)
def test_an_offer_that_breaks_a_rule_is_rejected_before_a_byte_is_taken(rule: str) -> None:
    """Recorded under the rule's name and told in the same decision; no spool is opened."""
    bench = _bench()
    offered = OFFERS[rule](bench)
    decision = bench.receive("north", Offer(manifest=offered))
    (record,) = decision.records
    assert isinstance(record, Rejected)
    assert (record.update_id, record.site, record.rule) == (offered.transfer_id, "north", rule)
    (receipt,) = said(decision, Receipt, "north")
    assert (receipt.outcome, receipt.rule, receipt.manifest_sha256) == ("rejected", rule, offered.digest)
    assert decision.jobs == []


@pytest.mark.parametrize("when", ["before", "on its way", "accepted"])
def test_no_site_can_use_up_or_learn_of_an_update_of_another(when: str) -> None:
    """An offer in another's name is refused without a record, and changes nothing for the update that it names."""
    bench = _bench(mode="sync")
    update = _update(bench)
    if when == "on its way":
        bench.receive("north", Offer(manifest=update))
        bench.handle(d.SpoolOpened(update.transfer_id, bits(5)))
    if when == "accepted":
        bench.upload("north", update)
    decision = bench.receive("south", Offer(manifest=update))
    assert (decision.records, decision.jobs) == ([], [])
    assert [send.site for send in decision.sends] == ["south"]
    (receipt,) = said(decision, Receipt, "south")
    assert (receipt.outcome, receipt.rule, receipt.manifest_sha256) == ("rejected", "other-site", update.digest)
    if when == "before":
        bench.upload("north", update)
    if when == "on its way":
        bench.handle(d.ChunksStored(update.transfer_id, tuple(range(5))))
        bench.handle(d.Verified(update.transfer_id, 1.0))
    assert bench.core.ledger.receipt(update.transfer_id).outcome == "accepted"


def test_what_is_no_update_uses_up_no_id() -> None:
    """A state that a site offers is refused without a record: its id could be one that another site will use."""
    bench = _bench()
    update = _update(bench)
    offered = bench.state.model_copy(update={"transfer_id": update.transfer_id})
    decision = bench.receive("south", Offer(manifest=offered))
    assert [receipt.rule for receipt in said(decision, Receipt, "south")] == ["not-an-update"]
    assert (decision.records, decision.jobs) == ([], [])
    (record, *_) = bench.upload("north", update).records
    assert isinstance(record, Accepted)


def test_a_version_that_was_never_published_is_no_base() -> None:
    """A base version from the future, or from another run's history."""
    bench = _bench()
    decision = bench.receive("north", Offer(manifest=_forged(bench, base_version=1)))
    assert said(decision, Receipt, "north")[0].rule == "base-unknown"


def test_an_update_that_is_too_late_is_rejected_and_one_just_in_time_is_not() -> None:
    """The limit is on versions published since the update's base."""
    bench = _bench(limit=1)
    update, later = _update(bench), _update(bench, update_id=update_id_of("north", "later"))
    _advance(bench, 1)
    assert bench.receive("north", Offer(manifest=update)).jobs == [d.OpenSpool(update)]
    _advance(bench, 1)
    (receipt,) = said(bench.receive("north", Offer(manifest=later)), Receipt, "north")
    assert (receipt.outcome, receipt.rule, receipt.detail) == ("rejected", "too-stale", "more than 1 versions late")


def test_after_the_run_an_offer_is_rejected() -> None:
    """A site that comes too late gets its answer, and can leave."""
    bench = _bench(versions=1)
    update = _update(bench)
    _advance(bench, 1)
    (receipt,) = said(bench.receive("north", Offer(manifest=update)), Receipt, "north")
    assert (receipt.outcome, receipt.rule) == ("rejected", "run-complete")
    assert receipt.detail == "the run was complete at version 1"


def test_an_update_that_was_being_verified_when_the_run_ended_is_rejected() -> None:
    """It is too late for it to count, its bytes go, and nothing waits for a merge that will not come."""
    bench = _bench(versions=1)
    update = _update(bench)
    bench.receive("north", Offer(manifest=update))
    bench.handle(d.SpoolOpened(update.transfer_id, bits(5, *range(5))))
    _advance(bench, 1)
    decision = bench.handle(d.Verified(update.transfer_id, 1.0))
    assert [type(record) for record in decision.records] == [Rejected]
    assert said(decision, Receipt, "north")[0].rule == "run-complete"
    assert decision.jobs == [d.Discard(update.transfer_id)]
    assert bench.core.ledger.pending == []


def test_an_offer_of_a_known_update_gets_its_receipt_again() -> None:
    """Whatever its outcome by now, however often it is asked, and without another record."""
    bench = _bench(mode="sync")
    update = _update(bench)
    bench.upload("north", update)
    outcomes = [said(bench.receive("north", Offer(manifest=update)), Receipt, "north")[0].outcome]
    bench.merged(bench.tick(100.0))
    records = list(bench.records)
    again = bench.receive("north", Offer(manifest=update))
    outcomes.append(said(again, Receipt, "north")[0].outcome)
    assert outcomes == ["accepted", "merged"]
    assert bench.records == records
    assert again.jobs == []


def test_a_rejected_update_stays_rejected() -> None:
    """Offering it again does not make it better, also after a restart of the coordinator."""
    bench = _bench()
    bad = OFFERS["other-codec"](bench)
    bench.receive("north", Offer(manifest=bad))
    bench.boot()
    decision = bench.receive("north", Offer(manifest=bad))
    assert said(decision, Receipt, "north")[0].rule == "other-codec"
    assert decision.records == []


def test_an_id_that_was_used_before_is_not_used_again() -> None:
    """The same id with another manifest is answered about that manifest, and leaves the first one's fate alone."""
    bench = _bench(mode="sync")
    update = _update(bench, examples=10)
    other = _update(bench, examples=11)
    assert other.transfer_id == update.transfer_id
    bench.upload("north", update)
    decision = bench.receive("north", Offer(manifest=other))
    (receipt,) = said(decision, Receipt, "north")
    assert (receipt.outcome, receipt.rule, receipt.manifest_sha256) == ("rejected", "id-reused", other.digest)
    assert decision.records == []
    assert decision.jobs == []
    assert bench.core.ledger.receipt(update.transfer_id).outcome == "accepted"


def test_a_site_that_knows_anothers_id_cannot_use_it_up() -> None:
    """Offered in its own name, before the true owner offers it, nothing is recorded or begun; the owner's counts."""
    bench = _bench()
    update = _update(bench)
    decision = bench.receive("south", Offer(manifest=_update(bench, "south", update_id=update.transfer_id)))
    assert [receipt.rule for receipt in said(decision, Receipt, "south")] == ["foreign-id"]
    assert (decision.records, decision.jobs) == ([], [])
    (accepted,) = bench.upload("north", update).records
    assert accepted == bench.core.ledger.pending[0]


def test_an_id_that_is_on_its_way_is_not_used_twice() -> None:
    """Another manifest, also of another site, does not get the first one's bitmap; the first goes on."""
    bench = _bench()
    update = _update(bench)
    bench.receive("north", Offer(manifest=update))
    bench.handle(d.SpoolOpened(update.transfer_id, bits(5)))
    others = (_update(bench, examples=11), _update(bench, "south", update_id=update.transfer_id))
    rules = ("id-reused", "foreign-id")
    for site, other, rule in zip(("north", "south"), others, rules, strict=True):
        decision = bench.receive(site, Offer(manifest=other))
        assert [receipt.rule for receipt in said(decision, Receipt, site)] == [rule]
        assert said(decision, Want, "north") == []
        assert decision.records == []
    assert bench.core.uploads.accepts("north", update.transfer_id, 0)


@pytest.mark.parametrize("event", [d.Verified("0" * 32, 1.0), d.VerifyFailed("0" * 32, "non-finite", "")])
def test_a_result_that_nobody_waits_for_changes_nothing(event: d.Event) -> None:
    """It is about an upload that was settled already."""
    bench = _bench()
    assert bench.handle(event) == d.Decision()


@pytest.mark.parametrize("again", [d.Verified, d.VerifyFailed])
def test_a_result_that_comes_twice_counts_once(again: Any) -> None:
    """The second one finds the update decided."""
    bench = _bench(mode="sync")
    update = _update(bench)
    bench.upload("north", update)
    event = again(update.transfer_id, 1.0) if again is d.Verified else again(update.transfer_id, "non-finite", "")
    assert bench.handle(event) == d.Decision()


def test_an_update_that_resumes_from_disk_is_taken_as_it_is() -> None:
    """After a restart of the coordinator the spool's bitmap is what the site is told."""
    bench = _bench()
    update = _update(bench)
    bench.receive("north", Offer(manifest=update))
    bench.boot()
    assert bench.receive("north", Offer(manifest=update)).jobs == [d.OpenSpool(update)]
    (want,) = said(bench.handle(d.SpoolOpened(update.transfer_id, bits(5, 0, 1, 2))), Want, "north")
    assert (want.have, want.window) == (bits(5, 0, 1, 2), 4)
    assert make_state(bench.plan, 0).transfer_id != want.transfer_id == update.transfer_id


def test_an_update_that_cannot_be_taken_now_is_forgotten_and_its_site_told_why() -> None:
    """No record is made of it; offered again it begins anew, and is accepted like any other."""
    bench = _bench()
    update = _update(bench)
    bench.receive("north", Offer(manifest=update))
    decision = bench.handle(d.Postponed(update.transfer_id, "no-room", "1 MiB free", 15.0))
    assert decision.records == []
    assert said(decision, Wait, "north") == [
        Wait(transfer_id=update.transfer_id, rule="no-room", detail="1 MiB free", retry_s=15.0)
    ]
    assert bench.core.uploads.reserved == 0
    assert bench.handle(d.Postponed(update.transfer_id, "no-room", "1 MiB free", 15.0)).sends == []
    assert [type(record) for record in bench.upload("north", update).records] == [Accepted]


def test_an_update_that_is_overtaken_in_mid_upload_leaves_nothing_behind() -> None:
    """Offered again when it is too late, it is rejected, its upload ends and its bytes go."""
    bench = _bench(limit=0)
    update = _update(bench)
    bench.receive("north", Offer(manifest=update))
    bench.handle(d.SpoolOpened(update.transfer_id, bits(5, 0)))
    _advance(bench, 1)
    decision = bench.receive("north", Offer(manifest=update))
    assert said(decision, Receipt, "north")[0].rule == "too-stale"
    assert decision.jobs == [d.Discard(update.transfer_id)]
    assert bench.core.uploads.get(update.transfer_id) is None


def test_an_update_in_admission_is_not_overtaken() -> None:
    """Its bytes are all here and being read: what was in time when it was offered is in time."""
    bench = _bench(limit=0)
    update = _update(bench)
    bench.receive("north", Offer(manifest=update))
    bench.handle(d.SpoolOpened(update.transfer_id, bits(5, *range(5))))
    _advance(bench, 1)
    assert bench.receive("north", Offer(manifest=update)).records == []
    assert said(bench.handle(d.Verified(update.transfer_id, 1.0)), Receipt, "north")[0].outcome == "accepted"


def test_a_site_is_told_of_an_update_that_was_given_up() -> None:
    """On each hello, since its receipt said accepted and it may not have heard; other sites and fates are not told."""
    bench = _bench()
    lost, late = _update(bench, "north"), _update(bench, "north", update_id=update_id_of("north", "later"))
    for update, rule in ((lost, LOST), (late, "run-complete")):
        bench.upload("north", update)
        bench.records.append(Dropped(update.transfer_id, rule, 1.0))
    bench.boot("f" * 16)
    (receipt,) = said(bench.hello("north"), Receipt, "north")
    assert (receipt.update_id, receipt.outcome, receipt.rule) == (lost.transfer_id, "dropped", LOST)
    assert said(bench.hello("south"), Receipt) == []
