"""Three NATS servers as one MQTT broker, on free ports of the loopback address."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import signal
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiomqtt
from paho.mqtt.reasoncodes import ReasonCode

from broker import launcher
from tests.helpers import any_free_port

_QUIET = logging.getLogger("tests.nats")
_QUIET.addHandler(logging.NullHandler())
_QUIET.propagate = False  # that they refuse at first is what is waited for

NODES = 3
START_S = 240.0
"""Longest wait until the nodes have found each other, chosen leaders, and grant a subscription; some seconds on an idle
machine."""
PROBE_S = 10.0


def find_nats() -> Path | None:
    """The server's program file, also where packages put it but an ordinary user's PATH does not lead."""
    for candidate in (shutil.which("nats-server"), "/usr/sbin/nats-server", "/usr/local/bin/nats-server"):
        if candidate is not None and os.access(candidate, os.X_OK):
            return Path(candidate)
    return None


@dataclass(frozen=True, slots=True)
class Node:
    """One server of the cluster."""

    process: asyncio.subprocess.Process
    mqtt_port: int
    monitor_port: int

    def clients(self) -> set[str]:
        """MQTT client ids that are connected to this node."""
        found = _ask(self.monitor_port, "connz")["connections"]
        return {connection.get("mqtt_client", "") for connection in found}

    async def kill(self) -> None:
        """End it without a word."""
        self.process.send_signal(signal.SIGKILL)
        await self.process.wait()


@dataclass(frozen=True, slots=True)
class Cluster:
    """Running servers; `url` lists them all."""

    nodes: tuple[Node, ...]

    @property
    def url(self) -> str:
        """What a client is configured with."""
        return "mqtt://" + ",".join(f"127.0.0.1:{node.mqtt_port}" for node in self.nodes)

    def node_of(self, client_prefix: str) -> Node | None:
        """The node that the client of that id is connected to; None while it is connected to none."""
        for node in self.nodes:
            if node.process.returncode is None and any(name.startswith(client_prefix) for name in node.clients()):
                return node
        return None


@asynccontextmanager
async def run_cluster(folder: Path) -> AsyncIterator[Cluster]:
    """Three servers with JetStream and an MQTT listener each; they serve when the block begins."""
    binary = find_nats()
    assert binary is not None, "the caller has looked"
    ports = [any_free_port() for _ in range(4 * NODES)]
    routes = ", ".join(f'"nats://127.0.0.1:{port}"' for port in ports[:NODES])
    nodes: list[Node] = []
    try:
        for number in range(NODES):
            route, client, mqtt, monitor = ports[number::NODES]
            home = folder / f"nats-{number}"
            home.mkdir(parents=True)
            config = home / "nats.conf"
            config.write_text(
                f'server_name: n{number}\nlisten: "127.0.0.1:{client}"\nhttp: "127.0.0.1:{monitor}"\n'
                f'jetstream {{ store_dir: "{home}", max_mem: 256MB, max_file: 2GB }}\n'
                f'cluster {{ name: mailboat, listen: "127.0.0.1:{route}", routes: [{routes}] }}\n'
                f'mqtt {{ listen: "127.0.0.1:{mqtt}", ack_wait: "60s", max_ack_pending: 100 }}\n'
            )
            # The tether ends the server together with this process, however that ends.
            tether = Path(launcher.__file__).with_name("tether.py")
            command = ("python3", "-E", "-S", str(tether), str(os.getpid()), str(binary), "-c", str(config))
            with (home / "log").open("wb") as log:
                process = await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log)
            nodes.append(Node(process, mqtt, monitor))
        async with asyncio.timeout(START_S):
            while not await asyncio.to_thread(_all_ready, nodes):  # noqa: ASYNC110 - they tell it in no other way
                await asyncio.sleep(0.1)
            for node in nodes:
                while not await _grants(node):  # noqa: ASYNC110 - likewise
                    await asyncio.sleep(1.0)
        yield Cluster(tuple(nodes))
    finally:
        for node in nodes:
            if node.process.returncode is None:
                await node.kill()


def _all_ready(nodes: list[Node]) -> bool:
    """Whether every node serves and knows the leader of the cluster."""
    try:
        return all(
            _ask(node.monitor_port, "healthz")["status"] == "ok"
            and _ask(node.monitor_port, "jsz").get("meta_cluster", {}).get("leader")
            for node in nodes
        )
    except OSError:
        return False


async def _grants(node: Node) -> bool:
    """Whether a client gets a subscription and a retained message stored: MQTT has leaders of its own to choose."""
    try:
        async with aiomqtt.Client(
            "127.0.0.1", node.mqtt_port, protocol=aiomqtt.ProtocolVersion.V311, timeout=PROBE_S, logger=_QUIET
        ) as client:
            (code,) = await client.subscribe("probe/#", qos=1)
            await client.publish(f"probe/{node.mqtt_port}", b"x", qos=1, retain=True)
    except aiomqtt.MqttError:
        return False
    return isinstance(code, ReasonCode) and not code.is_failure


def _ask(port: int, what: str) -> dict[str, Any]:
    with closing(urllib.request.urlopen(f"http://127.0.0.1:{port}/{what}", timeout=5)) as answer:
        told: dict[str, Any] = json.loads(answer.read())
        return told
