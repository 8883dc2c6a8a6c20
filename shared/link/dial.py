"""TCP and TLS to one broker without a thread, so that giving up or closing takes effect at once."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl

from shared.link.endpoints import Endpoint

KEEPALIVE_PROBES = 3


class WatchedTlsSocket(ssl.SSLSocket):
    """A TLS socket that remembers why reading failed.

    With TLS 1.3 a broker refuses a client certificate only after the handshake, and the MQTT library would report no
    more than a lost connection.
    """

    failure: ssl.SSLError | None = None

    def recv(self, buflen: int = 1024, flags: int = 0) -> bytes:
        """As the base class, which see."""
        try:
            return super().recv(buflen, flags)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except ssl.SSLError as error:
            self.failure = error
            raise


async def dial(endpoint: Endpoint, tls: ssl.SSLContext | None, *, dead_after_s: float) -> socket.socket:
    """A connected non-blocking socket, after the TLS handshake where the endpoint wants one.

    `dead_after_s`: how long nothing may come from the peer before the kernel asks whether it is there; as long again
    without an answer ends the connection. Raises OSError, of which ssl.SSLError is one; the caller sets the deadline.
    """
    loop = asyncio.get_running_loop()
    failure: OSError | None = None
    found = await loop.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM)
    for family, kind, protocol, _, address in found:
        raw = socket.socket(family, kind, protocol)
        try:
            raw.setblocking(False)
            _tune(raw, dead_after_s)
            await loop.sock_connect(raw, address)
        except OSError as error:
            raw.close()
            failure = error
            continue
        except asyncio.CancelledError:
            raw.close()
            raise
        return raw if tls is None else await _handshake(raw, tls, endpoint.host)
    raise failure or OSError(f"{endpoint.host} has no address")


def _tune(raw: socket.socket, dead_after_s: float) -> None:
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # Where these are missing MQTT's keepalive, which is slower, finds a dead peer alone. Not TCP_USER_TIMEOUT: it also
    # ends a connection whose peer is alive and reads slowly.
    seconds = max(1, round(dead_after_s))
    for name, value in (
        ("TCP_KEEPIDLE", seconds),
        ("TCP_KEEPINTVL", max(1, round(dead_after_s / KEEPALIVE_PROBES))),
        ("TCP_KEEPCNT", KEEPALIVE_PROBES),
    ):
        if hasattr(socket, name):
            raw.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


async def _handshake(raw: socket.socket, tls: ssl.SSLContext, host: str) -> ssl.SSLSocket:
    with contextlib.ExitStack() as unless_done:
        unless_done.callback(raw.close)
        tls.sslsocket_class = WatchedTlsSocket
        secure = tls.wrap_socket(raw, server_hostname=host, do_handshake_on_connect=False)
        unless_done.callback(secure.close)
        while True:
            try:
                secure.do_handshake()
            except ssl.SSLWantReadError:
                await _ready(secure, writing=False)
            except ssl.SSLWantWriteError:
                await _ready(secure, writing=True)
            else:
                unless_done.pop_all()
                return secure


async def _ready(sock: socket.socket, *, writing: bool) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not ready.done():
            ready.set_result(None)

    add, remove = (loop.add_writer, loop.remove_writer) if writing else (loop.add_reader, loop.remove_reader)
    add(sock.fileno(), wake)
    try:
        await ready
    finally:
        remove(sock.fileno())
