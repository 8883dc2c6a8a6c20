"""A site's decisions about its sealed updates: offered, sent as wanted, kept until their receipt."""

from __future__ import annotations

from typing import Any

import pytest

from edge_client import decisions as d
from edge_client.session import RETRAIN_S
from shared.manifest import Manifest
from shared.messages import Offer, Receipt, Wait
from tests.sessions import STALL_S, SessionBench, jobs, other_digest, sent

FIRST, SECOND = (SessionBench().update(version, frames=8) for version in (0, 1))


def _pushing() -> SessionBench:
    """Connected and welcome, with two sealed updates; the first is offered."""
    bench = SessionBench(outbox=[FIRST, SECOND])
    assert bench.connect().sends == [Offer(manifest=FIRST)]
    return bench


def _sent(bench: SessionBench, count: int) -> None:
    for _ in range(count):
        bench.handle(d.ChunkSent(FIRST.transfer_id))


def test_the_oldest_update_is_offered_when_we_are_welcome() -> None:
    """Not before, and one at a time."""
    bench = SessionBench(outbox=[FIRST, SECOND])
    assert not sent(bench.handle(d.LinkUp()), Offer)
    assert bench.welcome().sends == [Offer(manifest=FIRST)]
    assert bench.tick(1.0).sends == []


def test_a_fresh_update_is_offered_at_once() -> None:
    """Sealed while we are welcome and nothing else is on its way."""
    bench = SessionBench()
    bench.connect()
    assert bench.handle(d.Trained(FIRST)).sends == [Offer(manifest=FIRST)]
    assert bench.handle(d.Trained(SECOND)).sends == []


def test_chunks_go_out_as_the_coordinator_wants_them() -> None:
    """Within its window, lowest missing first, never what it holds."""
    bench = _pushing()
    assert bench.want(FIRST, 0, 2).jobs == [d.SendChunks(FIRST.transfer_id, (1, 3, 4, 5))]
    assert bench.want(FIRST, 0, 2).jobs == []
    assert bench.want(FIRST, 0, 1, 2, 3).jobs == [d.SendChunks(FIRST.transfer_id, (6, 7))]


def test_what_a_coordinator_missed_is_sent_again_when_it_says_so() -> None:
    """Its link was away: all that it lacks goes out at once. What the link here still holds will arrive by itself."""
    bench = _pushing()
    bench.want(FIRST)
    _sent(bench, 3)
    assert bench.want(FIRST, 0, restart=True).jobs == [d.SendChunks(FIRST.transfer_id, (4,))]
    _sent(bench, 2)
    assert bench.want(FIRST, 0, restart=True).jobs == [d.SendChunks(FIRST.transfer_id, (1, 2, 3, 4))]


def test_a_want_of_something_else_is_not_answered() -> None:
    """About the update that waits its turn, or one that was never ours."""
    bench = _pushing()
    assert bench.want(SECOND) == d.Decision()
    assert bench.want(bench.update(7)) == d.Decision()
    assert SessionBench().want(FIRST) == d.Decision()


def test_an_offer_that_gets_no_answer_is_repeated() -> None:
    """Ever more slowly, until something comes."""
    bench = _pushing()
    assert bench.ticks(31) == [(at, Offer(manifest=FIRST)) for at in (5.0, 15.0, 30.0)]


def test_told_to_wait_it_offers_again_after_that_time() -> None:
    """A Want without a window sends nothing, and names the time."""
    bench = _pushing()
    assert bench.want(FIRST, window=0, retry_s=12.0) == d.Decision()
    assert bench.ticks(12.0) == [(12.0, Offer(manifest=FIRST))]
    assert bench.want(FIRST).jobs == [d.SendChunks(FIRST.transfer_id, (0, 1, 2, 3))]


def test_while_chunks_wait_for_a_slow_link_nothing_is_asked_again() -> None:
    """The wait begins with the last chunk that the broker took; a dead link shows as such."""
    bench = _pushing()
    bench.want(FIRST)
    _sent(bench, 3)
    assert bench.ticks(100.0) == []
    _sent(bench, 1)
    assert bench.ticks(STALL_S) == [(STALL_S, Offer(manifest=FIRST))]


def test_each_chunk_that_the_broker_took_is_progress() -> None:
    """A link that takes a chunk now and then is slow, not stalled."""
    bench = _pushing()
    bench.want(FIRST, window=1)
    for held in range(1, 4):
        assert bench.ticks(STALL_S - 1) == []
        _sent(bench, 1)
        assert bench.ticks(STALL_S - 1) == []
        bench.want(FIRST, *range(held), window=1)


def test_chunks_of_something_else_do_not_count_as_ours() -> None:
    """A late word about an update that is settled does not shorten the wait of the next."""
    bench = _pushing()
    bench.want(FIRST)
    for _ in range(4):
        bench.handle(d.ChunkSent(SECOND.transfer_id))
    assert bench.ticks(100.0) == []
    _sent(bench, 9)
    assert bench.session.push is not None
    assert bench.session.push.unsent == 0


def test_after_a_stall_everything_missing_is_sent_again() -> None:
    """The offer starts the conversation over, and the next bitmap says what was lost."""
    bench = _pushing()
    bench.want(FIRST)
    _sent(bench, 4)
    bench.ticks(STALL_S)
    assert bench.want(FIRST, 1).jobs == [d.SendChunks(FIRST.transfer_id, (0, 2, 3, 4))]


def test_a_want_that_repeats_itself_is_no_progress() -> None:
    """The coordinator answers, but holds no more than before: the stall goes on."""
    bench = _pushing()
    bench.want(FIRST)
    _sent(bench, 4)
    bench.now += STALL_S - 1
    bench.want(FIRST)
    assert sent(bench.tick(1.0), Offer)


def test_a_want_that_holds_more_is_progress() -> None:
    """Everything is sent; each acknowledgement starts the wait for the receipt anew."""
    bench = _pushing()
    bench.want(FIRST, 0, 1, 2, 3)
    _sent(bench, 4)
    bench.now += STALL_S - 1
    bench.want(FIRST, 0, 1, 2, 3, 4)
    assert not sent(bench.tick(1.0), Offer)
    assert sent(bench.tick(STALL_S - 1), Offer)


def test_a_receipt_ends_it_and_the_next_one_follows() -> None:
    """The receipt is kept, and the next update is offered in the same decision."""
    bench = _pushing()
    receipt = bench.receipt(FIRST)
    decision = bench.receive(receipt)
    assert decision == d.Decision(sends=[Offer(manifest=SECOND)], jobs=[d.Settle(receipt)])
    assert bench.session.outbox == [SECOND]
    assert bench.want(FIRST) == d.Decision()


def test_a_receipt_out_of_turn_is_kept_too() -> None:
    """About the update that still waits, from an earlier connection: it is not offered any more."""
    bench = _pushing()
    assert bench.receive(bench.receipt(SECOND)).sends == []
    assert bench.session.outbox == [FIRST]
    assert bench.want(FIRST).jobs == [d.SendChunks(FIRST.transfer_id, (0, 1, 2, 3))]


def test_the_later_word_that_it_was_merged_is_kept() -> None:
    """The update is settled already; what became of it replaces the first receipt."""
    bench = _pushing()
    bench.receive(bench.receipt(FIRST))
    merged = bench.receipt(FIRST, outcome="merged", version=1, staleness=0, weight=1.0)
    assert bench.receive(merged) == d.Decision(jobs=[d.Settle(merged)])


def test_a_receipt_for_another_manifest_is_not_ours() -> None:
    """The id fits but the bytes that were decided on are not those that are sealed here: nothing is deleted."""
    bench = _pushing()
    assert bench.receive(bench.receipt(FIRST, manifest_sha256=other_digest())) == d.Decision()
    assert bench.session.outbox == [FIRST, SECOND]


@pytest.mark.parametrize("lost", ["connection", "coordinator"])
def test_a_lost_peer_starts_the_conversation_over(lost: str) -> None:
    """Nothing is counted as in flight over the new connection, or to the new process."""
    bench = _pushing()
    bench.announce(bench.state())
    bench.want(FIRST)
    if lost == "connection":
        bench.handle(d.LinkDown())
        assert bench.want(FIRST) == d.Decision()
        bench.handle(d.LinkUp())
    else:
        bench.announce(bench.state(), boot="d" * 16)
    assert sent(bench.welcome("d" * 16), Offer) == [Offer(manifest=FIRST)]
    assert jobs(bench.want(FIRST, 1), d.SendChunks) == [d.SendChunks(FIRST.transfer_id, (0, 2, 3, 4))]


@pytest.mark.parametrize("outcome", ["accepted", "rejected", "merged", "dropped"])
def test_every_outcome_settles(outcome: Any) -> None:
    """A rejected update is answered too; offering it again would not make it better."""
    bench = SessionBench(outbox=[FIRST])
    bench.connect()
    receipt: Receipt = bench.receipt(FIRST, outcome=outcome)
    assert bench.receive(receipt).jobs == [d.Settle(receipt)]
    outbox: list[Manifest] = bench.session.outbox
    assert outbox == []


def test_an_update_that_the_coordinator_cannot_take_is_offered_again_when_it_said() -> None:
    """Also in the middle of sending: what is in flight is forgotten, and nothing goes out before."""
    bench = _pushing()
    assert bench.want(FIRST).jobs
    _sent(bench, 4)
    wait = Wait(transfer_id=FIRST.transfer_id, rule="no-room", detail="1 MiB free", retry_s=12.0)
    assert bench.receive(wait) == d.Decision()
    assert bench.receive(wait.model_copy(update={"transfer_id": SECOND.transfer_id})) == d.Decision()
    assert bench.ticks(13) == [(12.0, Offer(manifest=FIRST))]
    assert bench.want(FIRST).jobs == [d.SendChunks(FIRST.transfer_id, (0, 1, 2, 3))]


def _rejected_on_the_newest() -> SessionBench:
    """A site whose only update, of the newest state, was rejected; it has nothing to do."""
    update = SessionBench().update()
    bench = SessionBench(outbox=[update], trained={update.update.base_digest})
    bench.connect()
    bench.announce()
    bench.opened(bench.state(), *range(5))
    bench.pulled(bench.state())
    bench.receive(bench.receipt(update, outcome="rejected", rule="non-finite"))
    return bench


def test_a_site_whose_update_was_lost_trains_again_when_nothing_newer_comes() -> None:
    """It was accepted and settled; the coordinator's word, repeated on each hello, does not put the day off."""
    bench = SessionBench()
    bench.connect()
    bench.announce()
    bench.pulled(bench.state())
    update = bench.update()
    bench.handle(d.Trained(update))
    bench.receive(bench.receipt(update))
    bench.handle(d.Lost(bench.state().file_digest))
    assert not jobs(bench.tick(RETRAIN_S - 1), d.Train)
    bench.handle(d.Lost(bench.state().file_digest))
    assert jobs(bench.tick(1), d.Train) == [d.Train(bench.state())]


def test_a_rejected_site_trains_again_when_nothing_newer_comes() -> None:
    """If everybody's update was rejected, nobody else makes the next version; not at once, and ever more rarely."""
    bench = _rejected_on_the_newest()
    assert not jobs(bench.tick(RETRAIN_S - 1), d.Train)
    assert jobs(bench.tick(1.0), d.Train) == [d.Train(bench.state())]
    again = bench.update(update_id="e" * 32)
    bench.handle(d.Trained(again))
    bench.receive(bench.receipt(again, outcome="rejected", rule="non-finite"))
    assert not jobs(bench.tick(2 * RETRAIN_S - 1), d.Train)
    bench.welcome()
    assert jobs(bench.tick(1.0), d.Train) == [d.Train(bench.state())]


def test_a_rejected_site_goes_on_with_what_is_newer() -> None:
    """The state whose update was rejected is history then."""
    bench = _rejected_on_the_newest()
    bench.announce(bench.state(1))
    bench.opened(bench.state(1), *range(5))
    assert jobs(bench.pulled(bench.state(1)), d.Train) == [d.Train(bench.state(1))]
    bench.handle(d.Trained(bench.update(1)))
    assert not jobs(bench.tick(10 * RETRAIN_S), d.Train)
