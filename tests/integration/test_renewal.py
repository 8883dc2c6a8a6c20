"""Renewal over the federation's own channel, over a real Mosquitto with TLS: certificates, another CA, another key."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from cryptography import x509

from broker import provision
from broker.launcher import find_mosquitto
from coordinator.records import Finished, Signed, VersionCommitted, Witnessed
from mailboat import authority as bench
from mailboat.commands.rotate import renew, rotate
from mailboat.register import Entry
from shared.config import BrokerSection, LinkSection
from shared.errors import RefusedError
from shared.link import Connected, Link, LinkOptions
from shared.trust import kit as kits
from shared.trust.membership import verify_membership
from shared.trust.signing import authority_fingerprint
from tests.commands import call
from tests.commands import refused as refused_by
from tests.helpers import AS_MYSELF, run_async, until
from tests.integration.test_tls import SITES, Federation, federation
from tests.toys import Gated, toy_coordinator, toy_records, toy_site

__all__ = ["federation"]

PATIENCE_S = 280.0
"""Some twenty seconds of waiting for second-long looks and reconnects, on a machine that has other things to do."""

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.timeout(PATIENCE_S + 20),
    pytest.mark.skipif(find_mosquitto() is None, reason="Mosquitto is not installed: apt-get install mosquitto"),
]


class Mosquitto:
    """The federation's broker, to be stopped and started while its clients live."""

    def __init__(self, federation: Federation, extra: str = "") -> None:
        """`extra` is what the generated configuration says besides."""
        self.root = federation.root
        self.extra = extra
        self.log = federation.root / "mosquitto.log"
        self.process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start it with the generated configuration, as it is but for the user that runs the tests."""
        program = find_mosquitto()
        assert program is not None
        config = self.root / "mosquitto.conf"
        generated = (self.root / "authority" / "broker" / "mosquitto.conf").read_text()
        config.write_text(f"{generated}\n{AS_MYSELF}{self.extra}")
        with self.log.open("wb") as output:
            self.process = await asyncio.create_subprocess_exec(program, "-c", config, stderr=output, stdout=output)
        await until(lambda: "running" in self.log.read_text())

    async def stop(self) -> None:
        """End it at once."""
        if self.process is not None:
            self.process.kill()
            await self.process.wait()

    async def restart(self) -> None:
        """Stop and start it, and wait until coordinator and sites have heard of each other again."""
        before = connections(self.root)
        await self.stop()
        await self.start()
        await until(lambda: all((connections(self.root).get(name) or 0) > count for name, count in before.items()))

    async def reload(self) -> None:
        """Have it read its certificates again."""
        assert self.process is not None
        size = self.log.stat().st_size
        self.process.send_signal(signal.SIGHUP)
        await until(lambda: b"Reloading config" in self.log.read_bytes()[size:])


@asynccontextmanager
async def running(federation: Federation, *, upto: int = 0) -> AsyncIterator[tuple[Mosquitto, asyncio.Event]]:
    """Broker, coordinator and both sites, connected; leaving opens the gate and waits for the end of the run."""
    gate, broker, root = asyncio.Event(), Mosquitto(federation), federation.root
    try:
        await broker.start()
        async with asyncio.TaskGroup() as group:
            group.create_task(toy_coordinator(root / "coordinator.toml"))
            for name in SITES:
                group.create_task(toy_site(root / f"{name}.toml", trainer=Gated(gate, upto)))
            await until(lambda: connections(root).keys() == set(SITES))
            yield broker, gate
            gate.set()
    finally:
        await broker.stop()


def live(root: Path) -> dict[str, object]:
    """The coordinator's live view; empty before the first one."""
    path = root / "coordinator" / "status.json"
    told: dict[str, object] = json.loads(path.read_bytes()) if path.exists() else {}
    return told


def connections(root: Path) -> dict[str, int]:
    """How often each site that is here has connected anew, as it says itself."""
    sites = live(root).get("sites")
    here = {name: site for name, site in sites.items() if site["present"]} if isinstance(sites, dict) else {}
    return {name: site["reconnects"] for name, site in here.items()}


def taken(root: Path) -> bool:
    """Whether the coordinator has heard of every site that it holds the newest grant."""
    certificates = {name: certificate(root, name).serial_number for name in SITES}
    issued = {name: entry.serial for name in SITES if (entry := current(root, name))}
    return certificates == issued and live(root).get("renewals") == []


def current(root: Path, name: str) -> Entry | None:
    """What the authority's register says of a name."""
    return bench.open_authority(root / "authority").register.current(name)


def certificate(root: Path, name: str) -> x509.Certificate:
    """The TLS certificate in a site's kit."""
    return x509.load_pem_x509_certificate((root / f"{name}-kit" / kits.TLS_CERT).read_bytes())


async def refused(section: BrokerSection) -> None:
    """Return once the broker has refused this certificate; fails when it lets the client in."""
    async with Link(LinkOptions(section, LinkSection(), "any", ("t",))) as link:
        with pytest.raises(RefusedError) as caught:
            assert isinstance(await anext(link.events()), Connected)
        assert "certificate" in caught.value.rule


def check_run(root: Path) -> None:
    """The run came to its end with everybody."""
    records = toy_records(root)
    versions = [record for record in records if isinstance(record, VersionCommitted)]
    assert any(isinstance(record, Finished) for record in records)
    assert {part.site for version in versions for part in version.contributions} == set(SITES)


def test_a_running_site_is_renewed_over_the_channel(federation: Federation) -> None:
    """After `rotate` the site has new membership and certificate within seconds, and the next connection uses it.

    A broker that refuses the certificate from before lets the site in again; nobody has touched the site's machine.
    """
    root, folder = federation.root, federation.root / "authority"
    kit = root / "site-1-kit"
    keys = {name: (kit / name).read_bytes() for name in (kits.SIGN_KEY, kits.BOX_KEY, kits.TLS_KEY)}
    before, old = certificate(root, "site-1"), root / "old.crt"
    shutil.copy(kit / kits.TLS_CERT, old)

    async def run() -> None:
        async with running(federation) as (broker, _gate):
            rotate("site-1", folder=folder, days=9)
            await until(lambda: taken(root))
            opened = bench.open_authority(folder)
            gone = {before.serial_number: bench.unix_now()}
            crl = provision.make_crl(opened.cas[0], gone, number=99, at=bench.unix_now() - 1, days=9)
            (folder / "broker" / "crl.pem").write_bytes(crl)
            await broker.restart()
            await refused(federation.broker("site-1", cert_file=old))

    run_async(run(), timeout_s=PATIENCE_S)
    check_run(root)
    assert certificate(root, "site-1").serial_number != before.serial_number
    assert {name: (kit / name).read_bytes() for name in keys} == keys
    kits.check_kit_modes(kit)
    member = kits.load_kit(kit, role="site", federation="toy", now=bench.unix_now()).member
    assert member.serial == certificate(root, "site-1").serial_number
    assert member.not_after < before.not_valid_after_utc.timestamp()


def test_another_ca_takes_the_place_of_the_first_and_nobody_is_lost(federation: Federation) -> None:
    """The four steps of a roll-over while everybody runs: in the end the old CA is trusted by nobody.

    Only the broker's folder, which is its own here, and the authority's are touched; no site is restarted.
    """
    root, folder = federation.root, federation.root / "authority"
    before, old = certificate(root, "site-1"), root / "old.crt"
    shutil.copy(root / "site-1-kit" / kits.TLS_CERT, old)
    first = (folder / "ca.crt").read_text()

    async def run() -> None:
        async with running(federation) as (broker, _gate):
            rotate("ca", folder=folder)
            await broker.reload()
            renew(folder=folder, everybody=True)
            await until(lambda: taken(root))
            for name in SITES:
                assert first in (root / f"{name}-kit" / kits.CA_CERT).read_text()
            await broker.restart()  # everybody comes back with certificates of the new CA
            rotate("broker", folder=folder)
            await broker.reload()
            rotate("ca", folder=folder, finish=True)
            await until(lambda: taken(root))
            await broker.reload()
            await refused(federation.broker("site-1", cert_file=old))
            await broker.restart()

    run_async(run(), timeout_s=PATIENCE_S)
    check_run(root)
    second = (folder / "ca-2.crt").read_text()
    assert not (folder / "ca.key").exists()
    for holder in (folder / "broker", folder / "coordinator-kit", *(root / f"{name}-kit" for name in SITES)):
        assert (holder / "ca.crt").read_text() == second
    ca = x509.load_pem_x509_certificate(second.encode())
    for name in SITES:
        certificate(root, name).verify_directly_issued_by(ca)
    assert before.issuer != ca.subject


def test_another_key_of_the_authority_takes_the_place_of_the_first_in_mid_run(
    federation: Federation, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The three steps while everybody runs; whoever knows the new key alone believes rows from before and after.

    Nobody is told of a lost membership, no site is touched or restarted, and the key before is nowhere any more.
    """
    root, folder = federation.root, federation.root / "authority"
    first = bench.open_authority(folder).public

    async def run() -> None:
        async with running(federation, upto=1):
            await until(lambda: live(root).get("version") == 1)
            rotate("authority", folder=folder)
            renew(folder=folder, everybody=True)
            await until(lambda: taken(root))
            rotate("authority", folder=folder, finish=True)

    run_async(run(), timeout_s=PATIENCE_S)
    check_run(root)
    told = capsys.readouterr()
    assert "lost its membership" not in told.out + told.err
    assert "the authority has another key now" in told.out + told.err
    second = bench.open_authority(folder).public
    assert not (folder / "authority.key").exists()
    for holder in (folder / "coordinator-kit", *(root / f"{name}-kit" for name in SITES)):
        assert kits.load_authorities(holder / kits.AUTHORITY) == (second,)
    signers = [each.member for each in toy_records(root) if isinstance(each, Signed | Witnessed)]
    assert {first, second} == {issuer for each in signers for issuer in (first, second) if issued(each, issuer)}

    receipts = [word for name in SITES for word in ("--receipts", str(root / name / "receipts"))]
    checked = call(root, "audit", "verify", *receipts)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    (tmp_path / "alone").mkdir()
    shutil.copy(folder / "coordinator-kit" / kits.AUTHORITY, tmp_path / "alone")
    alone = refused_by(root, "audit", "verify", "--authority", str(tmp_path / "alone" / kits.AUTHORITY), status=3)
    assert "signer" in alone  # what the first key signed is believed through the endorsements, and not without
    exported = call(root, "audit", "export", "--out", str(tmp_path / "run.tar"))
    assert exported.returncode == 0, exported.stderr
    with tarfile.open(tmp_path / "run.tar") as tar:
        tar.extractall(tmp_path, filter="data")
    script = tmp_path / "toy-v00000003" / "verify.py"
    outside = subprocess.run([sys.executable, "-I", str(script)], capture_output=True, text=True, check=False, cwd="/")
    assert outside.returncode == 0, outside.stdout
    assert authority_fingerprint(second).replace(" ", "") in outside.stdout


def issued(document: bytes, authority: bytes) -> bool:
    """Whether this key has signed a membership."""
    try:
        verify_membership(document, [authority], federation="toy")
    except RefusedError:
        return False
    return True
