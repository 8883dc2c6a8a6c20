"""The link: one side's lasting line to the broker, over as many connections as it takes.

    async with Link(options) as link:
        async for event in link.events():
            ...
        await link.publish(topic, payload)

Sessions at the broker are always clean and every publication is QoS 1. Nothing is repeated by the link: whoever
published through a connection that went away is told so, and decides anew after the next `Connected`.

What waits in memory: at most MAX_INFLIGHT publications towards the broker; towards this side whatever was published to
its topics and not yet read, which the credits of the transfers bound. A limit here would have to throw away messages
that the MQTT library has acknowledged already.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import ssl
import time
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Self

import structlog
from aiomqtt import MqttError, ProtocolVersion

from shared.errors import MailboatError, UnavailableError
from shared.link import backoff, refusals
from shared.link.backoff import Backoff
from shared.link.client import Connection, ConnectRefusedError, HungUpError, Shared
from shared.link.counters import Counters
from shared.link.dial import WatchedTlsSocket, dial
from shared.link.endpoints import Endpoint, parse_endpoints, read_password, tls_context
from shared.link.model import Connected, Disconnected, Event, LinkDownError, LinkOptions, Packet, Publication

WAITING_BYTES_MAX = 2 * 1024 * 1024
"""Messages taken from the network that nobody has asked for yet; above this, no more are taken for a while."""
FAREWELL_S = 2.0
"""Longest wait for the acknowledgement of the last message when closing."""
FIRST_ANSWER_S = 1.0
"""Shortest wait for the answer to a first CONNECT in MQTT 5, before 3.1.1 is tried."""
PROTOCOL_NAMES = {ProtocolVersion.V5: "5", ProtocolVersion.V311: "3.1.1"}

_log = structlog.get_logger("link")


class _FailedError(Exception):
    """One attempt to connect has failed; `answered` when it was the broker that said no."""

    def __init__(self, text: str, *, answered: bool) -> None:
        super().__init__(text)
        self.answered = answered


class Link:
    """Connects on entry and again after each drop; reports on `events`, counts on `counters`."""

    def __init__(self, options: LinkOptions, *, chance: random.Random | None = None) -> None:
        """ConfigError for a URL, password file or certificate that cannot be used; nothing is dialled yet."""
        self.options = options
        self.counters = Counters()
        self._endpoints = parse_endpoints(options.broker.url)
        self._tls = tls_context(options.broker) if any(endpoint.tls for endpoint in self._endpoints) else None
        if self._tls is not None:
            self._tls.sslsocket_class = WatchedTlsSocket
        self._shared = Shared(options, read_password(options.broker), self.counters, self._take_in)
        self._chance = chance or random.Random()  # from the system's entropy: no two sites in step
        self._queue: asyncio.Queue[Event | BaseException | None] = asyncio.Queue()
        self._held: list[Packet] | None = None
        self._waiting_bytes = 0
        self._connection: Connection | None = None
        self._runner: asyncio.Task[None] | None = None
        self._spoken: dict[Endpoint, ProtocolVersion] = {}
        self._doubtful: set[Endpoint] = set()
        self._usual_s: float | None = None
        self._stalls = 0

    # -- life ----------------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        """Start connecting and return at once."""
        self._runner = asyncio.create_task(self._run(), name="link")
        self._runner.add_done_callback(self._ended)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Publish the will ourselves, say DISCONNECT and stop; bounded by a few seconds."""
        connection, self._connection = self._connection, None
        try:
            if connection is not None:
                if self.options.will is not None:
                    with contextlib.suppress(MailboatError, TimeoutError):
                        async with asyncio.timeout(FAREWELL_S):
                            await connection.post(self.options.will)
                await connection.close()
        finally:
            assert self._runner is not None
            self._runner.cancel()
            if connection is not None:
                connection.abandon("closed by this side")
        await asyncio.wait([self._runner])

    def _ended(self, runner: asyncio.Task[None]) -> None:
        self._queue.put_nowait(None if runner.cancelled() else runner.exception())

    # -- use -----------------------------------------------------------------------------------------------------------

    @property
    def connected(self) -> bool:
        """Whether a connection stands now."""
        return self._connection is not None

    async def events(self) -> AsyncIterator[Event]:
        """What happens, in order; for one reader at a time. Ends when the link is closed.

        Raises RefusedError or ConfigError when the broker refuses what trying again cannot mend, and UnavailableError
        when there is no first connection within `give_up_s`. The link has ended then.
        """
        while (item := await self._queue.get()) is not None:
            if isinstance(item, BaseException):
                self._queue.put_nowait(item)  # whoever asks again is told again
                raise item
            if isinstance(item, Packet):
                self._waiting_bytes -= len(item.payload)
                if self._waiting_bytes <= WAITING_BYTES_MAX // 2 and self._connection is not None:
                    self._connection.go_on()
            yield item
        self._queue.put_nowait(None)

    async def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Publish with QoS 1; returns when the broker has acknowledged, however long that takes.

        Raises LinkDownError when there is no connection or it goes away first (the message may have got through all
        the same), and RefusedError when an MQTT 5 broker refuses it; one of 3.1.1 has no way to say so.
        """
        if self._connection is None:
            raise LinkDownError("there is no connection to the broker now", hint="publish again after `Connected`")
        await self._connection.post(Publication(topic, payload, retain))

    # -- the loop ------------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        state, turn = Backoff(since=time.monotonic()), 0
        last_words = "no attempt was made"
        try:
            async with asyncio.timeout(self.options.give_up_s) as first_contact:
                while True:
                    endpoint = self._endpoints[turn % len(self._endpoints)]
                    turn += 1
                    try:
                        connection = await self._attempt(endpoint, state)
                    except _FailedError as failure:
                        last_words = f"{endpoint}: {failure}"
                        state = backoff.failed(state, answered=failure.answered)
                        self._report(endpoint, state, str(failure))
                    else:
                        first_contact.reschedule(None)
                        state = await self._stay(connection, state)
                    await asyncio.sleep(self._delay_s(state))
        except TimeoutError:
            places = ", ".join(str(endpoint) for endpoint in self._endpoints)
            raise UnavailableError(
                f"no connection to a broker at {places} within {self.options.give_up_s:g} s (last: {last_words})",
                hint="check that the broker runs, that broker.url names it, and that a firewall lets this machine out",
            ) from None

    def _delay_s(self, state: Backoff) -> float:
        cap_s = self.options.link.backoff_cap_s
        return backoff.delay_s(state, now=time.monotonic(), cap_s=cap_s, uniform=self._chance.uniform)

    def _report(self, endpoint: Endpoint, state: Backoff, reason: str) -> None:
        first = state.unreachable + state.turned_away == 1  # an outage is one event, not one for each attempt
        (_log.warning if first else _log.debug)("no connection to the broker", broker=str(endpoint), reason=reason)

    async def _attempt(self, endpoint: Endpoint, state: Backoff) -> Connection:
        """One connection with all subscriptions and hellos; _FailedError when trying again may help."""
        started = time.monotonic()
        patience_s = backoff.patience_s(outage_s=started - state.since, usual_s=self._usual_s)
        protocol = self._protocol(endpoint)
        try:
            async with asyncio.timeout(patience_s):
                connection = await self._set_up(endpoint, protocol)
        except TimeoutError:
            raise _FailedError(f"no answer within {patience_s:.1f} s", answered=False) from None
        except ConnectRefusedError as refused:
            if refused.code == refusals.UNSUPPORTED_PROTOCOL and protocol is ProtocolVersion.V5:
                self._spoken[endpoint] = ProtocolVersion.V311
                return await self._attempt(endpoint, state)
            if fatal := refusals.connect_refusal(refused.code, str(endpoint), self.options.client_id):
                raise fatal from None
            raise _FailedError(f"the broker refuses: {refused}", answered=True) from None
        except HungUpError as hung_up:
            if endpoint not in self._spoken and protocol is ProtocolVersion.V5:
                # Perhaps a broker that does not know MQTT 5 and cannot say so; or just the network.
                self._doubtful.add(endpoint)
                return await self._attempt(endpoint, state)
            self._doubtful.discard(endpoint)
            raise _FailedError(str(hung_up), answered=False) from None
        except ssl.SSLError as error:
            if unfit := refusals.tls_refusal(error, str(endpoint)):
                raise unfit from None
            raise _FailedError(f"TLS: {error.reason or error}", answered=False) from None
        except (LinkDownError, MqttError, OSError) as error:
            raise _FailedError(_text(error), answered=False) from None
        self._usual_s = time.monotonic() - started
        self._spoken[endpoint] = protocol
        return connection

    def _protocol(self, endpoint: Endpoint) -> ProtocolVersion:
        guess = ProtocolVersion.V311 if endpoint in self._doubtful else ProtocolVersion.V5
        return self._spoken.get(endpoint, guess)

    async def _set_up(self, endpoint: Endpoint, protocol: ProtocolVersion) -> Connection:
        self._held, started = [], time.monotonic()
        sock = await dial(endpoint, self._tls if endpoint.tls else None, dead_after_s=self.options.link.stall_s)
        connection = Connection(self._shared, sock, broker=str(endpoint), protocol=protocol)
        # A broker that knows only 3.1.1 takes properties for a will, or for a name, and waits for the rest of it.
        unsure = endpoint not in self._spoken and protocol is ProtocolVersion.V5
        answer_s = max(FIRST_ANSWER_S, 10 * (time.monotonic() - started)) if unsure else None
        with contextlib.ExitStack() as unless_done:
            unless_done.callback(connection.abandon, "not set up")
            try:
                async with asyncio.timeout(answer_s) as first_answer:
                    await connection.open()
            except TimeoutError:
                if first_answer.expired():
                    raise HungUpError(f"the broker did not answer within {answer_s:.1f} s") from None
                raise
            await connection.subscribe_all(self.options.subscriptions)
            for publication in self.options.hello:
                await connection.post(publication)
            unless_done.pop_all()
        self._queue.put_nowait(Connected(PROTOCOL_NAMES[protocol], str(endpoint)))
        held, self._held = self._held, None
        for packet in held:
            self._queue.put_nowait(packet)
        return connection

    def _take_in(self, packet: Packet) -> bool:
        """A retained message may overtake the last SUBACK; nothing is reported before `Connected`."""
        self._waiting_bytes += len(packet.payload)
        if self._held is None:
            self._queue.put_nowait(packet)
        else:
            self._held.append(packet)
        return self._connection is not None and self._waiting_bytes > WAITING_BYTES_MAX

    async def _stay(self, connection: Connection, state: Backoff) -> Backoff:
        """Watch one connection until its end."""
        since, self._connection = time.monotonic(), connection
        self.counters.connects += 1
        try:
            reason = await self._watch(connection)
        finally:
            self._connection = None
            connection.abandon("closed by this side")
        self._queue.put_nowait(Disconnected(reason))
        now = time.monotonic()
        return backoff.dropped(state, now=now, lasted_s=now - since, taken_over=connection.taken_over)

    async def _watch(self, connection: Connection) -> str:
        """Return why the connection ended; cut it when the peer owes an answer and nothing moves.

        A peer that vanished without a word would otherwise be noticed only by MQTT's keepalive, a minute later.
        """
        section = self.options.link
        signs, moved_at = connection.signs_of_life(), time.monotonic()
        ending = asyncio.ensure_future(connection.lost())
        try:
            while not (await asyncio.wait([ending], timeout=section.stall_s / 5))[0]:
                before, signs = signs, connection.signs_of_life()
                if signs != before or not (connection.awaits_ack or signs[1]):
                    moved_at = time.monotonic()
                    if signs[1] < before[1]:
                        connection.excuse_ping()
                    self._stalls = 0 if signs[0] != before[0] else self._stalls
                    continue
                patience_s = backoff.stall_patience_s(
                    stalls=self._stalls, stall_s=section.stall_s, keepalive_s=section.keepalive_s
                )
                if time.monotonic() - moved_at >= patience_s:
                    self._stalls += 1
                    connection.abandon(f"nothing moved for {patience_s:g} s while the broker owed an acknowledgement")
            return ending.result()
        finally:
            ending.cancel()


def _text(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
