"""Sender and receiver of one transfer: every row of the tables, and the rules about loss and windows."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.transfer import (
    RECEIVER_TABLE,
    SENDER_TABLE,
    Bitmap,
    Receiver,
    ReceiverInput,
    ReceiverState,
    Sender,
    SenderInput,
    SenderState,
)


def _bits(size: int, *present: int) -> bytes:
    return Bitmap(size, present).to_bytes()


@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1)))))
def test_a_bitmap_survives_the_wire(case: tuple[int, set[int]]) -> None:
    """What goes into the bytes comes out, and missing() is the rest, ascending."""
    size, present = case
    again = Bitmap.from_bytes(size, Bitmap(size, present).to_bytes())
    assert len(again) == len(present)
    assert list(again.missing()) == sorted(set(range(size)) - present)
    assert again.full == (len(present) == size)


def test_a_bitmap_ignores_bits_beyond_its_size() -> None:
    """A peer that sets bits beyond the last chunk does not make a transfer full."""
    assert len(Bitmap.from_bytes(3, b"\xff\xff")) == 3
    assert len(Bitmap.from_bytes(12, b"\xff")) == 8


def _sender_in(state: SenderState) -> Sender:
    sender = Sender(4)
    sender.state = state
    return sender


_SENDER_MOVES = {
    SenderInput.WANT: lambda sender: sender.on_want(_bits(4), 2),
    SenderInput.PACE: lambda sender: sender.on_want(_bits(4), 0),
    SenderInput.RECEIPT: Sender.settle,
    SenderInput.RESTART: Sender.restart,
}


@pytest.mark.parametrize("state", SenderState)
@pytest.mark.parametrize("happened", SenderInput)
def test_every_row_of_the_senders_table(state: SenderState, happened: SenderInput) -> None:
    """The table is whole: each input is answered in each state, by the state that the table names."""
    sender = _sender_in(state)
    _SENDER_MOVES[happened](sender)
    assert sender.state is SENDER_TABLE[state, happened]


def test_a_sender_sends_nothing_before_it_is_asked_and_nothing_after_its_receipt() -> None:
    """Only a Want with a window lets chunks out."""
    sender = Sender(4)
    assert sender.take() == []
    sender.on_want(_bits(4), 0)
    assert sender.take() == []
    sender.on_want(_bits(4), 4)
    assert sender.take() == [0, 1, 2, 3]
    sender.settle()
    sender.on_want(_bits(4), 4)
    assert sender.take() == []


def test_a_sender_keeps_its_window() -> None:
    """Chunks in flight never exceed the window, and each acknowledgement makes room for as many."""
    sender = Sender(10)
    sender.on_want(_bits(10), 3)
    assert sender.take() == [0, 1, 2]
    assert sender.take() == []
    sender.on_want(_bits(10, 0, 1), 3)
    assert sender.take() == [3, 4]
    assert sender.in_flight == 3


def test_a_chunk_that_was_overtaken_is_lost_and_sent_again() -> None:
    """Order is kept on the way, so an acknowledged later chunk means that the earlier one is gone."""
    sender = Sender(6)
    sender.on_want(_bits(6), 4)
    assert sender.take() == [0, 1, 2, 3]
    sender.on_want(_bits(6, 0, 2), 4)
    assert sender.take() == [1, 4, 5]


def test_a_sender_may_be_held_to_the_chunks_before_one() -> None:
    """It sends what it lacks below that, within its window, and says what is left to send and how much may go."""
    sender = Sender(8)
    assert (sender.room, sender.unsent, sender.next_index) == (0, 8, 0)
    sender.on_want(_bits(8, 1), 4)
    assert (sender.room, sender.unsent, sender.next_index, sender.window) == (4, 7, 0, 4)
    assert sender.take(below=3) == [0, 2]
    assert (sender.room, sender.unsent, sender.next_index) == (2, 5, 3)
    assert sender.take(below=3) == []
    assert sender.take() == [3, 4]
    sender.on_want(_bits(8, 1, 3), 4)  # 0 and 2 are lost
    assert (sender.room, sender.unsent, sender.next_index) == (3, 5, 0)
    assert sender.take(below=3) == [0, 2]
    sender.on_want(_bits(8, *range(7)), 4)
    assert sender.take() == [7]
    assert (sender.room, sender.unsent, sender.next_index) == (3, 0, None)


def test_after_a_restart_everything_missing_may_be_sent_again() -> None:
    """A restart forgets what was in flight; the next bitmap decides."""
    sender = Sender(4)
    sender.on_want(_bits(4), 4)
    sender.take()
    sender.restart()
    assert sender.take() == []
    sender.on_want(_bits(4, 1), 2)
    assert sender.take() == [0, 2]


def test_a_receiver_that_lost_its_disk_gets_everything_again() -> None:
    """The latest bitmap counts, also when it holds less than an earlier one."""
    sender = Sender(3)
    sender.on_want(_bits(3, 0, 1), 3)
    sender.take()
    sender.restart()
    assert sender.on_want(_bits(3), 3) is False
    assert sender.take() == [0, 1, 2]


@given(st.integers(1, 60), st.integers(1, 9), st.floats(0, 0.6), st.integers(0, 2**32))
def test_any_loss_ends_with_everything_delivered(frames: int, window: int, loss: float, seed: int) -> None:
    """Whatever is lost on the way, rounds of want and send deliver all chunks, within the window at any time."""
    chance = random.Random(seed)
    sender, held = Sender(frames), set[int]()
    for turn in range(10_000):
        sender.on_want(_bits(frames, *held), window)
        sent = sender.take()
        assert sender.in_flight <= window
        arrived = {index for index in sent if chance.random() >= loss}
        held |= arrived
        if len(held) == frames:
            return
        if not arrived:
            sender.restart()
        assert turn < 9_999


_RECEIVER_MOVES = {
    ReceiverInput.OPENED: lambda receiver: receiver.opened(_bits(2)),
    ReceiverInput.CREDIT: lambda receiver: receiver.credit(granted=True),
    ReceiverInput.NO_CREDIT: lambda receiver: receiver.credit(granted=False),
    ReceiverInput.STORED: lambda receiver: receiver.stored([0]),
    ReceiverInput.FILLED: lambda receiver: receiver.stored([0, 1]),
    ReceiverInput.CLOSE: Receiver.close,
}


@pytest.mark.parametrize("state", ReceiverState)
@pytest.mark.parametrize("happened", ReceiverInput)
def test_every_row_of_the_receivers_table(state: ReceiverState, happened: ReceiverInput) -> None:
    """Where the table has a row the receiver moves as it says; where it has none the input cannot happen."""
    receiver = Receiver(2)
    receiver.state = state
    if state is ReceiverState.COMPLETE:
        receiver.have = Bitmap(2, [0, 1])
    wanted = RECEIVER_TABLE.get((state, happened))
    if state is ReceiverState.COMPLETE and happened is ReceiverInput.FILLED:
        wanted = ReceiverState.COMPLETE  # it is full already: a doubled chunk is STORED
    if wanted is None:
        with pytest.raises(KeyError):
            _RECEIVER_MOVES[happened](receiver)
    else:
        _RECEIVER_MOVES[happened](receiver)
        assert receiver.state is wanted


def test_a_receiver_that_finds_everything_on_disk_is_complete_at_once() -> None:
    """A full spool left by an earlier process needs no chunk."""
    receiver = Receiver(2)
    receiver.opened(_bits(2, 0, 1))
    assert receiver.complete
    assert not receiver.open


def test_a_receiver_counts_only_new_chunks() -> None:
    """A doubled chunk is taken without harm and counted as nothing."""
    receiver = Receiver(3)
    receiver.opened(_bits(3))
    receiver.credit(granted=True)
    assert receiver.stored([0, 1, 1]) == 2
    assert receiver.stored([0]) == 0
    assert receiver.stored([2]) == 1
    assert receiver.complete
