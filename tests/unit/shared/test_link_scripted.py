"""The link against a broker of a few lines that answers exactly what the test wants, byte for byte."""

from __future__ import annotations

import asyncio
import random
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from shared.config import BrokerSection, LinkSection
from shared.errors import RefusedError, UnavailableError
from shared.link import (
    Connected,
    Disconnected,
    Event,
    Link,
    LinkDownError,
    LinkOptions,
    Packet,
    Publication,
    backoff,
    link,
    refusals,
)
from tests.helpers import run_async

CONNECT, PUBLISH, SUBSCRIBE, PINGREQ, DISCONNECT = 1, 3, 8, 12, 14
CONNACK_5 = b"\x20\x03\x00\x00\x00"
CONNACK_311 = b"\x20\x02\x00\x00"
REFUSE_5 = b"\x20\x02\x00\x01"
"""What amqtt and other brokers of 3.1.1 say to a CONNECT of MQTT 5."""
HANG_UP = b""
NO_ANSWER = b"\x20"
"""The beginning of a CONNACK that never ends."""


@dataclass
class Script:
    """Answers; a callable sees the body of the packet it answers."""

    connack: Callable[[int], bytes]
    """From the protocol level of CONNECT, 4 or 5; HANG_UP closes."""
    suback: bytes | None = b"\x01"
    puback: bytes | None = b""
    """What follows the packet id; None sends nothing."""
    before_suback: bytes = b""
    pingresp: bool = True
    levels: list[int] = field(default_factory=list)
    packets: list[int] = field(default_factory=list)
    connections: list[asyncio.StreamWriter] = field(default_factory=list)


def level_5(reply: bytes = CONNACK_5) -> Callable[[int], bytes]:
    """Always the same answer to CONNECT."""
    return lambda _level: reply


async def read_packet(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """Type and body of the next packet."""
    first = (await reader.readexactly(1))[0]
    length = shift = 0
    while True:
        byte = (await reader.readexactly(1))[0]
        length |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return first >> 4, await reader.readexactly(length)


async def serve(script: Script, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One connection of the scripted broker."""
    script.connections.append(writer)
    try:
        while True:
            kind, body = await read_packet(reader)
            script.packets.append(kind)
            if kind == CONNECT:
                script.levels.append(body[6])
                reply = script.connack(body[6])
                writer.write(reply)
                if reply == HANG_UP:
                    break
            elif kind == SUBSCRIBE and script.suback is not None:
                properties = b"\x00" if script.levels[-1] == 5 else b""
                answer = body[:2] + properties + script.suback
                writer.write(script.before_suback + bytes([0x90, len(answer)]) + answer)
            elif kind == PINGREQ and script.pingresp:
                writer.write(b"\xd0\x00")
            elif kind == PUBLISH and script.puback is not None:
                (topic,) = struct.unpack_from(">H", body)
                answer = body[2 + topic : 4 + topic] + script.puback
                writer.write(bytes([0x40, len(answer)]) + answer)
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()


@asynccontextmanager
async def scripted(script: Script) -> AsyncIterator[str]:
    """The URL of a broker that follows the script."""
    server = await asyncio.start_server(lambda r, w: serve(script, r, w), "127.0.0.1", 0)
    try:
        yield f"mqtt://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for writer in script.connections:
            writer.transport.abort()
        await asyncio.sleep(0)


def options(url: str, **changes: object) -> LinkOptions:
    """One subscription, back-offs short enough for a test, and patience with a busy machine."""
    section = LinkSection(backoff_cap_s=0.05)
    fields: dict[str, object] = {"broker": BrokerSection(url=url), "link": section, "client_id": "site-1"}
    return LinkOptions(**{**fields, "subscriptions": ("t/#",), **changes})  # type: ignore[arg-type]


def talk(script: Script, count: int, **changes: object) -> list[Event]:
    """The first `count` events of a link with the scripted broker."""

    async def run() -> list[Event]:
        async with scripted(script) as url, Link(options(url, **changes)) as link:
            events = link.events()
            return [await anext(events) for _ in range(count)]

    return run_async(run(), timeout_s=10)


def refused(script: Script, **changes: object) -> RefusedError:
    """The refusal that ends the link."""
    with pytest.raises(RefusedError) as caught:
        talk(script, 1, **changes)
    return caught.value


class TestProtocol:
    def test_five_first(self) -> None:
        """A broker that speaks MQTT 5 is spoken to in MQTT 5."""
        script = Script(level_5())
        [event] = talk(script, 1)
        assert isinstance(event, Connected)
        assert (event.protocol, script.levels) == ("5", [5])

    def test_fall_back_at_once_and_for_good(self) -> None:
        """'Unsupported protocol version' leads to 3.1.1 on the next connection, and is remembered after a drop."""
        script = Script(lambda level: REFUSE_5 if level == 5 else CONNACK_311)

        async def run() -> None:
            async with scripted(script) as url, Link(options(url)) as link:
                events = link.events()
                assert getattr(await anext(events), "protocol", "") == "3.1.1"
                script.connections[-1].transport.abort()
                assert isinstance(await anext(events), Disconnected)
                assert getattr(await anext(events), "protocol", "") == "3.1.1"

        run_async(run())
        assert script.levels == [5, 4, 4]

    def test_a_broker_that_hangs_up_on_five(self) -> None:
        """A broker that closes the connection instead of answering MQTT 5 is tried with 3.1.1."""
        script = Script(lambda level: HANG_UP if level == 5 else CONNACK_311)
        [event] = talk(script, 1)
        assert getattr(event, "protocol", "") == "3.1.1"
        assert script.levels == [5, 4]

    def test_a_broker_that_is_silent_on_five(self) -> None:
        """A broker that leaves MQTT 5 without an answer, as amqtt does when there is a will, is tried with 3.1.1."""
        script = Script(lambda level: NO_ANSWER if level == 5 else CONNACK_311)
        [event] = talk(script, 1)
        assert getattr(event, "protocol", "") == "3.1.1"

    def test_hanging_up_once_proves_nothing(self) -> None:
        """When the network cut the first attempt, a later connection speaks MQTT 5 again."""
        replies = iter([HANG_UP, HANG_UP, CONNACK_5])
        script = Script(lambda _level: next(replies))
        [event] = talk(script, 1)
        assert getattr(event, "protocol", "") == "5"
        assert script.levels == [5, 4, 5]


class TestRefusals:
    @pytest.mark.parametrize(
        ("five", "three", "rule"),
        [
            (0x86, 4, "bad-credentials"),
            (0x87, 5, "not-authorised"),
            (0x85, 2, "client-id-rejected"),
        ],
    )
    @pytest.mark.parametrize("protocol", [5, 4])
    def test_connect(self, five: int, three: int, rule: str, protocol: int) -> None:
        """The refusals of CONNECT end the link under their rule in both protocols, after one attempt in each."""
        modern = b"\x20\x03\x00" + bytes([five]) + b"\x00"
        classic = b"\x20\x02\x00" + bytes([three])
        script = Script(lambda level: (modern if protocol == 5 else REFUSE_5) if level == 5 else classic)
        assert refused(script).rule == rule
        assert script.levels == ([5] if protocol == 5 else [5, 4])

    def test_server_unavailable_is_tried_again(self) -> None:
        """'Server unavailable' is not the end."""
        replies = iter([b"\x20\x03\x00\x88\x00", CONNACK_5])
        [event] = talk(Script(lambda _level: next(replies)), 1)
        assert isinstance(event, Connected)

    @pytest.mark.parametrize("code", [0x80, 0x87])
    def test_subscribe(self, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """A subscription that is not granted ends the link and is named; a refusal that may pass does so in the end."""
        monkeypatch.setattr(refusals, "SUBSCRIBE_PATIENCE_S", 0.3)
        error = refused(Script(level_5(), suback=bytes([code])))
        assert (error.rule, "t/#" in error.message, "access list" in error.hint) == ("not-authorised", True, True)

    def test_subscribe_in_3_1_1(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The same with the one failure code of 3.1.1."""
        monkeypatch.setattr(refusals, "SUBSCRIBE_PATIENCE_S", 0.3)
        script = Script(lambda level: REFUSE_5 if level == 5 else CONNACK_311, suback=b"\x80")
        assert refused(script).rule == "not-authorised"

    def test_a_subscription_that_was_granted_before(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A cluster that refuses again what it granted once is given more time, and that time ends as well."""
        monkeypatch.setattr(refusals, "SUBSCRIBE_PATIENCE_S", 0.0)
        monkeypatch.setattr(refusals, "ADMITTED_PATIENCE_S", 60.0)
        script = Script(level_5())

        async def run() -> None:
            async with scripted(script) as url, Link(options(url)) as link:
                events = link.events()
                assert isinstance(await anext(events), Connected)
                script.suback = b"\x80"
                script.connections[-1].transport.abort()
                assert isinstance(await anext(events), Disconnected)
                tried = len(script.connections)
                while len(script.connections) < tried + 3:  # noqa: ASYNC110 - the script tells it in no other way
                    await asyncio.sleep(0.01)
                script.suback = b"\x01"
                assert isinstance(await anext(events), Connected)
                monkeypatch.setattr(refusals, "ADMITTED_PATIENCE_S", 0.0)
                script.suback = b"\x80"
                script.connections[-1].transport.abort()
                assert isinstance(await anext(events), Disconnected)
                with pytest.raises(RefusedError):
                    await anext(events)

        run_async(run(), timeout_s=30)

    def test_hello(self) -> None:
        """A hello that is not admitted ends the link; nothing is reported as connected before."""
        error = refused(Script(level_5(), puback=b"\x87\x00"), hello=(Publication("presence", b"on"),))
        assert "presence" in error.message

    def test_told_again(self) -> None:
        """Whoever asks for events after the end is told the same again, and publishing says that there is no link."""

        async def run() -> None:
            async with scripted(Script(level_5(b"\x20\x03\x00\x87\x00"))) as url, Link(options(url)) as link:
                for _ in range(2):
                    with pytest.raises(RefusedError):
                        await anext(link.events())
                with pytest.raises(LinkDownError):
                    await link.publish("t", b"")

        run_async(run())


class TestPublish:
    @staticmethod
    def publish(script: Script, payload: bytes = b"x") -> Link:
        """Connect, publish once, and return the link for its counters."""

        async def run() -> Link:
            async with scripted(script) as url, Link(options(url)) as link:
                await anext(link.events())
                await link.publish("t/x", payload)
            return link

        return run_async(run(), timeout_s=10)

    def test_refused(self) -> None:
        """A negative PUBACK is an error that names the topic."""
        with pytest.raises(RefusedError, match="t/x") as caught:
            self.publish(Script(level_5(), puback=b"\x87\x00"))
        assert caught.value.rule == "not-authorised"

    def test_nobody_listens(self) -> None:
        """'No matching subscribers' is counted, and no error."""
        assert self.publish(Script(level_5(), puback=b"\x10\x00")).counters.unmatched == 1

    def test_too_large_for_the_broker(self) -> None:
        """A packet beyond the broker's stated maximum is refused before it is sent."""
        connack = b"\x20\x08\x00\x00\x05\x27" + struct.pack(">I", 100)
        with pytest.raises(RefusedError) as caught:
            self.publish(Script(level_5(connack)), bytes(100))
        assert caught.value.rule == "packet-too-large"

    def test_receive_maximum(self) -> None:
        """No more publications are outstanding than the broker asks for."""
        script = Script(level_5(b"\x20\x06\x00\x00\x03\x21" + struct.pack(">H", 3)), puback=None)

        async def run() -> None:
            async with scripted(script) as url, Link(options(url)) as link:
                await anext(link.events())
                sending = [asyncio.create_task(link.publish("t/x", b"x")) for _ in range(10)]
                while script.packets.count(PUBLISH) < 3:  # noqa: ASYNC110 - the broker has no event to wait for
                    await asyncio.sleep(0.01)
                await asyncio.sleep(0.05)
                assert script.packets.count(PUBLISH) == 3
                script.connections[-1].transport.abort()
                results = await asyncio.gather(*sending, return_exceptions=True)
            assert all(isinstance(result, LinkDownError) for result in results)

        run_async(run())

    def test_cancelled_caller_keeps_its_place(self) -> None:
        """A caller that stops waiting does not make room for more than the window at the broker."""
        script = Script(level_5(b"\x20\x06\x00\x00\x03\x21" + struct.pack(">H", 1)), puback=None)

        async def run() -> None:
            async with scripted(script) as url, Link(options(url)) as link:
                await anext(link.events())
                for _ in range(3):
                    with pytest.raises(TimeoutError):
                        async with asyncio.timeout(0.05):
                            await link.publish("t/x", b"x")
            assert script.packets.count(PUBLISH) <= 2  # one in the window, and the farewell never found room

        run_async(run())


@pytest.mark.parametrize(("pingresp", "reason"), [(False, "nothing moved"), (True, "acknowledgement")])
def test_stalled_connection_is_cut(pingresp: bool, reason: str) -> None:
    """A broker that is silent when asked, or answers and never acknowledges, is given up by the link itself."""

    async def run() -> None:
        script = Script(level_5(), puback=None, pingresp=pingresp)
        section = LinkSection(stall_s=0.5 if pingresp else 5.0, backoff_cap_s=0.05)
        async with scripted(script) as url, Link(options(url, link=section)) as link:
            events = link.events()
            await anext(events)
            with pytest.raises(LinkDownError):
                await link.publish("t/x", b"x")
            ended = await anext(events)
            assert isinstance(ended, Disconnected)
            assert reason in ended.reason
            assert isinstance(await anext(events), Connected)

    run_async(run(), timeout_s=10)


def test_connected_comes_before_the_packets() -> None:
    """A message that overtakes the SUBACK is reported after `Connected`, with its retained mark."""
    early = b"\x31\x07\x00\x03t/x\x00!"
    first, second = talk(Script(level_5(), before_suback=early), 2)
    assert isinstance(first, Connected)
    assert second == Packet("t/x", b"!", retained=True)


def test_malformed_publish_ends_the_connection() -> None:
    """A topic that is not UTF-8, which a broker must not forward, costs the connection and is named."""

    async def run() -> None:
        script = Script(level_5())
        async with scripted(script) as url, Link(options(url)) as link:
            events = link.events()
            await anext(events)
            script.connections[-1].write(b"\x30\x05\x00\x02\xff\xfe\x00")
            ended = await anext(events)
            assert isinstance(ended, Disconnected)
            assert "malformed" in ended.reason
            assert isinstance(await anext(events), Connected)

    run_async(run())


def test_taken_over() -> None:
    """What the broker says with its DISCONNECT is the reason that is reported."""
    replies = iter([CONNACK_5 + b"\xe0\x01\x8e", CONNACK_5])
    first, second, third = talk(Script(lambda _level: next(replies)), 3, subscriptions=())
    assert isinstance(first, Connected)
    assert isinstance(second, Disconnected)
    assert "Session taken over" in second.reason
    assert isinstance(third, Connected)


@pytest.mark.parametrize("silent", [True, False])
def test_give_up(free_port: int, silent: bool) -> None:
    """Without a first connection within `give_up_s` the link ends and names the address."""

    async def run() -> None:
        async with scripted(Script(lambda _level: b"", suback=None)) as url:
            place = url if silent else f"mqtt://127.0.0.1:{free_port}"
            async with Link(options(place, give_up_s=0.3)) as link:
                with pytest.raises(UnavailableError, match=place.removeprefix("mqtt://")):
                    await anext(link.events())

    run_async(run(), timeout_s=5)


def test_several_urls_in_turn(free_port: int) -> None:
    """When the first broker does not answer, the second is tried."""

    async def run() -> None:
        async with scripted(Script(level_5())) as url:
            both = f"mqtt://127.0.0.1:{free_port},{url}"
            chance = random.Random(1)
            assert random.Random(1).randrange(2) == 0  # the link draws with whom it begins: here with the first
            async with Link(options(both), chance=chance) as link:
                event = await anext(link.events())
        assert isinstance(event, Connected)
        assert event.broker == url.removeprefix("mqtt://")

    run_async(run())


def test_closing_while_connecting_is_immediate(monkeypatch: pytest.MonkeyPatch) -> None:
    """A link that would wait for a silent broker for longer than this test may take closes at once; no task is left."""
    for patience in ("PATIENCE_UNKNOWN_S", "PATIENCE_MAX_S"):
        monkeypatch.setattr(backoff, patience, 1000.0)
    monkeypatch.setattr(link, "FIRST_ANSWER_S", 1000.0)

    async def run() -> None:
        async with await silent_server() as server:
            port = server.sockets[0].getsockname()[1]
            async with Link(options(f"mqtt://127.0.0.1:{port}")):
                await asyncio.sleep(0.05)
            assert {task.get_name() for task in asyncio.all_tasks()} & {"link"} == set()

    async def silent_server() -> asyncio.Server:
        async def never(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()
            writer.close()

        return await asyncio.start_server(never, "127.0.0.1", 0)

    run_async(run())
