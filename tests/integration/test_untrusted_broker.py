"""The broker is somebody else's: what its owner learns of a sealed run, and what a revoked site still has there."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import ssl
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from safetensors.numpy import load_file, save_file

from broker import provision
from broker.config import PACKET_BYTES_MAX
from broker.launcher import find_mosquitto
from coordinator.records import Finished, VersionCommitted
from mailboat import authority as bench
from mailboat.commands.provision import revoke
from mailboat.flaky import Conditions, FlakyProxy
from mailboat.issuing import new_serial
from shared.config import BrokerSection
from shared.errors import RefusedError
from shared.tensorfile import F32Array
from shared.topics import Channel, topic
from shared.trust import kit as kits
from shared.trust.witness import HEADS
from tests.eavesdrop import Spy, learnt
from tests.helpers import run_async, until
from tests.integration.test_renewal import Mosquitto, live
from tests.integration.test_tls import SITES, Federation, provisioned
from tests.toys import INITIAL, ToyTrained, ToyTrainer, toy_coordinator, toy_records, toy_site, write_toy
from tests.unit.shared.trust.sealed_world import altered

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.timeout(200),
    pytest.mark.skipif(find_mosquitto() is None, reason="Mosquitto is not installed: apt-get install mosquitto"),
]
LABELS = '[task]\nlabels = ["zebrafinding", "okapidrug"]\n'
METRICS = {"loss": 0.7310585786300049, "f1/zebrafinding": 0.8807970779778823}
SECRETS = {
    "label",
    "metric",
    "tensor value",
    "frame",
    "digest",
    "receipt",
    "loss",
    "frame_hashes",
    "outcome",
    "progress",
}
CUT_S = 10.0


class Noisy(ToyTrainer):
    """Its deltas are noise, and its metrics name a label: each is recognised wherever it appears."""

    def __init__(self, seed: int) -> None:
        super().__init__(step=0.0, seconds=0.1, examples=10)
        self.rng = np.random.default_rng(seed)
        self.made: list[dict[str, F32Array]] = []
        """Its deltas, in order."""

    async def train(
        self, state: Path, base_version: int, delta: Path, *, on_progress: Callable[[float, float], None]
    ) -> ToyTrained:
        """Noise on all tensors, zeros of no kind."""
        await asyncio.sleep(self.seconds)
        on_progress(1.0, 0.0)
        shapes = {name: values.shape for name, values in load_file(state).items()}
        self.made.append({name: self.rng.normal(0, 1, shape).astype(np.float32) for name, shape in shapes.items()})
        save_file(self.made[-1], delta)
        return ToyTrained(self.examples, dict(METRICS))


async def everybody(root: Path, spy: Spy) -> None:
    """A run to its end with a spy at the broker."""
    spying = asyncio.create_task(spy.run())
    await spy.listening.wait()
    async with asyncio.TaskGroup() as group:
        group.create_task(toy_coordinator(root / "coordinator.toml"))
        for number, name in enumerate(SITES):
            group.create_task(toy_site(root / f"{name}.toml", trainer=Noisy(number)))
    spying.cancel()


def let_in(federation: Federation, may: str = "read") -> BrokerSection:
    """What the owner of the broker can always do: a client of his own that may `read`, or `readwrite`, everything."""
    folder, kit = federation.root / "authority", federation.root / "spy-kit"
    opened = bench.open_authority(folder)
    kits.generate_keys(kit)
    key = provision.load_p256(kits.read_private(kit / kits.TLS_KEY), where="the test").public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    made = provision.issue_client(opened.cas[0], key, name="spy", serial=new_serial(), now=bench.unix_now(), days=1)
    (kit / kits.TLS_CERT).write_bytes(provision.certificate_pem(made))
    (kit / kits.CA_CERT).write_bytes(opened.bundle)
    rules = folder / "broker" / "acl"
    rules.write_text(rules.read_text() + f"\nuser spy\ntopic {may} #\n")
    return federation.broker("spy")


def test_the_broker_s_owner_learns_no_tensor_value_metric_or_label(tmp_path: Path, free_port: int) -> None:
    """A subscriber to `#` at the production broker, with TLS and a rule of its own, hears all and understands nothing.

    Nor does who reads the broker's log with all of its switches on. All channels but that for repairs were in use, and
    what receipts, heads and the sites' words on themselves said is among the secrets. The same search finds every kind
    of secret in what an open federation says, so the search is worth something.
    """
    federation = provisioned(tmp_path, free_port, extra=LABELS)
    broker, spy = Mosquitto(federation, "log_type all\n"), Spy(let_in(federation))

    async def run() -> None:
        await broker.start()
        try:
            await everybody(tmp_path, spy)
        finally:
            await broker.stop()

    run_async(run(), timeout_s=120)
    log = broker.log.read_bytes()
    names = [packet.topic.encode() for packet in spy.packets]
    assert learnt(tmp_path, [*spy.payloads, *names, log]) == set()
    said = {packet.topic.removeprefix("mb/v1/toy/") for packet in spy.packets if packet.payload}
    assert said >= {"announce", "bulk"}
    assert said >= {f"site/{name}/{way}" for name in SITES for way in ("up/ctl", "up/data", "down/ctl", "presence")}
    assert sum(map(len, spy.payloads)) > 6 * 300_000  # six noisy updates of 400 kB, and states
    for name in SITES:
        receipts = tmp_path / name / "receipts"
        assert len(list(receipts.glob("*.json"))) == 3
        assert len((receipts / HEADS).read_bytes().splitlines()) >= 3
    here = live(tmp_path)["sites"]
    assert isinstance(here, dict)
    assert {name: site["metrics"] for name, site in here.items()} == dict.fromkeys(SITES, METRICS)
    assert b"Received PUBLISH from site-1" in log


def test_the_search_for_secrets_finds_them_where_nothing_is_sealed(tmp_path: Path, mosquitto_url: str) -> None:
    """Labels (in the names of metrics), metrics, tensor values, frames, digests, receipts and field names, in clear."""
    write_toy(tmp_path, mosquitto_url, sites=2, versions=3, quorum=2, extra=LABELS)
    spy = Spy(BrokerSection(url=mosquitto_url))
    run_async(everybody(tmp_path, spy), timeout_s=120)
    assert learnt(tmp_path, spy.payloads) >= SECRETS


INDEX_AT = 20
"""Where the index of a chunk stands in its header."""
_INDEX = struct.Struct(">I")


class Meddler(Spy):
    """The broker's owner, who says everything once more: altered, as another chunk, on others' topics."""

    def __init__(self, broker: BrokerSection) -> None:
        super().__init__(broker)
        self._mine: set[bytes] = set()

    async def meddle(self) -> None:
        """Until cancelled; chunks first, because their transfers do not wait."""
        done = 0
        while True:
            await asyncio.sleep(0.005)
            heard, done = self.packets[done:], len(self.packets)
            new = [packet for packet in heard if packet.payload and packet.payload not in self._mine]
            copies = [copy for packet in new for copy in _copies(packet.topic, packet.payload)]
            self._mine |= {what for _topic, what in copies}
            copies.sort(key=lambda copy: not copy[1].startswith(b"MB"))
            await asyncio.gather(*(self.link.publish(there, what) for there, what in copies))


def _copies(topic: str, payload: bytes) -> Iterator[tuple[str, bytes]]:
    other = topic.replace("site-1", "site-x").replace("site-2", "site-1").replace("site-x", "site-2")
    yield topic, altered(payload, 8 * (len(payload) // 2) + 3)
    yield other, payload
    if not topic.endswith("presence"):  # which may be repeated: whoever holds the broker tells who is there
        yield topic, payload
    if payload.startswith(b"MB"):  # as the chunk of a place where nothing is yet
        (index,) = _INDEX.unpack_from(payload, INDEX_AT)
        yield topic, payload[:INDEX_AT] + _INDEX.pack(index + 9) + payload[INDEX_AT + _INDEX.size :]


def test_a_broker_that_repeats_alters_and_misdirects_everything_changes_nothing(
    tmp_path: Path, free_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Control messages, manifests, chunks of updates and of states: each copy is refused under its rule.

    The run comes to its end with the very numbers that it has undisturbed, and each update counted once. A transfer has
    many chunks, over lines that take their time, and the owner sits beside the broker: copies come while more of it is
    awaited.
    """
    federation = provisioned(tmp_path, free_port, slice_kib=16)
    broker, owner = Mosquitto(federation), Meddler(let_in(federation, "readwrite"))
    trainers = [Noisy(number) for number in range(len(SITES))]

    async def run() -> None:
        await broker.start()
        meddling = asyncio.create_task(owner.run())
        try:
            await owner.listening.wait()
            again = asyncio.create_task(owner.meddle())
            async with FlakyProxy("127.0.0.1", free_port, conditions=Conditions(latency_s=0.01)) as line:
                for name in ("coordinator", *SITES):
                    path = tmp_path / f"{name}.toml"
                    path.write_text(path.read_text().replace(f":{free_port}", f":{line.port}"))
                async with asyncio.TaskGroup() as group:
                    group.create_task(toy_coordinator(tmp_path / "coordinator.toml"))
                    for name, trainer in zip(SITES, trainers, strict=True):
                        group.create_task(toy_site(tmp_path / f"{name}.toml", trainer=trainer))
            again.cancel()
        finally:
            meddling.cancel()
            await broker.stop()

    run_async(run(), timeout_s=150)
    versions = [record for record in toy_records(tmp_path) if isinstance(record, VersionCommitted)]
    assert [{part.site for part in version.contributions} for version in versions] == [set(SITES)] * 3
    for name, values in load_file(tmp_path / "coordinator" / "masters" / "v00000003.safetensors").items():
        steps = [sum(trainer.made[version][name] for trainer in trainers) / len(trainers) for version in range(3)]
        np.testing.assert_allclose(values, INITIAL + sum(steps), atol=1e-5)
    told = capsys.readouterr().out
    rules = set(re.findall(r"rule=(\S+) topic=mb/v1/toy/(\S+)", told))
    assert ("bad-signature", "announce") in rules  # a state's manifest
    for name in SITES:  # offers, with an update's manifest, and what is answered
        assert {("bad-signature", f"site/{name}/up/ctl"), ("unknown-key", f"site/{name}/up/ctl")} <= rules
        assert ("bad-signature", f"site/{name}/down/ctl") in rules
    assert "replayed" in {rule for rule, _topic in rules}
    for kind in ("state", "update"):
        assert re.search(rf"refused a chunk +rule=bad-seal {kind}=", told), kind


# -- a revoked site ---


class Session:
    """A connection of somebody who holds a site's kit, speaks MQTT by hand, and obeys nobody."""

    def __init__(self, federation: Federation, name: str) -> None:
        section = federation.broker(name)
        context = ssl.create_default_context(cafile=str(section.ca_file))
        assert section.cert_file is not None
        context.load_cert_chain(section.cert_file, section.key_file)
        with contextlib.ExitStack() as stack:
            plain = stack.enter_context(socket.create_connection(("127.0.0.1", federation.port), timeout=20))
            self.link = stack.enter_context(context.wrap_socket(plain, server_hostname="127.0.0.1"))
            self._enter(name)
            self.close = stack.pop_all().close

    def _enter(self, name: str) -> None:
        client = name.encode()
        body = b"\x00\x04MQTT\x04\x02\x00\x00" + len(client).to_bytes(2, "big") + client  # clean, no keepalive
        self.link.sendall(bytes([0x10, len(body)]) + body)
        if self.link.recv(4)[:2] != b"\x20\x02":
            raise ConnectionError("not let in")

    def answered(self) -> bool:
        """Whether the broker answers a ping, instead of ending it for what came before."""
        with contextlib.suppress(OSError):
            self.link.sendall(b"\xc0\x00")
            return self.link.recv(2) == b"\xd0\x00"
        return False

    def ended_within(self, seconds: float) -> bool:
        """Whether the broker ends it in that time."""
        self.link.settimeout(seconds)
        try:
            return self.link.recv(1) == b""
        except TimeoutError:
            return False
        except OSError:
            return True


def test_a_packet_above_the_limit_ends_its_sender(tmp_path: Path, free_port: int) -> None:
    """What is smaller than the bound in the generated configuration passes, and others are served on."""
    federation = provisioned(tmp_path, free_port)
    broker = Mosquitto(federation)

    def published(remaining: int) -> bool:
        hostile = Session(federation, "site-1")
        with contextlib.suppress(OSError):  # cut off in the middle of it
            hostile.link.sendall(publish(topic("toy", Channel.UP_DATA, "site-1"), remaining))
        try:
            return hostile.answered()
        finally:
            hostile.close()

    async def run() -> None:
        await broker.start()
        try:
            assert await asyncio.to_thread(published, PACKET_BYTES_MAX - 5)  # the kind and the length are five bytes
            assert not await asyncio.to_thread(published, PACKET_BYTES_MAX)
            assert await asyncio.to_thread(let_in_again, federation, "site-2")
        finally:
            await broker.stop()

    run_async(run(), timeout_s=60)


def publish(name: str, remaining: int) -> bytes:
    """A packet of QoS 0 of zeros, with so many bytes behind its length."""
    head = len(name).to_bytes(2, "big") + name.encode()
    length = bytes(remaining >> 7 * place & 0x7F | (0x80 if place < 3 else 0) for place in range(4))
    return b"\x30" + length + head + bytes(remaining - len(head))


def let_in_again(federation: Federation, name: str) -> bool:
    """Whether the broker takes another such connection."""
    try:
        Session(federation, name).close()
    except OSError:  # an alert of TLS, or a connection that ends before it is read
        return False
    return True


def test_revoking_ends_a_site_that_is_connected_within_ten_seconds(
    tmp_path: Path, free_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Copies of the lists and a reload: the site's process ends, the coordinator has struck it, the other goes on."""
    federation = provisioned(tmp_path, free_port, quorum=1)
    broker, took = Mosquitto(federation), []

    async def run() -> None:
        await broker.start()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(toy_coordinator(tmp_path / "coordinator.toml"))
                doomed = asyncio.create_task(toy_site(tmp_path / "site-1.toml", seconds=150.0))
                await until(lambda: "pulled" in capsys.readouterr().out)
                began = time.monotonic()
                await asyncio.to_thread(revoke, "site-1", folder=tmp_path / "authority")
                await broker.reload()
                with pytest.raises(RefusedError):
                    await doomed
                took.append(time.monotonic() - began)
                with pytest.raises(RefusedError) as again:
                    await toy_site(tmp_path / "site-1.toml")
                assert "certificate" in again.value.rule
                group.create_task(toy_site(tmp_path / "site-2.toml"))
        finally:
            await broker.stop()

    run_async(run(), timeout_s=150)
    assert took[0] < CUT_S
    records = toy_records(tmp_path)
    assert any(isinstance(record, Finished) for record in records)
    sites = {part.site for each in records if isinstance(each, VersionCommitted) for part in each.contributions}
    assert sites == {"site-2"}


def test_a_restart_of_the_broker_ends_a_session_that_obeys_nobody(tmp_path: Path, free_port: int) -> None:
    """A reload leaves it, deaf and dumb; a restart ends it within ten seconds and lets it in no more.

    Coordinator and the other site are back by themselves, and the run comes to its end.
    """
    federation = provisioned(tmp_path, free_port, quorum=1)
    broker = Mosquitto(federation)

    async def run() -> None:
        await broker.start()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(toy_coordinator(tmp_path / "coordinator.toml"))
                group.create_task(toy_site(tmp_path / "site-2.toml", seconds=3.0))
                hostile = await asyncio.to_thread(Session, federation, "site-1")
                await asyncio.to_thread(revoke, "site-1", folder=tmp_path / "authority")
                await broker.reload()
                assert not await asyncio.to_thread(hostile.ended_within, 1.0)
                await broker.stop()
                await broker.start()
                assert await asyncio.to_thread(hostile.ended_within, CUT_S)
                hostile.close()
                assert not await asyncio.to_thread(let_in_again, federation, "site-1")
        finally:
            await broker.stop()

    run_async(run(), timeout_s=150)
    assert any(isinstance(record, Finished) for record in toy_records(tmp_path))
