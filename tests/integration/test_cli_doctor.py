"""The doctor against real brokers: with access rules, wrong ones, none, and with something else on the port."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from broker.acl import render_acl
from broker.launcher import find_mosquitto
from mailboat.doctor.finding import Finding
from mailboat.doctor.network import Party, ask_clock, check_broker, read_announcement
from mailboat.reach import reachable
from shared.config import BrokerSection, FederationConfig
from shared.configfile import load_config
from shared.link.endpoints import parse_endpoints
from shared.messages import Announce, Refused, Welcome
from shared.plan import load_plan
from tests.commands import refused
from tests.helpers import AS_MYSELF, run_async
from tests.toys import toy_coordinator, toy_site, write_toy

pytestmark = pytest.mark.integration

DOCKER = Path(__file__).resolve().parents[2] / "docker"


@dataclass(frozen=True, slots=True)
class Guarded:
    """A Mosquitto with passwords and the access rules of the federation `toy`."""

    url: str

    def party(self, site: str | None, *, federation: str = "toy", password: str | None = None) -> Party:
        """Who comes in with the user name and the password of `site`, or of the coordinator."""
        user = site or "coordinator"
        file = DOCKER / "secrets" / f"{password or user}.password"
        return Party(federation, site, BrokerSection(url=self.url, username=user, password_file=file))


@pytest.fixture
def guarded(tmp_path: Path, free_port: int) -> Iterator[Guarded]:
    """A Mosquitto of this test's own with passwords and access rules."""
    mosquitto = find_mosquitto()
    if mosquitto is None:
        pytest.skip("Mosquitto is not installed: apt-get install mosquitto")
    (tmp_path / "acl").write_text(render_acl("toy"))
    (tmp_path / "acl").chmod(0o600)
    (tmp_path / "mosquitto.conf").write_text(
        f"listener {free_port} 127.0.0.1\nallow_anonymous false\npassword_file {DOCKER / 'broker' / 'passwords'}\n"
        f"acl_file {tmp_path / 'acl'}\n{AS_MYSELF}"
    )
    guarded = Guarded(f"mqtt://127.0.0.1:{free_port}")
    process = subprocess.Popen([mosquitto, "-c", tmp_path / "mosquitto.conf"], stderr=subprocess.DEVNULL)
    try:
        run_async(until(lambda: reachable(parse_endpoints(guarded.url))))
        yield guarded
    finally:
        process.terminate()
        process.wait(10)


async def until(ready: Callable[[], Awaitable[bool]]) -> None:
    """Ask again and again until it is so; the caller sets the deadline."""
    while not await ready():  # noqa: ASYNC110 - another process makes it so
        await asyncio.sleep(0.02)


def levels(findings: list[Finding]) -> list[tuple[str, str]]:
    """What was looked at and how it is."""
    return [(finding.what, finding.level) for finding in findings]


@pytest.mark.parametrize("site", [None, "site-1"])
def test_with_the_right_rules_all_is_well(guarded: Guarded, site: str | None) -> None:
    """Own topics may be read and written, a stranger's may not: that refusal is what makes it well."""
    findings, protocol = run_async(check_broker(guarded.party(site)))
    assert protocol == "5"
    assert levels(findings) == [
        ("broker", "OK"),
        ("MQTT 5", "OK"),
        ("MQTT 3.1.1", "OK"),
        ("access", "OK"),
        ("access", "OK"),
        ("access", "OK"),
    ]
    assert findings[-1].message.endswith("is refused, as it must be")


def test_rules_for_another_federation_fail(guarded: Guarded) -> None:
    """A broker whose rules name another federation does not let us write, which is said with the topic."""
    findings, _ = run_async(check_broker(guarded.party("site-1", federation="other")))
    assert findings[-1].level == "FAIL"
    assert "mb/v1/other/site/site-1/up/ctl" in findings[-1].message
    assert findings[-1].status == 3


def test_a_wrong_password_fails(guarded: Guarded) -> None:
    """Each protocol is tried and refused, with the keys to look at; access is not tried at all."""
    findings, protocol = run_async(check_broker(guarded.party("site-1", password="site-2")))
    assert protocol is None
    assert levels(findings) == [("broker", "OK"), ("MQTT 5", "FAIL"), ("MQTT 3.1.1", "FAIL")]
    assert "broker.password_file" in findings[1].hint


def test_something_else_on_the_port_fails() -> None:
    """A port behind which no broker answers is unavailable, not a crash."""

    async def scenario() -> list[Finding]:
        async def hang_up(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"SSH-2.0-OpenSSH\r\n")
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            findings, _ = await check_broker(Party("toy", None, BrokerSection(url=f"mqtt://127.0.0.1:{port}")))
        return findings

    findings = run_async(scenario())
    assert levels(findings) == [("broker", "OK"), ("MQTT 5", "FAIL"), ("MQTT 3.1.1", "FAIL")]
    assert {finding.status for finding in findings} == {0, 4}


def test_the_embedded_broker_has_one_protocol_less(tmp_path: Path) -> None:
    """A broker of 3.1.1 alone is a warning for MQTT 5, and that nothing can be seen of its rules another."""
    from broker.launcher import run_broker

    async def scenario() -> tuple[list[Finding], str | None]:
        async with run_broker("amqtt", tmp_path) as broker:
            return await check_broker(Party("toy", None, BrokerSection(url=broker.url)))

    findings, protocol = run_async(scenario())
    assert protocol == "3.1.1"
    assert levels(findings) == [
        ("broker", "OK"),
        ("MQTT 5", "WARN"),
        ("MQTT 3.1.1", "OK"),
        ("access", "OK"),
        ("access", "WARN"),
    ]


@asynccontextmanager
async def coordinating(root: Path) -> AsyncIterator[None]:
    """A toy coordinator that runs while the block does."""
    task = asyncio.create_task(toy_coordinator(root / "coordinator.toml"))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


def test_the_announcement_and_the_clock_are_read(tmp_path: Path, mosquitto_url: str) -> None:
    """A site that is away gets the coordinator's clock; one that runs keeps its name, and goes on undisturbed."""
    write_toy(tmp_path, mosquitto_url, sites=1, versions=2)
    federation = load_config(tmp_path / "federation.toml", FederationConfig)
    plan = load_plan(tmp_path / "coordinator" / "plan.json", federation)
    party = Party("toy", "site-1", BrokerSection(url=mosquitto_url))

    found: list[Announce] = []

    async def announced() -> bool:
        if announcement := await read_announcement(party, "5"):
            found.append(announcement)
        return bool(found)

    async def pulled() -> bool:
        return any((tmp_path / "site-1" / "states").glob("*.manifest"))

    async def scenario() -> None:
        assert await read_announcement(party, "5") is None
        async with coordinating(tmp_path):
            await until(announced)
            assert found[0].fingerprint == plan.fingerprint
            answer = await ask_clock(party, "5", plan)
            assert isinstance(answer, Welcome)
            assert abs(answer.clock - time.time()) < 10
            site = asyncio.create_task(toy_site(tmp_path / "site-1.toml", seconds=60))
            await until(pulled)
            refused = await ask_clock(party, "5", plan)
            assert isinstance(refused, Refused)
            assert refused.rule == "duplicate-site"
            assert not site.done()
            site.cancel()
            await asyncio.wait([site])

    run_async(scenario(), timeout_s=60)


def test_a_broker_that_refuses_ends_the_coordinator(tmp_path: Path, guarded: Guarded) -> None:
    """Without the password that the broker wants, the coordinator does not retry for ever: 3, and where to look."""
    write_toy(tmp_path, guarded.url, sites=1, versions=1)
    said = refused(tmp_path, "coordinator", "run", status=3)
    assert "does not admit this client" in said
    assert "broker.password_file" in said
