"""Updates on their way in: credits, fairness, resuming, and what is taken at all."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.decisions import CloseSpool, Decision, OpenSpool, Verify
from coordinator.uploads import PACE_RETRY_S, Uploads
from shared.manifest import Manifest
from shared.messages import Want
from shared.transfer import ReceiverState
from tests.cores import bits, jobs, said
from tests.factories import SLICE, make_federation, make_plan, make_state, make_update

PLAN = make_plan(make_federation())
BASE = make_state(PLAN, 0)
IDLE_S = 15.0


def _update(site: str, number: int = 0, frames: int = 8) -> Manifest:
    return make_update(PLAN, site, BASE, update_id=f"{site.encode().hex()}{number:04x}".ljust(32, "0"), frames=frames)


def _uploads(budget_chunks: int = 100, window: int = 4) -> Uploads:
    return Uploads(budget_bytes=budget_chunks * SLICE, window=window, idle_s=IDLE_S)


def _begin(uploads: Uploads, update: Manifest, *held: int, now: float = 0.0) -> Decision:
    """Offer an update and open its spool; the decision is that of the opening."""
    uploads.offer(update.update.site, update, now, Decision())
    out = Decision()
    uploads.opened(update.transfer_id, bits(update.frames, *held), now, out)
    return out


def _store(uploads: Uploads, update: Manifest, *indices: int, now: float = 0.0) -> Decision:
    out = Decision()
    uploads.stored(update.transfer_id, indices, now, out)
    return out


def _windows(out: Decision) -> dict[str | None, int]:
    return {send.site: send.message.window for send in out.sends if isinstance(send.message, Want)}


def test_an_offer_opens_the_spool_before_anything_is_promised() -> None:
    """What an earlier attempt left is looked at first; only then is anything wanted."""
    uploads, update, out = _uploads(), _update("a"), Decision()
    uploads.offer("a", update, 0.0, out)
    assert out == Decision(jobs=[OpenSpool(update)])


def test_when_our_link_is_back_senders_begin_anew_from_what_is_held() -> None:
    """What was on its way is lost. Who waits for credit, or is being verified, is told nothing."""
    uploads = _uploads(budget_chunks=6)
    half, whole, waits = _update("a"), _update("b", frames=2), _update("c")
    for update in (half, whole, waits):
        _begin(uploads, update)
    _store(uploads, half, 0, 2)
    _store(uploads, whole, 0, 1)
    _begin(uploads, _update("d", frames=2))
    out = Decision()
    uploads.link_up(9.0, out)
    told = {send.site: send.message for send in out.sends if isinstance(send.message, Want)}
    assert (told["a"].have, told["a"].restart, told["a"].window) == (bits(8, 0, 2), True, 4)
    assert "b" not in told
    assert uploads.reserved <= uploads.budget_bytes


def test_an_offer_repeated_while_the_spool_opens_gets_no_answer_yet() -> None:
    """The answer comes when the bitmap is known; a second open would race with the first."""
    uploads, update, out = _uploads(), _update("a"), Decision()
    uploads.offer("a", update, 0.0, Decision())
    uploads.offer("a", update, 1.0, out)
    assert out == Decision()


def test_a_resumed_upload_is_answered_with_what_is_there() -> None:
    """The first Want of a resumed upload carries the bitmap of the chunks that survived."""
    uploads, update = _uploads(), _update("a")
    (want,) = said(_begin(uploads, update, 0, 3), Want, "a")
    assert (want.transfer_id, want.have, want.window) == (update.transfer_id, bits(8, 0, 3), 4)


def test_an_offer_repeated_in_mid_upload_is_answered_with_what_is_there_now() -> None:
    """A site that asks again learns which chunks are durable by now, under the same credit."""
    uploads, update, out = _uploads(), _update("a"), Decision()
    _begin(uploads, update)
    _store(uploads, update, 0, 1)
    uploads.offer("a", update, 1.0, out)
    (want,) = said(out, Want, "a")
    assert (want.have, want.window) == (bits(8, 0, 1), 4)
    assert uploads.reserved == 4 * SLICE


def test_a_spool_that_is_full_already_is_verified_without_credit() -> None:
    """Everything is there from an earlier attempt: no chunk is wanted, no budget is held."""
    uploads, update = _uploads(), _update("a", frames=2)
    out = _begin(uploads, update, 0, 1)
    assert out.jobs == [Verify(update.transfer_id)]
    assert uploads.reserved == 0


def test_stored_chunks_are_acknowledged_and_the_last_one_starts_admission() -> None:
    """Each batch is answered; the full bitmap is verified once and its credit is free at once."""
    uploads, update = _uploads(), _update("a", frames=3)
    _begin(uploads, update)
    first = _store(uploads, update, 0, 2)
    assert [want.have for want in said(first, Want, "a")] == [bits(3, 0, 2)]
    assert first.jobs == []
    last = _store(uploads, update, 1)
    assert [want.have for want in said(last, Want, "a")] == [bits(3, 0, 1, 2)]
    assert last.jobs == [Verify(update.transfer_id)]
    assert uploads.reserved == 0
    assert _store(uploads, update, 1) == Decision()


def test_what_is_taken_of_the_data_topic() -> None:
    """A chunk is written when it is of an open upload of that very site, in range, and new."""
    uploads, update = _uploads(), _update("a", frames=3)
    assert not uploads.accepts("a", update.transfer_id, 0)
    uploads.offer("a", update, 0.0, Decision())
    assert not uploads.accepts("a", update.transfer_id, 0)  # its spool is not open yet
    uploads.opened(update.transfer_id, bits(3, 1), 0.0, Decision())
    assert uploads.accepts("a", update.transfer_id, 0)
    assert uploads.accepts("a", update.transfer_id, 2)
    assert not uploads.accepts("a", update.transfer_id, 1)
    assert not uploads.accepts("a", update.transfer_id, 3)
    assert not uploads.accepts("b", update.transfer_id, 0)
    assert not uploads.accepts("a", _update("a", 1).transfer_id, 0)
    _store(uploads, update, 0, 2)
    assert not uploads.accepts("a", update.transfer_id, 2)


def test_a_site_without_credit_is_told_to_wait_and_for_how_long() -> None:
    """When the budget is spent the answer is a window of 0 with a time to ask again."""
    uploads = _uploads(budget_chunks=4)
    _begin(uploads, _update("a"))
    (want,) = said(_begin(uploads, _update("b"), 5), Want, "b")
    assert (want.window, want.retry_s, want.have) == (0, PACE_RETRY_S, bits(8, 5))


def test_a_chunk_that_comes_without_credit_is_still_kept() -> None:
    """It is here already; throwing it away would only cost it a second time."""
    uploads, update = _uploads(budget_chunks=4), _update("b", frames=2)
    _begin(uploads, _update("a"))
    _begin(uploads, update)
    assert uploads.accepts("b", update.transfer_id, 0)
    assert _store(uploads, update, 0, 1).jobs == [Verify(update.transfer_id)]


def test_the_window_is_cut_to_the_rest_of_the_budget_and_to_the_update() -> None:
    """No more is granted than is free, nor more than the update has chunks."""
    uploads = _uploads(budget_chunks=5)
    assert _windows(_begin(uploads, _update("a", frames=2))) == {"a": 2}
    assert _windows(_begin(uploads, _update("b"))) == {"b": 3}
    assert uploads.reserved == 5 * SLICE


def test_those_who_wait_are_let_in_in_the_order_in_which_they_came() -> None:
    """First come, first served; one that comes later, or asks more often, does not overtake."""
    uploads = _uploads(budget_chunks=4)
    updates = {site: _update(site, frames=4) for site in "abcd"}
    for update in updates.values():
        _begin(uploads, update)
    for site in "dc":  # asking again is no way to the front
        uploads.offer(site, updates[site], 1.0, Decision())
    order = []
    for site in "abc":
        granted = _windows(_store(uploads, updates[site], 0, 1, 2, 3))
        order += [name for name, window in granted.items() if window and name != site]
    assert order == ["b", "c", "d"]


def test_asking_again_and_again_takes_no_memory() -> None:
    """A site waits in the queue once, however often it offers."""
    uploads, update = _uploads(budget_chunks=4), _update("b")
    _begin(uploads, _update("a"))
    _begin(uploads, update)
    for second in range(100):
        uploads.offer("b", update, float(second), Decision())
    assert len(uploads._waiting) == 1


def _ending(how: str, uploads: Uploads, update: Manifest) -> Decision:
    out = Decision()
    match how:
        case "complete":
            return _store(uploads, update, *range(update.frames))
        case "settled":
            uploads.settle(update.transfer_id, 1.0, out)
        case "gone":
            uploads.site_gone("a", 1.0, out)
        case "quiet":
            uploads.offer("b", _update("b"), IDLE_S, Decision())  # a sign of life of the one that waits
            uploads.tick(IDLE_S + 0.1, out)
        case "replaced":
            uploads.offer("a", _update("a", 1), 1.0, out)
    return out


@pytest.mark.parametrize("how", ["complete", "settled", "gone", "quiet", "replaced"])
def test_credit_goes_to_the_next_as_soon_as_an_upload_ends(how: str) -> None:
    """However an upload ends, the one that waits gets its window in the same decision."""
    uploads, first, second = _uploads(budget_chunks=4), _update("a"), _update("b")
    _begin(uploads, first)
    assert _windows(_begin(uploads, second)) == {"b": 0}
    out = _ending(how, uploads, first)
    assert _windows(out)["b"] == 4
    assert uploads.reserved == 4 * SLICE
    closed = how in {"gone", "quiet", "replaced"}
    assert (CloseSpool(first.transfer_id) in out.jobs) == closed
    assert not uploads.accepts("a", first.transfer_id, 0)


def test_an_upload_that_shows_life_is_not_closed() -> None:
    """Chunks and offers count as life; only silence of idle_s ends an upload."""
    uploads, update = _uploads(), _update("a")
    _begin(uploads, update)
    out = Decision()
    _store(uploads, update, 0, now=10.0)
    uploads.tick(10.0 + IDLE_S, out)
    uploads.offer("a", update, 20.0, Decision())
    uploads.tick(20.0 + IDLE_S, out)
    assert out == Decision()
    uploads.tick(20.1 + IDLE_S, out)
    assert out.jobs == [CloseSpool(update.transfer_id)]


def test_a_grant_counts_as_a_sign_of_life() -> None:
    """One that waited longer than idle_s is not closed right after it was let in."""
    uploads, first, second = _uploads(budget_chunks=4), _update("a"), _update("b")
    _begin(uploads, first)
    _begin(uploads, second)
    _store(uploads, first, *range(8), now=IDLE_S)
    out = Decision()
    uploads.tick(IDLE_S + 1, out)
    assert out.jobs == []


@pytest.mark.parametrize("complete", [False, True])
def test_disk_work_is_waited_for_however_long_it_takes(complete: bool) -> None:
    """While a spool opens or an update is verified it is our turn: the site's silence closes nothing."""
    uploads, update, out = _uploads(), _update("a", frames=1), Decision()
    uploads.offer("a", update, 0.0, Decision())
    if complete:
        uploads.opened(update.transfer_id, bits(1, 0), 0.0, Decision())
    uploads.tick(1000.0, out)
    uploads.site_gone("a", 1000.0, out)
    assert out == Decision()
    assert uploads.get(update.transfer_id) is not None


def test_a_site_has_one_upload_at_a_time() -> None:
    """An offer of something else closes what the site had under way, and only what that site had."""
    uploads, old, new, other = _uploads(), _update("a", 0), _update("a", 1), _update("b")
    _begin(uploads, old)
    _begin(uploads, other)
    out = Decision()
    uploads.offer("a", new, 1.0, out)
    assert out.jobs == [CloseSpool(old.transfer_id), OpenSpool(new)]
    assert uploads.get(other.transfer_id) is not None
    assert uploads.get(old.transfer_id) is None


def test_an_update_that_is_being_verified_is_not_given_up_for_the_next() -> None:
    """The site may offer its next update while admission still looks at the one before."""
    uploads, old, new, out = _uploads(), _update("a", 0, frames=1), _update("a", 1), Decision()
    _begin(uploads, old, 0)
    uploads.offer("a", new, 1.0, out)
    assert out.jobs == [OpenSpool(new)]
    settled = uploads.settle(old.transfer_id, 1.0, out)
    assert settled is not None
    assert settled.manifest is old


def test_a_spool_that_opens_after_its_upload_was_given_up_is_closed() -> None:
    """Its file must not stay open for ever."""
    uploads, old, out = _uploads(), _update("a", 0), Decision()
    uploads.offer("a", old, 0.0, Decision())
    uploads.offer("a", _update("a", 1), 0.0, Decision())
    uploads.opened(old.transfer_id, bits(8), 0.0, out)
    assert out.jobs == [CloseSpool(old.transfer_id)]


def test_chunks_of_an_earlier_attempt_that_become_durable_late_are_no_surprise() -> None:
    """A site that left and came back meets the slow disk's report of before: the new bitmap will hold them."""
    uploads, update = _uploads(), _update("a")
    _begin(uploads, update)
    uploads.site_gone("a", 1.0, Decision())
    uploads.offer("a", update, 1.1, Decision())
    assert _store(uploads, update, 0, 1) == Decision()
    out = Decision()
    uploads.opened(update.transfer_id, bits(8, 0, 1), 1.2, out)
    assert [want.have for want in said(out, Want, "a")] == [bits(8, 0, 1)]


def test_a_spool_that_is_reported_open_twice_is_open_once() -> None:
    """Offered, replaced and offered again before the disk answered: the first answer counts."""
    uploads, update, out = _uploads(), _update("a", 0), Decision()
    for each in (update, _update("a", 1), update):
        uploads.offer("a", each, 0.0, Decision())
    uploads.opened(update.transfer_id, bits(8), 0.0, Decision())
    uploads.opened(update.transfer_id, bits(8, 1), 0.0, out)
    assert out == Decision()


KNOWN = [_update(site, number, frames=6) for site in "abc" for number in (0, 1)]
MOVES = st.tuples(
    st.sampled_from(["offer", "opened", "stored", "offer", "opened", "stored", "settle", "gone", "tick"]),
    st.sampled_from(KNOWN),
    st.integers(0, 63),
)


@settings(max_examples=60)
@given(st.integers(1, 8), st.integers(1, 6), st.lists(MOVES, min_size=15, max_size=40))
def test_the_budget_holds_whatever_happens_in_whatever_order(
    budget: int, window: int, moves: list[tuple[str, Manifest, int]]
) -> None:
    """Grants never exceed the budget, nobody gets more than a window, and when all is over nothing is held."""
    uploads = Uploads(budget_bytes=budget * SLICE, window=window, idle_s=5.0)
    now = 0.0
    for move, update, mask in moves:
        site, out = update.update.site, Decision()
        now += 1.0
        match move:
            case "offer":
                uploads.offer(site, update, now, out)
            case "opened":
                uploads.opened(update.transfer_id, bytes([mask]), now, out)
            case "stored":
                indices = tuple(index for index in range(6) if mask >> index & 1)
                uploads.stored(update.transfer_id, indices, now, out)
            case "settle":
                uploads.settle(update.transfer_id, now, out)
            case "gone":
                uploads.site_gone(site, now, out)
            case _:
                uploads.tick(now, out)
        assert uploads.reserved <= budget * SLICE
        under_way = [upload for each in KNOWN if (upload := uploads.get(each.transfer_id)) is not None]
        assert uploads.reserved == sum(upload.reserved for upload in under_way)
        for upload in under_way:
            receiving = upload.receiver.state is ReceiverState.RECEIVING
            assert (upload.reserved > 0) == receiving
            assert upload.reserved <= min(window, 6) * SLICE
        arriving = [upload.site for upload in under_way if not upload.receiver.complete]
        assert len(arriving) == len(set(arriving))
        if any(upload.receiver.state is ReceiverState.PACED for upload in under_way):
            assert budget * SLICE - uploads.reserved < SLICE, "somebody waits although there is room"
        assert all(granted <= window for granted in _windows(out).values())
        assert not jobs(out, Verify) or move in {"opened", "stored"}
    for each in KNOWN:
        uploads.settle(each.transfer_id, now, Decision())
    assert uploads.reserved == 0


def test_a_window_that_was_cut_short_grows_when_there_is_room() -> None:
    """What a finished upload gives back goes to one that was granted little, if nobody waits for a first grant."""
    uploads = _uploads(budget_chunks=5, window=4)
    first, second = _update("a"), _update("b")
    _begin(uploads, first)
    assert _windows(_begin(uploads, second)) == {"b": 1}
    _store(uploads, first, *range(8))
    assert _windows(_store(uploads, second, 0)) == {"b": 4}
    assert uploads.reserved == 4 * SLICE


def test_who_waits_comes_before_who_has_little() -> None:
    """Room goes to the one without any credit first."""
    uploads = _uploads(budget_chunks=5, window=4)
    first, second, third = _update("a"), _update("b"), _update("c")
    for update in (first, second, third):
        _begin(uploads, update)
    assert _windows(_store(uploads, second, 0)) == {"b": 1}
    assert _windows(_store(uploads, first, *range(8)))["c"] == 4
    assert _windows(_store(uploads, second, 1)) == {"b": 1}
