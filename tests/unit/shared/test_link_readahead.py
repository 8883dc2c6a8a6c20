"""Reading ahead: the same bytes in the same order, with fewer reads."""

from __future__ import annotations

import socket

from hypothesis import given
from hypothesis import strategies as st

from shared.link.readahead import AHEAD_BYTES, ReadAhead


class _Line:
    """What comes in, in the pieces in which it comes; `reads` are the sizes that were asked for."""

    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces = pieces
        self.reads: list[int] = []

    def recv(self, size: int) -> bytes:
        self.reads.append(size)
        if not self.pieces:
            raise BlockingIOError
        piece, self.pieces[0] = self.pieces[0][:size], self.pieces[0][size:]
        if not self.pieces[0]:
            del self.pieces[0]
        return piece


def _all_of(ahead: ReadAhead, sizes: list[int]) -> bytes:
    got, turn = b"", 0
    while True:
        try:
            got += ahead.recv(sizes[turn % len(sizes)])
        except BlockingIOError:
            return got
        turn += 1


@given(
    pieces=st.lists(st.binary(min_size=1, max_size=3 * AHEAD_BYTES), max_size=6),
    sizes=st.lists(st.integers(1, 2 * AHEAD_BYTES), min_size=1, max_size=5),
)
def test_the_same_bytes_come_in_the_same_order(pieces: list[bytes], sizes: list[int]) -> None:
    """However they arrive and are asked for; in the end nothing is left behind unseen."""
    with socket.socket() as sock:
        ahead = ReadAhead(sock, _Line([*pieces]).recv)
        assert _all_of(ahead, sizes) == b"".join(pieces)
        assert not ahead.pending


def test_many_small_packets_take_one_read() -> None:
    """Ten acknowledgements, asked for by the byte, are one system call and the one that finds no more."""
    line = _Line([bytes(40)])
    with socket.socket() as sock:
        ahead = ReadAhead(sock, line.recv)
        assert ahead.recv(1) == b"\0"
        assert ahead.pending
        assert _all_of(ahead, [1]) == bytes(39)
    assert line.reads == [AHEAD_BYTES, AHEAD_BYTES]


def test_a_large_payload_is_read_straight() -> None:
    """What is as large as a whole look ahead is not copied through it."""
    line = _Line([bytes(10 * AHEAD_BYTES)])
    with socket.socket() as sock:
        ahead = ReadAhead(sock, line.recv)
        ahead.recv(2)
        assert len(ahead.recv(9 * AHEAD_BYTES)) == AHEAD_BYTES - 2
        assert len(ahead.recv(9 * AHEAD_BYTES)) == 9 * AHEAD_BYTES
    assert line.reads == [AHEAD_BYTES, 9 * AHEAD_BYTES]


def test_the_end_is_told_after_all_that_came_before_it() -> None:
    """A connection that was closed behind its last packet gives that packet first."""
    left = [b"last", b""]
    with socket.socket() as sock:
        ahead = ReadAhead(sock, lambda _size: left.pop(0))
        assert [ahead.recv(3), ahead.recv(3), ahead.recv(3)] == [b"las", b"t", b""]
