"""The link over real brokers and through a bad network."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from broker.launcher import RunningBroker, find_mosquitto, run_broker
from mailboat.flaky import Conditions, FlakyProxy
from shared.config import BrokerSection, LinkSection
from shared.link import Connected, Disconnected, Event, Link, LinkDownError, LinkOptions, Packet, Publication
from shared.link.link import PACKET_BYTES, WAITING_BYTES_MAX
from tests.helpers import run_async

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("patient_links")]


def options(url: str, client_id: str, *subscriptions: str, **changes: object) -> LinkOptions:
    """Default patience, unless the test says otherwise."""
    fields: dict[str, object] = {"broker": BrokerSection(url=url), "link": LinkSection(), "client_id": client_id}
    return LinkOptions(**{**fields, "subscriptions": subscriptions, **changes})  # type: ignore[arg-type]


def place(url: str) -> tuple[str, int]:
    """Host and port of a URL."""
    host, _, port = url.removeprefix("mqtt://").partition(":")
    return host, int(port)


async def until(events: AsyncIterator[Event], kind: type[Event]) -> Event:
    """The next event of that kind; the others are passed over."""
    async for event in events:
        if isinstance(event, kind):
            return event
    raise AssertionError("the link has ended")


@asynccontextmanager
async def connected(link_options: LinkOptions) -> AsyncIterator[tuple[Link, AsyncIterator[Event]]]:
    """A link whose first connection stands."""
    async with Link(link_options) as link:
        events = link.events()
        assert isinstance(await anext(events), Connected)
        yield link, events


@pytest.mark.parametrize(("kind", "protocol"), [("mosquitto", "5"), ("amqtt", "3.1.1")])
def test_messages_arrive_in_order(kind: str, protocol: str, tmp_path: Path) -> None:
    """Over either broker, in the best protocol it speaks, what one link publishes the other reports, in order."""
    if kind == "mosquitto" and find_mosquitto() is None:
        pytest.skip("Mosquitto is not installed: apt-get install mosquitto")

    async def run() -> None:
        async with (
            run_broker("mosquitto" if kind == "mosquitto" else "amqtt", tmp_path) as broker,
            connected(options(broker.url, "b", "mb/b/#")) as (_, incoming),
            Link(options(broker.url, "a")) as sender,
        ):
            first = await anext(sender.events())
            assert isinstance(first, Connected)
            assert first.protocol == protocol
            for number in range(50):
                await sender.publish("mb/b/x", b"%d" % number)
            got = [await until(incoming, Packet) for _ in range(50)]
            assert got == [Packet("mb/b/x", b"%d" % number, retained=False) for number in range(50)]

    run_async(run())


def test_who_does_not_read_is_not_flooded(mosquitto_url: str) -> None:
    """A link whose events nobody takes stops taking in messages, and goes on where it stopped when somebody does."""

    async def run() -> None:
        async with (
            connected(options(mosquitto_url, "b", "d")) as (receiver, incoming),
            connected(options(mosquitto_url, "a")) as (sender, _),
        ):
            payloads = [bytes([number]) * 524_288 for number in range(64)]
            async with asyncio.TaskGroup() as group:
                for payload in payloads:
                    group.create_task(sender.publish("d", payload))
            while receiver.counters.bytes_received <= WAITING_BYTES_MAX:  # noqa: ASYNC110 - counters raise no events
                await asyncio.sleep(0.01)
            assert receiver.counters.bytes_received < WAITING_BYTES_MAX + 2 * 524_388
            got = [await until(incoming, Packet) for _ in range(64)]
            assert [getattr(packet, "payload", b"") for packet in got] == payloads
            assert receiver.counters.reconnects == 0

    run_async(run())


def test_a_flood_of_empty_messages_is_not_taken_in(mosquitto_url: str) -> None:
    """They count although their payload is nothing, and all of them come when somebody reads."""
    many = 4 * WAITING_BYTES_MAX // PACKET_BYTES

    async def run() -> None:
        async with (
            connected(options(mosquitto_url, "b", "d")) as (receiver, incoming),
            connected(options(mosquitto_url, "a")) as (sender, _),
        ):
            before = receiver.counters.bytes_received
            async with asyncio.TaskGroup() as group:
                for _ in range(many):
                    group.create_task(sender.publish("d", b""))
            assert receiver.counters.bytes_received - before < many * 4
            for _ in range(many):
                assert await until(incoming, Packet) == Packet("d", b"", retained=False)
            assert receiver.counters.bytes_received - before > many * 4

    run_async(run())


def test_chunks_of_full_size(mosquitto_url: str) -> None:
    """Sixty-four chunks of 512 KiB, all published at once, arrive whole, within the window of the link."""

    async def run() -> None:
        async with (
            connected(options(mosquitto_url, "b", "d")) as (receiver, incoming),
            connected(options(mosquitto_url, "a")) as (sender, _),
        ):
            payloads = [bytes([number]) * 524_288 for number in range(64)]
            async with asyncio.TaskGroup() as group:
                for payload in payloads:
                    group.create_task(sender.publish("d", payload))
                got = [await until(incoming, Packet) for _ in range(64)]
            assert [getattr(packet, "payload", b"") for packet in got] == payloads
            assert sender.counters.bytes_sent == receiver.counters.bytes_received

    run_async(run())


@pytest.mark.slow  # Mosquitto publishes its totals every ten seconds
def test_counters_agree_with_the_broker(mosquitto_url: str) -> None:
    """Bytes sent and received differ from Mosquitto's own totals by less than 2 %."""

    async def run() -> None:
        watch = options(mosquitto_url, "watch", "$SYS/broker/bytes/received", "$SYS/broker/bytes/sent")
        async with (
            connected(options(mosquitto_url, "b", "d")) as (receiver, incoming),
            connected(options(mosquitto_url, "a")) as (sender, _),
        ):
            for _ in range(40):
                await sender.publish("d", bytes(100_000))
                await until(incoming, Packet)
            async with connected(watch) as (_, totals):
                seen: dict[str, int] = {}
                while seen.get("received", 0) < 4_000_000 or seen.get("sent", 0) < 4_000_000:
                    packet = await until(totals, Packet)
                    assert isinstance(packet, Packet)
                    seen[packet.topic.rpartition("/")[2]] = int(packet.payload)
            assert sender.counters.bytes_sent == pytest.approx(seen["received"], rel=0.02)
            assert receiver.counters.bytes_received == pytest.approx(seen["sent"], rel=0.02)

    run_async(run(), timeout_s=60)  # of which two times ten seconds are Mosquitto's


class TestPresence:
    """Retained at `p`: on by the hello, off by the will, whoever publishes that."""

    WILL = Publication("p", b"off", retain=True)
    HELLO = (Publication("p", b"on", retain=True),)

    def seen(self, url: str, leave: Callable[[Link, FlakyProxy], Awaitable[None]]) -> list[bytes]:
        """What another client sees."""

        async def run() -> list[bytes]:
            async with connected(options(url, "b", "p")) as (_, others), FlakyProxy(*place(url)) as proxy:
                async with connected(options(proxy.url, "a", will=self.WILL, hello=self.HELLO)) as (link, _):
                    on = await until(others, Packet)
                    await leave(link, proxy)
                off = await until(others, Packet)
                assert isinstance(on, Packet)
                assert isinstance(off, Packet)
                return [on.payload, off.payload]

        return run_async(run())

    def test_closed_in_order(self, mosquitto_url: str) -> None:
        """A link that is closed says goodbye itself: the broker, which was told that it leaves, says nothing."""

        async def leave(link: Link, proxy: FlakyProxy) -> None:
            assert link.connected

        assert self.seen(mosquitto_url, leave) == [b"on", b"off"]

    def test_broken(self, mosquitto_url: str) -> None:
        """When the connection breaks the broker says it."""

        async def leave(link: Link, proxy: FlakyProxy) -> None:
            await proxy.down()

        assert self.seen(mosquitto_url, leave) == [b"on", b"off"]


class TestReconnect:
    @pytest.mark.parametrize("fault", ["cut", "reset"])
    def test_after_a_drop(self, mosquitto_url: str, fault: str) -> None:
        """After a cut the link is back by itself, its subscriptions with it, and its counters go on."""

        async def run() -> None:
            async with (
                FlakyProxy(*place(mosquitto_url)) as proxy,
                connected(options(proxy.url, "b", "d")) as (receiver, incoming),
                connected(options(mosquitto_url, "a")) as (sender, _),
            ):
                await sender.publish("d", b"1")
                await until(incoming, Packet)
                before = receiver.counters.bytes_received
                (proxy.cut if fault == "cut" else proxy.reset)()
                await until(incoming, Disconnected)
                await until(incoming, Connected)
                await sender.publish("d", b"2")
                assert await until(incoming, Packet) == Packet("d", b"2", retained=False)
                assert (receiver.counters.reconnects, receiver.counters.bytes_received) == (1, 2 * before)

        run_async(run())

    def test_publication_in_flight(self, mosquitto_url: str) -> None:
        """A publication whose connection drops before the acknowledgement fails, and nothing of it is counted twice."""

        async def run() -> None:
            conditions = Conditions(cut_after=(2_000_000,))
            async with (
                FlakyProxy(*place(mosquitto_url), conditions=conditions) as proxy,
                connected(options(proxy.url, "a")) as (sender, events),
            ):
                sending = [asyncio.create_task(sender.publish("d", bytes(500_000))) for _ in range(40)]
                results = await asyncio.gather(*sending, return_exceptions=True)
                failed = [result for result in results if isinstance(result, LinkDownError)]
                assert len(failed) >= 37
                assert results.count(None) + len(failed) == 40
                await until(events, Connected)
                await sender.publish("d", b"x")

        run_async(run())

    def test_half_open(self, mosquitto_url: str) -> None:
        """A connection that has gone dead without a word is given up after `stall_s`, when a message is waiting."""

        async def run() -> None:
            section = LinkSection(stall_s=0.5)
            async with (
                FlakyProxy(*place(mosquitto_url)) as proxy,
                connected(options(proxy.url, "a", link=section)) as (sender, events),
            ):
                proxy.hole()
                with pytest.raises(LinkDownError):
                    await sender.publish("d", b"x")
                await proxy.heal()
                passed = False
                while not passed:  # a busy broker may be late once more: half a second is little
                    await until(events, Connected)
                    with contextlib.suppress(LinkDownError):
                        await sender.publish("d", b"x")
                        passed = True

        run_async(run(), timeout_s=60)

    def test_slow_link_is_not_taken_for_a_dead_one(self, mosquitto_url: str) -> None:
        """A chunk that takes longer than two keepalives and the patience gets through: its bytes show that it lives."""

        async def run() -> None:
            section = LinkSection.model_construct(keepalive_s=4, stall_s=5.0)  # Mosquitto waits for 6 s, and no longer
            async with (
                FlakyProxy(*place(mosquitto_url), conditions=Conditions(bytes_per_s=100_000)) as proxy,
                connected(options(proxy.url, "a", link=section)) as (sender, _),
            ):
                second = asyncio.create_task(sender.publish("d", bytes(950_000)))
                await sender.publish("d", bytes(950_000))
                assert sender.counters.reconnects == 0
            await asyncio.wait([second])
            assert isinstance(second.exception(), LinkDownError)

        run_async(run(), timeout_s=60)

    def test_broker_killed(self, tmp_path: Path, free_port: int) -> None:
        """A link outlives its broker and finds the next one at the same address."""
        if find_mosquitto() is None:
            pytest.skip("Mosquitto is not installed: apt-get install mosquitto")

        async def run() -> None:
            async with run_broker("mosquitto", tmp_path, port=free_port) as broker:
                link = await stack_in(broker)
                os.kill(broker.pid, signal.SIGKILL)
                await until(link[1], Disconnected)
            async with run_broker("mosquitto", tmp_path, port=free_port):
                await until(link[1], Connected)
                await link[0].publish("d", b"x")
                await link[0].__aexit__(None, None, None)

        async def stack_in(broker: RunningBroker) -> tuple[Link, AsyncIterator[Event]]:
            link = await Link(options(broker.url, "a")).__aenter__()
            events = link.events()
            await until(events, Connected)
            return link, events

        run_async(run())

    def test_one_client_id_twice(self, mosquitto_url: str) -> None:
        """Two links under one client id throw each other out, but ever more slowly."""

        async def run() -> None:
            async with Link(options(mosquitto_url, "same")) as one, Link(options(mosquitto_url, "same")) as two:
                await asyncio.sleep(4)  # a rate needs a span of time
                assert one.counters.connects + two.counters.connects <= 12
                while one.counters.connects + two.counters.connects <= 2:  # noqa: ASYNC110 - as above
                    await asyncio.sleep(0.05)

        run_async(run())


def test_closing_leaves_no_task(mosquitto_url: str) -> None:
    """After a link is closed, also in the midst of publishing, no task of it is left and the events end."""

    async def run() -> None:
        link = Link(options(mosquitto_url, "a", will=Publication("p", b"off")))
        async with link:
            await anext(link.events())
            sending = [asyncio.create_task(link.publish("d", bytes(500_000))) for _ in range(30)]
            await asyncio.sleep(0)
        results = await asyncio.gather(*sending, return_exceptions=True)
        assert all(result is None or isinstance(result, LinkDownError) for result in results)
        assert [event async for event in link.events() if isinstance(event, Packet)] == []
        assert asyncio.all_tasks() == {asyncio.current_task()}

    run_async(run())
