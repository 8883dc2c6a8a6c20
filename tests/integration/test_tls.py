"""A provisioned federation over a real Mosquitto with TLS: who gets in, who reads what, who is out when revoked."""

from __future__ import annotations

import asyncio
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from broker.launcher import find_mosquitto
from coordinator.journal import Journal
from coordinator.records import Finished, VersionCommitted
from mailboat import authority as bench
from mailboat.commands.enroll import accept, enroll
from mailboat.commands.provision import approve, init, revoke
from mailboat.doctor.network import Party, check_broker
from mailboat.enrolment import parse_request
from shared.config import BrokerSection, LinkSection
from shared.errors import RefusedError
from shared.link import Connected, Event, Link, LinkOptions, Packet
from shared.topics import Channel, topic
from shared.trust.signing import authority_fingerprint
from tests.helpers import AS_MYSELF, run_async
from tests.toys import toy_coordinator, toy_site, write_toy

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(find_mosquitto() is None, reason="Mosquitto is not installed: apt-get install mosquitto"),
]
SITES = ("site-1", "site-2")


@dataclass(frozen=True)
class Federation:
    """A folder with authority, kits and configuration, and the broker's port."""

    root: Path
    port: int

    def broker(self, who: str, **changes: Path | None) -> BrokerSection:
        """How `who` reaches the broker."""
        kit = self.root / f"{who}-kit"
        files = {"ca_file": kit / "ca.crt", "cert_file": kit / "tls.crt", "key_file": kit / "tls.key", **changes}
        return BrokerSection.model_validate({"url": f"mqtts://127.0.0.1:{self.port}", **files})


@pytest.fixture
def federation(tmp_path: Path, free_port: int) -> Federation:
    """Two toy sites and a coordinator, provisioned by the commands that people type."""
    return provisioned(tmp_path, free_port)


def provisioned(tmp_path: Path, free_port: int, *, quorum: int = 2, slice_kib: int = 64, extra: str = "") -> Federation:
    """The same with another quorum or size of chunks, and other settings of the federation behind [aggregation]."""
    url = f"mqtts://127.0.0.1:{free_port}"
    write_toy(tmp_path, url, sites=2, versions=3, quorum=quorum, slice_kib=slice_kib, sealed=True, extra=extra)
    for who in ("coordinator", *SITES):  # kits without certificates; the commands make better ones
        shutil.rmtree(tmp_path / f"{who}-kit")
        path = tmp_path / f"{who}.toml"
        files = "".join(f'{key}_file = "{who}-kit/{file}"\n' for key, file in _FILES.items())
        path.write_text(path.read_text().replace(f'url = "{url}"\n', f'url = "{url}"\n{files}'))
    folder = tmp_path / "authority"
    where = folder / "broker"
    init(
        folder,
        federation=tmp_path / "federation.toml",
        broker_host=["127.0.0.1"],
        port=free_port,
        broker_folder=where,
    )
    for name in SITES:
        admit(folder, name, tmp_path / f"{name}-kit")
    (tmp_path / "coordinator-kit").symlink_to(folder / "coordinator-kit")
    text = (tmp_path / "coordinator.toml").read_text()
    (tmp_path / "coordinator.toml").write_text(text.replace('"coordinator-kit', '"authority/coordinator-kit'))
    return Federation(tmp_path, free_port)


_FILES = {"ca": "ca.crt", "cert": "tls.crt", "key": "tls.key"}


def admit(folder: Path, name: str, kit: Path, *, replace: bool = False) -> None:
    """Enrol at the site, approve at the authority, accept at the site."""
    enroll(name=name, out=kit)
    request = kit / "request.json"
    said = parse_request(request.read_bytes()).fingerprint
    approve(request, folder=folder, fingerprint=said, replace=replace)
    known = authority_fingerprint(bench.open_authority(folder).public)
    accept(folder / "grants" / f"{name}.grant", kit=kit, authority=known)


@contextmanager
def serving(federation: Federation) -> Iterator[subprocess.Popen[bytes]]:
    """Mosquitto with the generated configuration, as it is but for the user that runs the tests."""
    program = find_mosquitto()
    assert program is not None
    folder = federation.root / "authority" / "broker"
    config = federation.root / "mosquitto.conf"
    config.write_text(f"{(folder / 'mosquitto.conf').read_text()}\n{AS_MYSELF}")
    log = federation.root / "mosquitto.log"
    with log.open("wb") as output:
        process = subprocess.Popen([program, "-c", config], stderr=output, stdout=output)
    try:
        run_async(_says(log, "running"))
        yield process
    finally:
        process.kill()
        process.wait()


async def _says(log: Path, words: str) -> None:
    while words not in log.read_text():  # noqa: ASYNC110 - another process's file, which raises no event
        await asyncio.sleep(0.01)


def link(section: BrokerSection, *subscriptions: str, client_id: str = "any") -> Link:
    """A link of the project's own kind."""
    return Link(LinkOptions(section, LinkSection(stall_s=2.0), client_id, subscriptions))


def admitted(section: BrokerSection) -> None:
    """Return once the broker has let this client in and taken a message from it."""

    async def run() -> None:
        async with link(section, "t") as made:
            assert isinstance(await anext(made.events()), Connected)

    run_async(run(), timeout_s=15)


def refused(section: BrokerSection) -> RefusedError:
    """The error under which a client ends."""
    with pytest.raises(RefusedError) as caught:
        admitted(section)
    return caught.value


def test_a_provisioned_federation_reaches_the_last_version(federation: Federation) -> None:
    """Coordinator and two sites, provisioned by the commands, finish a sealed run over TLS with certificates."""
    root = federation.root

    async def everybody() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(toy_coordinator(root / "coordinator.toml"))
            for name in SITES:
                group.create_task(toy_site(root / f"{name}.toml"))

    with serving(federation):
        run_async(everybody(), timeout_s=60)
    with Journal.open_read(root / "coordinator" / "journal.sqlite") as journal:
        records = list(journal.replay())
    versions = [record for record in records if isinstance(record, VersionCommitted)]
    assert [version.version for version in versions] == [1, 2, 3]
    assert {part.site for version in versions for part in version.contributions} == set(SITES)
    assert any(isinstance(record, Finished) for record in records)


def test_a_certificate_opens_its_own_topics_alone(federation: Federation) -> None:
    """A site's messages under another's name reach nobody, and what is said to another does not reach it.

    Its own pass on the very same links, so the silence is a refusal and not a broken link.
    """

    async def run() -> tuple[set[bytes], set[bytes]]:
        up, down = (partial(topic, "toy", channel) for channel in (Channel.UP_CTL, Channel.DOWN_CTL))
        async with (
            link(federation.broker("coordinator"), up("+"), "#") as coordinator,
            link(federation.broker("site-1"), down("site-1"), down("site-2"), "#") as site,
        ):
            events = coordinator.events(), site.events()
            protocol = [await connected(each) for each in events][1]
            for others in (up("site-2"), topic("toy", Channel.ANNOUNCE)):
                # MQTT 3.1.1, which a broker that is slow to answer is spoken to in, has no words for a refusal.
                with pytest.raises(RefusedError, match=others) if protocol == "5" else nullcontext():
                    await site.publish(others, b"forged")
            await site.publish(up("site-1"), b"last")
            await coordinator.publish(down("site-2"), b"not for you")
            await coordinator.publish(down("site-1"), b"last")
            return await heard_until_last(events[0]), await heard_until_last(events[1])

    with serving(federation):
        assert run_async(run(), timeout_s=20) == ({b"last"}, {b"last"})


async def connected(events: AsyncIterator[Event]) -> str:
    """Wait until the link stands; the protocol that it speaks."""
    event = await anext(events)
    assert isinstance(event, Connected)
    return event.protocol


async def heard_until_last(events: AsyncIterator[Event]) -> set[bytes]:
    """What a link hears up to the message `last`."""
    heard = set()
    while b"last" not in heard:
        event = await anext(events)
        if isinstance(event, Packet):
            heard.add(event.payload)
            assert heard <= {b"last"}, heard
    return heard


def test_nobody_enters_without_a_certificate_of_the_federation(federation: Federation) -> None:
    """No certificate, and one of another authority, are refused by name; the right one is let in."""
    other = federation.root / "other"
    init(other, federation=federation.root / "federation.toml", broker_host=["127.0.0.1"], port=1, broker_folder=other)
    admit(other, "site-1", federation.root / "other-kit")
    kit = federation.root / "other-kit"
    with serving(federation):
        admitted(federation.broker("site-1"))
        assert "certificate" in refused(federation.broker("site-1", cert_file=None, key_file=None)).rule
        stranger = federation.broker("site-1", cert_file=kit / "tls.crt", key_file=kit / "tls.key")
        assert "certificate" in refused(stranger).rule


def test_a_client_id_cannot_be_taken_over(federation: Federation) -> None:
    """Another site's connection lives on when somebody dials in under its client id."""

    async def run() -> None:
        down = topic("toy", Channel.DOWN_CTL, "site-1")
        async with (
            link(federation.broker("coordinator"), client_id="coordinator") as coordinator,
            link(federation.broker("site-1"), down, client_id="site-1") as victim,
        ):
            events = victim.events()
            assert isinstance(await anext(events), Connected)
            async with link(federation.broker("site-2"), client_id="site-1") as thief:
                assert isinstance(await anext(thief.events()), Connected)
            await anext(coordinator.events())
            await coordinator.publish(down, b"still here")
            event = await anext(events)  # a lost connection would be told first
            assert isinstance(event, Packet)
            assert event.payload == b"still here"

    with serving(federation):
        run_async(run(), timeout_s=20)


def test_a_revoked_certificate_is_refused_after_sighup(federation: Federation) -> None:
    """SIGHUP is enough: the revoked site is refused, the other one is not, twice over; new keys enter again."""
    folder, log = federation.root / "authority", federation.root / "mosquitto.log"
    with serving(federation) as broker:
        admitted(federation.broker("site-2"))
        for gone, here in (("site-2", "site-1"), ("site-1", "coordinator")):
            revoke(gone, folder=folder)
            size = log.stat().st_size
            broker.send_signal(signal.SIGHUP)
            run_async(_grows(log, size))
            assert "certificate" in refused(federation.broker(gone)).rule
            findings, _ = run_async(check_broker(Party("toy", gone, federation.broker(gone))))
            assert ["certificate" in each.message for each in findings if each.level == "FAIL"] == [True, True]
            admitted(federation.broker(here))
        admit(folder, "site-2", federation.root / "site-2-again-kit")
        admitted(federation.broker("site-2-again"))
        refused(federation.broker("site-2"))


def test_a_revoked_site_is_cut_off_on_a_connection_that_stands(federation: Federation) -> None:
    """After SIGHUP the revoked site's live session can say and hear nothing, while its neighbour's goes on.

    Admitted again with new keys, the name may speak and hear as before; whoever holds the old ones ends.
    """
    folder, log = federation.root / "authority", federation.root / "mosquitto.log"
    up, down = (partial(topic, "toy", channel) for channel in (Channel.UP_CTL, Channel.DOWN_CTL))

    async def reload(broker: subprocess.Popen[bytes]) -> None:
        size = log.stat().st_size
        broker.send_signal(signal.SIGHUP)
        await _grows(log, size)

    async def run(broker: subprocess.Popen[bytes]) -> list[set[bytes]]:
        async with (
            link(federation.broker("coordinator"), up("+")) as coordinator,
            link(federation.broker("site-1"), down("site-1")) as gone,
            link(federation.broker("site-2"), down("site-2")) as here,
        ):
            links = (coordinator, gone, here)
            events = [each.events() for each in links]
            protocol = [await connected(each) for each in events][1]
            await coordinator.publish(down("site-1"), b"last")
            await gone.publish(up("site-1"), b"last")
            heard = [await heard_until_last(events[0]), await heard_until_last(events[1])]
            revoke("site-1", folder=folder)
            await reload(broker)
            await coordinator.publish(down("site-1"), b"too late")
            with pytest.raises(RefusedError, match=up("site-1")) if protocol == "5" else nullcontext():
                await gone.publish(up("site-1"), b"too late")
            await coordinator.publish(down("site-2"), b"last")
            await here.publish(up("site-2"), b"last")
            heard += [await heard_until_last(events[0]), await heard_until_last(events[2])]
            admit(folder, "site-1", federation.root / "site-1-again-kit")
            await reload(broker)
            async with link(federation.broker("site-1-again"), down("site-1")) as again:
                new = again.events()
                await connected(new)
                await coordinator.publish(down("site-1"), b"last")
                await again.publish(up("site-1"), b"last")
                heard += [await heard_until_last(events[0]), await heard_until_last(new)]
            with pytest.raises(RefusedError) as refusal:
                await heard_until_last(events[1])
            assert "certificate" in refusal.value.rule
        return heard

    with serving(federation) as broker:
        assert run_async(run(broker), timeout_s=30) == [{b"last"}] * 6


async def _grows(log: Path, size: int) -> None:
    while b"Reloading config" not in log.read_bytes()[size:]:  # noqa: ASYNC110 - another process's file
        await asyncio.sleep(0.01)
