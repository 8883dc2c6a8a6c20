"""Reading ahead of the MQTT library, which takes a packet's header from the socket byte by byte."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable

AHEAD_BYTES = 4096
"""Read at once where less is asked for: many small packets, and of a large one no more than is copied in no time."""


class ReadAhead:
    """Stands between the library and `recv(size)`, which reads from `sock` at most `size` bytes, b"" at its end.

    Each call of that is a system call, for which the interpreter's lock is let go: while other threads work, waiting
    for it again costs more than what was read.
    """

    def __init__(self, sock: socket.socket, recv: Callable[[int], bytes]) -> None:
        self._socket = sock
        self._recv = recv
        self._ahead = b""

    def recv(self, size: int) -> bytes:
        """Return at most `size` bytes, as `recv` would, and raise what it raises."""
        if not self._ahead:
            if size >= AHEAD_BYTES:
                return self._recv(size)
            self._ahead = self._recv(AHEAD_BYTES)
        data, self._ahead = self._ahead[:size], self._ahead[size:]
        return data

    @property
    def pending(self) -> bool:
        """Whether there are bytes that the socket does not show, because they were read, or decrypted, already."""
        return bool(self._ahead) or (isinstance(self._socket, ssl.SSLSocket) and self._socket.pending() > 0)
