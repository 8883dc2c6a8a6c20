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
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Self

import structlog
from aiomqtt import MqttError, ProtocolVersion

from shared.errors import MailboatError, UnavailableError
from shared.link import backoff, refusals
from shared.link.backoff import Backoff
from shared.link.client import Connection, Shared
from shared.link.counters import Counters
from shared.link.dial import dial
from shared.link.endpoints import Endpoint, parse_endpoints, read_password
from shared.link.model import (
    Connected,
    ConnectRefusedError,
    Disconnected,
    Event,
    HungUpError,
    LinkDownError,
    LinkOptions,
    NotGrantedError,
    Packet,
    Publication,
)
from shared.link.tls import Certificates
from shared.link.vigil import LOOK_S, Verdict, Vigil

WAITING_BYTES_MAX = 1024 * 1024
"""Messages taken from the network that nobody has asked for yet; above this, no more are taken for a while."""
PACKET_BYTES = 512
"""What a message that waits takes besides its payload, about: a flood of empty ones fills memory, too."""
FAREWELL_S = 2.0
"""Longest wait for the acknowledgement of the last message when closing."""
FIRST_ANSWER_S = 1.0
"""Shortest wait for the answer to a first CONNECT in MQTT 5, before 3.1.1 is tried."""
DIALLED, GREETED = 1, 2
"""Steps of an attempt that are done: a connection stands, the broker has accepted us."""
PROTOCOL_NAMES = {ProtocolVersion.V5: "5", ProtocolVersion.V311: "3.1.1"}

_log = structlog.get_logger("link")


class _FailedError(Exception):
    """One attempt to connect has failed; `answered` when it was the broker that said no."""

    def __init__(self, text: str, *, answered: bool, kept_waiting: bool = False) -> None:
        super().__init__(text)
        self.answered = answered
        self.kept_waiting = kept_waiting


class Link:
    """Connects on entry and again after each drop; reports on `events`, counts on `counters`."""

    def __init__(self, options: LinkOptions, *, chance: random.Random | None = None) -> None:
        """ConfigError for a URL, password file or certificate that cannot be used; nothing is dialled yet."""
        self.options = options
        self.counters = Counters()
        self._endpoints = parse_endpoints(options.broker.url)
        self._certificates = Certificates(options.broker) if any(each.tls for each in self._endpoints) else None
        self._shared = Shared(options, read_password(options.broker), self.counters, self._take_in)
        self._chance = chance or random.Random()  # from the system's entropy: no two sites in step
        self._queue: asyncio.Queue[Event | BaseException | None] = asyncio.Queue()
        self._held: list[Packet] | None = None
        self._waiting_bytes = 0
        self._connection: Connection | None = None
        self._runner: asyncio.Task[None] | None = None
        self._topics = options.subscriptions
        self._spoken: dict[Endpoint, ProtocolVersion] = {}
        self._doubtful: set[Endpoint] = set()
        self._usual_s: float | None = None
        self._admitted = False
        """Whether a broker has granted all subscriptions before."""
        self._vigil = Vigil(options.link.stall_s, options.link.keepalive_s)

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

    @property
    def receiving(self) -> int:
        """Bytes that have come in of a message that is not here whole; on a slow link one takes a while."""
        return 0 if self._connection is None else self._connection.receiving

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
                self._waiting_bytes -= _weight(item)
                if self._waiting_bytes <= WAITING_BYTES_MAX // 2 and self._connection is not None:
                    self._connection.go_on()
            yield item
        self._queue.put_nowait(None)

    async def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Publish with QoS 1; returns when the broker has acknowledged, however long that takes.

        Somebody must read `events` meanwhile: an acknowledgement waits behind messages that nobody takes.

        Raises LinkDownError when there is no connection or it goes away first (the message may have got through all
        the same), and RefusedError when an MQTT 5 broker refuses it; one of 3.1.1 has no way to say so.
        """
        if self._connection is None:
            raise LinkDownError("there is no connection to the broker now", hint="publish again after `Connected`")
        await self._connection.post(Publication(topic, payload, retain))

    async def follow(self, topics: tuple[str, ...]) -> None:
        """Subscribe to these topics and to nothing else, on this connection and on later ones.

        A connection that is being set up may miss the change: ask again now and then, which costs nothing. Raises
        RefusedError when the broker does not grant one of them; then everything stays as it was.
        """
        before, self._topics = self._topics, topics
        connection = self._connection
        if connection is None or connection.topics == topics:
            return
        try:
            await connection.follow(topics)
        except NotGrantedError as refused:
            self._topics = before
            raise refusals.subscribe_refusal(refused.topic, str(refused), connection.broker) from None
        except HungUpError:
            pass  # the next connection subscribes to them

    # -- the loop ------------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        state = Backoff(since=time.monotonic())
        turn = self._chance.randrange(len(self._endpoints))  # so that sites spread over the nodes of a cluster
        last_words = "no attempt was made"
        try:
            async with asyncio.timeout(self.options.give_up_s) as first_contact:
                while True:
                    endpoint = self._endpoints[turn % len(self._endpoints)]
                    turn += 1
                    began = time.monotonic()
                    try:
                        connection = await self._attempt(endpoint, state)
                    except _FailedError as failure:
                        last_words = f"{endpoint}: {failure}"
                        state = backoff.failed(state, answered=failure.answered, kept_waiting=failure.kept_waiting)
                        self._report(endpoint, state, str(failure))
                    else:
                        first_contact.reschedule(None)
                        state = await self._stay(connection, state)
                    await asyncio.sleep(self._delay_s(state, time.monotonic() - began))
        except TimeoutError:
            places = ", ".join(str(endpoint) for endpoint in self._endpoints)
            raise UnavailableError(
                f"no connection to a broker at {places} within {self.options.give_up_s:g} s (last: {last_words})",
                hint="check that the broker runs, that broker.url names it, and that a firewall lets this machine out",
            ) from None

    def _delay_s(self, state: Backoff, spent_s: float) -> float:
        cap_s, uniform = self.options.link.backoff_cap_s, self._chance.uniform
        return backoff.delay_s(state, now=time.monotonic(), spent_s=spent_s, cap_s=cap_s, uniform=uniform)

    def _report(self, endpoint: Endpoint, state: Backoff, reason: str) -> None:
        first = state.unreachable + state.turned_away == 1  # an outage is one event, not one for each attempt
        (_log.warning if first else _log.debug)("no connection to the broker", broker=str(endpoint), reason=reason)

    async def _attempt(self, endpoint: Endpoint, state: Backoff) -> Connection:
        """One connection with all subscriptions and hellos; _FailedError when trying again may help."""
        started = time.monotonic()
        protocol = self._protocol(endpoint)
        try:
            connection = await self._in_time(endpoint, protocol, state)
        except ConnectRefusedError as refused:
            if refused.code == refusals.UNSUPPORTED_PROTOCOL and protocol is ProtocolVersion.V5:
                self._spoken[endpoint] = ProtocolVersion.V311
                return await self._attempt(endpoint, state)
            if fatal := refusals.connect_refusal(refused.code, str(endpoint), self.options.client_id):
                raise fatal from None
            raise _FailedError(f"the broker refuses: {refused}", answered=True) from None
        except NotGrantedError as refused:
            lasted_s = time.monotonic() - state.since
            patience_s = refusals.ADMITTED_PATIENCE_S if self._admitted else refusals.SUBSCRIBE_PATIENCE_S
            if refused.code in refusals.PASSING and lasted_s < patience_s:
                raise _FailedError(f"not subscribed to {refused.topic}: {refused}", answered=True) from None
            raise refusals.subscribe_refusal(refused.topic, str(refused), str(endpoint)) from None
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
        self._usual_s, self._admitted = time.monotonic() - started, True
        self._spoken[endpoint] = protocol
        return connection

    async def _in_time(self, endpoint: Endpoint, protocol: ProtocolVersion, state: Backoff) -> Connection:
        """Set up a connection, each step within the patience that what happened so far leaves for it."""
        started, steps = time.monotonic(), 0

        def patience_s() -> float:
            return backoff.patience_s(
                state,
                now=started,
                usual_s=self._usual_s,
                reached=steps >= DIALLED,
                greeted=steps >= GREETED,
                uniform=self._chance.uniform,
            )

        def one_step() -> None:
            nonlocal steps
            steps += 1
            deadline.reschedule(asyncio.get_running_loop().time() + patience_s())

        try:
            async with asyncio.timeout(patience_s()) as deadline:
                return await self._set_up(endpoint, protocol, one_step)
        except TimeoutError:
            waited_s = time.monotonic() - started
            raise _FailedError(
                f"no answer within {waited_s:.1f} s", answered=False, kept_waiting=steps >= DIALLED
            ) from None

    def _protocol(self, endpoint: Endpoint) -> ProtocolVersion:
        guess = ProtocolVersion.V311 if endpoint in self._doubtful else ProtocolVersion.V5
        return self._spoken.get(endpoint, guess)

    async def _set_up(self, endpoint: Endpoint, protocol: ProtocolVersion, one_step: Callable[[], None]) -> Connection:
        """The steps of an attempt; `one_step` is called after each, since each shows that the broker answers."""
        self._held, started = [], time.monotonic()
        tls = self._certificates.context() if self._certificates is not None and endpoint.tls else None
        sock = await dial(endpoint, tls, dead_after_s=self.options.link.stall_s)
        one_step()
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
            one_step()
            await connection.follow(self._topics)
            one_step()
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
        self._waiting_bytes += _weight(packet)
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
        """Return why the connection ended; give it up when the vigil says so."""
        vigil, looked_at = self._vigil, time.monotonic()
        vigil.begin()
        ending = asyncio.ensure_future(connection.lost())
        try:
            while not (await asyncio.wait([ending], timeout=LOOK_S))[0]:
                before, looked_at = looked_at, time.monotonic()
                patience_s = vigil.silence_s
                match vigil.look(connection.signs_of_life(), looked_at - before):
                    case Verdict.ASK:
                        connection.ask_for_life()
                    case Verdict.MOVED:
                        connection.excuse_ping()
                    case Verdict.SILENT:
                        connection.abandon(
                            f"nothing moved for {patience_s:g} s although the broker was asked to answer"
                        )
                    case Verdict.OWING:
                        connection.abandon("the broker answers, but owes an acknowledgement for too long")
                    case Verdict.WAIT:
                        pass
            return ending.result()
        finally:
            ending.cancel()


def _weight(packet: Packet) -> int:
    return PACKET_BYTES + len(packet.payload)


def _text(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
