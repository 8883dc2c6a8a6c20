"""Real brokers: they start, serve, keep to their rules, and are gone afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import aiomqtt
import pytest

from broker.config import PACKET_BYTES_MAX
from broker.launcher import BrokerKind, RunningBroker, find_mosquitto, run_broker
from shared.errors import UnavailableError
from shared.topics import Channel, topic
from tests.helpers import AS_MYSELF, run_async

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
USERS = ("coordinator", "site-1", "site-2")
KINDS = [
    pytest.param(
        "mosquitto",
        marks=pytest.mark.skipif(find_mosquitto() is None, reason="Mosquitto is not installed"),
    ),
    "amqtt",
]
needs_mosquitto = pytest.mark.skipif(find_mosquitto() is None, reason="Mosquitto is not installed")


def client(
    port: int,
    user: str | None = None,
    *,
    password: str | None = None,
    protocol: aiomqtt.ProtocolVersion = aiomqtt.ProtocolVersion.V311,
    will: aiomqtt.Will | None = None,
) -> aiomqtt.Client:
    """A client of the broker on this port; without another password a user has the one of docker's local testing."""
    if user is not None and password is None:
        password = (ROOT / f"docker/secrets/{user}.password").read_text().strip()
    return aiomqtt.Client(
        "127.0.0.1", port, identifier=user or "somebody", username=user, password=password, protocol=protocol, will=will
    )


def port_of(broker: RunningBroker) -> int:
    """The port in a broker's URL."""
    return int(broker.url.rpartition(":")[2])


def is_listening(port: int) -> bool:
    """Whether somebody accepts connections there."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


# -- starting and ending -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_broker_serves_and_is_gone_afterwards(kind: BrokerKind, tmp_path: Path) -> None:
    """Inside the block messages of QoS 1 arrive; after it nobody listens on the port and the process has ended."""

    async def scenario() -> RunningBroker:
        async with run_broker(kind, tmp_path) as broker, client(port_of(broker)) as mqtt:
            await mqtt.subscribe("ward/#", qos=1)
            await mqtt.publish("ward/1", b"x" * 900_000, qos=1)
            message = await anext(mqtt.messages)
            assert message.payload == b"x" * 900_000
            assert broker.kind == kind
            assert re.fullmatch(r"\d+\.\d+\.\d+.*", broker.version)
            assert bool(broker.notice) == (kind == "amqtt")
        return broker

    broker = run_async(scenario())
    assert not is_listening(port_of(broker))
    with pytest.raises(ProcessLookupError):
        os.kill(broker.pid, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_port_in_use_is_unavailable(kind: BrokerKind, tmp_path: Path) -> None:
    """A broker asked onto a taken port says which port it is and what to do, and leaves the owner alone."""

    async def scenario(port: int) -> None:
        async with run_broker(kind, tmp_path, port):
            pytest.fail("two listeners on one port")

    with socket.socket() as owner:
        owner.bind(("127.0.0.1", 0))
        owner.listen()
        port = owner.getsockname()[1]
        with pytest.raises(UnavailableError, match=f"port {port} on 127.0.0.1 is in use"):
            run_async(scenario(port))
        assert is_listening(port)


@pytest.mark.parametrize("kind", KINDS)
def test_a_broker_that_dies_is_noticed(kind: BrokerKind, tmp_path: Path) -> None:
    """Whoever waits for the broker learns how it ended, and leaving the block is no error."""

    async def scenario() -> int:
        async with run_broker(kind, tmp_path) as broker:
            os.kill(broker.pid, signal.SIGKILL)
            return await broker.wait()

    assert run_async(scenario()) == -signal.SIGKILL


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ties a child to its parent's life")
@pytest.mark.parametrize("kind", KINDS)
def test_no_broker_outlives_its_launcher(kind: BrokerKind, tmp_path: Path) -> None:
    """When the process that started a broker is killed outright, the broker ends too."""
    script = (
        "import asyncio, pathlib, sys\n"
        "from broker.launcher import run_broker\n"
        "async def main():\n"
        f"    async with run_broker({kind!r}, pathlib.Path({str(tmp_path)!r})) as broker:\n"
        "        print(broker.pid, flush=True)\n"
        "        await asyncio.Event().wait()\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=ROOT, text=True) as launcher:
        assert launcher.stdout is not None
        broker = os.pidfd_open(int(launcher.stdout.readline()))
        try:
            launcher.kill()
            ended, _, _ = select.select([broker], [], [], 10)
            assert ended
        finally:
            os.close(broker)


# -- limits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [aiomqtt.ProtocolVersion.V311, aiomqtt.ProtocolVersion.V5])
def test_a_packet_too_large_cuts_its_sender_off(mosquitto: RunningBroker, protocol: aiomqtt.ProtocolVersion) -> None:
    """A packet larger than any known broker would take is refused by the local broker too."""

    async def scenario() -> None:
        async with client(port_of(mosquitto), protocol=protocol) as mqtt:
            await mqtt.publish("ward/1", b"x" * (PACKET_BYTES_MAX - 1000), qos=1)
            mqtt._client.publish("ward/1", b"x" * (PACKET_BYTES_MAX + 1000), qos=1)
            with pytest.raises(aiomqtt.MqttError, match=r"[Dd]isconnect"):
                await anext(mqtt.messages)

    run_async(scenario())


# -- the hardened broker -----------------------------------------------------------------------------------------------


@pytest.fixture
def hardened(tmp_path: Path, free_port: int) -> Iterator[int]:
    """The port of a Mosquitto that runs the repository's mosquitto.conf, with passwords and rules as shipped.

    Two things differ from the file: the port, because 1883 may be taken, and, where root runs the tests, that the
    broker stays root, because it could not read a repository in a private folder otherwise.
    """
    shipped = (ROOT / "mosquitto.conf").read_text()
    text = re.sub(r"^listener 1883$", f"listener {free_port} 127.0.0.1", shipped, count=1, flags=re.MULTILINE)
    assert text != shipped
    config, log = tmp_path / "mosquitto.conf", tmp_path / "log"
    config.write_text(f"{text}\n{AS_MYSELF}")
    mosquitto = find_mosquitto()
    assert mosquitto is not None
    with log.open("wb") as output:
        process = subprocess.Popen([mosquitto, "-c", config], cwd=ROOT, stderr=output, stdin=subprocess.DEVNULL)
    try:
        run_async(served(process, log))
        yield free_port
    finally:
        process.terminate()
        process.wait(10)


async def served(process: subprocess.Popen[bytes], log: Path) -> None:
    """Return when the broker says that it serves; fail with its log when it ends instead."""
    while "running" not in log.read_text():
        assert process.poll() is None, log.read_text()
        await asyncio.sleep(0.02)


@needs_mosquitto
@pytest.mark.parametrize("protocol", [aiomqtt.ProtocolVersion.V311, aiomqtt.ProtocolVersion.V5])
def test_the_hardened_broker_asks_for_a_password(hardened: int, protocol: aiomqtt.ProtocolVersion) -> None:
    """Neither a nameless client nor a wrong password gets in; the right one does."""

    async def enters(user: str | None = None, password: str | None = None) -> bool:
        with contextlib.suppress(aiomqtt.MqttError):
            async with client(hardened, user, password=password, protocol=protocol):
                return True
        return False

    async def scenario() -> list[bool]:
        return [
            await enters(),
            await enters(user="site-1", password="wrong"),
            await enters(user="site-1"),
        ]

    assert run_async(scenario()) == [False, False, True]


@needs_mosquitto
def test_each_speaks_and_hears_only_what_is_his(hardened: int) -> None:
    """For each channel of site 1: who can write it and who can read it is exactly what the topic table says."""
    heard = run_async(everybody_writes_everything(hardened))
    for reader in USERS:
        expected = {
            (channel.name, writer)
            for channel in Channel
            for writer in USERS
            if holds(channel, "write", writer) and holds(channel, "read", reader)
        }
        assert heard[reader] == expected, reader


def holds(channel: Channel, access: str, user: str) -> bool:
    """Whether this user has this access to this channel of site 1, by the table."""
    role = channel.writer if access == "write" else channel.reader
    if access == "read" and not channel.per_site:
        return True  # shared channels are for everybody who is in
    return user == ("coordinator" if role == "coordinator" else "site-1")


async def everybody_writes_everything(port: int) -> dict[str, set[tuple[str, str]]]:
    """What each user hears, as (channel, writer), when every user writes to every channel of site 1.

    Each publish is acknowledged before the next, and a last message on a channel that the reader surely hears marks
    the end: what has not come by then was withheld.
    """
    topics = {topic("local", channel, "site-1" if channel.per_site else None): channel for channel in Channel}
    heard: dict[str, set[tuple[str, str]]] = {user: set() for user in USERS}
    async with contextlib.AsyncExitStack() as stack:
        clients = {user: await stack.enter_async_context(client(port, user)) for user in USERS}
        for mqtt in clients.values():
            await mqtt.subscribe("#", qos=1)
            for name in topics:
                await mqtt.subscribe(name, qos=1)
        for user, mqtt in clients.items():
            for name in topics:
                await mqtt.publish(name, user.encode(), qos=1)
        await clients["coordinator"].publish(topic("local", Channel.BULK), b"end", qos=1)
        for user, mqtt in clients.items():
            async for message in mqtt.messages:
                assert isinstance(message.payload, bytes)
                if message.payload == b"end":
                    break
                heard[user].add((topics[str(message.topic)].name, message.payload.decode()))
    return heard


@needs_mosquitto
def test_a_site_cannot_leave_a_retained_message_for_others(hardened: int) -> None:
    """A forged retained announcement is not kept: a client that comes later hears the coordinator's only."""

    async def scenario() -> bytes:
        announce = topic("local", Channel.ANNOUNCE)
        async with client(hardened, "coordinator") as coordinator, client(hardened, "site-2") as intruder:
            await coordinator.publish(announce, b"true", qos=1, retain=True)
            await intruder.publish(announce, b"forged", qos=1, retain=True)
        async with client(hardened, "site-1") as site:
            await site.subscribe(announce, qos=1)
            message = await anext(site.messages)
        assert isinstance(message.payload, bytes)
        return message.payload

    assert run_async(scenario()) == b"true"


@needs_mosquitto
def test_a_last_will_keeps_to_the_rules(hardened: int) -> None:
    """A site's last will on its own presence is delivered, one on another site's presence is not."""

    async def dies_with(user: str, will_topic: str) -> None:
        will = aiomqtt.Will(will_topic, b"gone", qos=1)
        async with client(hardened, user, will=will) as dying:
            connection = dying._client.socket()
            assert isinstance(connection, socket.socket)
            connection.shutdown(socket.SHUT_RDWR)  # the network is gone without a DISCONNECT
            with pytest.raises(aiomqtt.MqttError, match=r"[Dd]isconnect"):
                await anext(dying.messages)

    async def scenario() -> str:
        async with client(hardened, "coordinator") as coordinator:
            await coordinator.subscribe(topic("local", Channel.PRESENCE, "+"), qos=1)
            await dies_with("site-2", topic("local", Channel.PRESENCE, "site-1"))
            await dies_with("site-1", topic("local", Channel.PRESENCE, "site-1"))
            await dies_with("site-2", topic("local", Channel.PRESENCE, "site-2"))
            first = await anext(coordinator.messages)
            second = await anext(coordinator.messages)
        return f"{first.topic} {second.topic}"

    assert (
        run_async(scenario())
        == f"{topic('local', Channel.PRESENCE, 'site-1')} {topic('local', Channel.PRESENCE, 'site-2')}"
    )
