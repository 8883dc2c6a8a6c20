"""Whole sealed runs over a real Mosquitto: nobody reads along, nobody is let in, whoever is revoked is out."""

from __future__ import annotations

import asyncio
import logging
import struct
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from coordinator.journal import Journal
from coordinator.records import Finished, VersionCommitted
from shared.config import BrokerSection, FederationConfig
from shared.configfile import load_config
from shared.errors import RefusedError
from shared.messages import Hello, chunk_header, encode
from tests.eavesdrop import Spy, learnt
from tests.factories import digest
from tests.helpers import run_async
from tests.kits import Kits
from tests.toys import INITIAL, toy_coordinator, toy_plan, toy_site, write_toy


def _versions(root: Path) -> list[VersionCommitted]:
    with Journal.open_read(root / "coordinator" / "journal.sqlite") as journal:
        return [record for record in journal.replay() if isinstance(record, VersionCommitted)]


def _finished(root: Path) -> bool:
    with Journal.open_read(root / "coordinator" / "journal.sqlite") as journal:
        return any(isinstance(record, Finished) for record in journal.replay())


def _spied(url: str, *parts: Coroutine[Any, Any, None], timeout_s: float = 60) -> Spy:
    """Run all parts to their end, and return what a spy at the broker saw."""

    async def everybody() -> Spy:
        spy = Spy(BrokerSection(url=url))
        spying = asyncio.create_task(spy.run())
        await spy.listening.wait()
        async with asyncio.TaskGroup() as group:
            for part in parts:
                group.create_task(part)
        spying.cancel()
        return spy

    return run_async(everybody(), timeout_s=timeout_s)


@pytest.mark.parametrize("mode", ["sync", "fedbuff"])
def test_a_sealed_run_reaches_the_last_version_and_shows_nothing(mode: str, tmp_path: Path, mosquitto_url: str) -> None:
    """The arithmetic is that of an open run; a subscriber to everything sees no metric, manifest, name or tensor.

    The same search over an open run finds all of it, so the search itself is worth something.
    """
    found = {}
    for sealed in (True, False):
        root = tmp_path / f"sealed-{sealed}"
        root.mkdir()
        write_toy(root, mosquitto_url, sites=2, versions=3, mode=mode, quorum=2, sealed=sealed)
        sites = [toy_site(root / f"site-{number}.toml") for number in (1, 2)]
        spy = _spied(mosquitto_url, toy_coordinator(root / "coordinator.toml"), *sites)
        assert [version.version for version in _versions(root)] == [1, 2, 3]
        assert _finished(root)
        if mode == "sync":
            for values in load_file(root / "coordinator" / "masters" / "v00000003.safetensors").values():
                np.testing.assert_allclose(values, INITIAL + 3.0)
        assert sum("/data" in packet.topic or "/bulk" in packet.topic for packet in spy.packets) >= 12
        found[sealed] = learnt(root, spy.payloads)
    assert found[True] == set()
    assert found[False] >= {
        "loss",
        "examples",
        "frame_hashes",
        "base_digest",
        "zstd frame",
        "a.weight",
        "digest",
        "frame",
        "metric",
        "receipt",
    }


def test_chance_is_not_taken_for_a_leak(tmp_path: Path, mosquitto_url: str) -> None:
    """Sixteen megabytes drawn at random teach nothing of an open run, although short words stand in them.

    Nor do chunks whose id ends as 1.0 or 0.5 begins, or what has the magic of zstd before it and happens to be a block.
    """
    write_toy(tmp_path, mosquitto_url, sites=2, versions=3, quorum=2)
    sites = [toy_site(tmp_path / f"site-{number}.toml") for number in (1, 2)]
    _spied(mosquitto_url, toy_coordinator(tmp_path / "coordinator.toml"), *sites)
    noise = np.random.default_rng(3).bytes(16_000_000)
    assert noise.count(b"0.5") > 0
    chunks = [chunk_header(f"{'ab' * 14}{end}", 0, 60_000) for end in ("3ff0", "3fe0")]
    assert [struct.pack(">d", value) in chunk for value, chunk in zip((1.0, 0.5), chunks, strict=True)] == [True, True]
    begun = b"\x28\xb5\x2f\xfd\x00\x58" + (60_000 << 3).to_bytes(3, "little") + noise[:50_000]
    assert learnt(tmp_path, [noise, *chunks, begun]) == set()


async def _exists(path: Path) -> None:
    while not path.exists():  # noqa: ASYNC110 - another task's file, which raises no event
        await asyncio.sleep(0.01)


def test_a_revoked_site_is_told_so_and_the_others_go_on(tmp_path: Path, mosquitto_url: str) -> None:
    """A new revocation list counts within seconds, without a restart: the site ends under the rule `revoked`."""
    write_toy(tmp_path, mosquitto_url, sites=2, versions=4, quorum=1, sealed=True)
    took: list[float] = []

    async def everybody() -> None:
        spy = Spy(BrokerSection(url=mosquitto_url))
        spying = asyncio.create_task(spy.run())
        async with asyncio.TaskGroup() as group:
            group.create_task(toy_coordinator(tmp_path / "coordinator.toml"))
            group.create_task(toy_site(tmp_path / "site-1.toml", seconds=2.0))
            doomed = asyncio.create_task(toy_site(tmp_path / "site-2.toml", seconds=60.0))
            await spy.until("mb/v1/toy/site/site-2/up/data|mb/v1/toy/site/site-2/down/data|mb/v1/toy/bulk")
            started = time.monotonic()
            Kits.reopen(tmp_path, "toy", "site-2").revoke("site-2")
            with pytest.raises(RefusedError, match="site-2") as refused:
                await doomed
            took.append(time.monotonic() - started)
            assert refused.value.rule == "revoked"
            with pytest.raises(RefusedError) as again:  # a new process of it is not let in either
                await toy_site(tmp_path / "site-2.toml")
            assert again.value.rule == "revoked"
        spying.cancel()

    run_async(everybody(), timeout_s=60)
    assert took[0] < 10
    assert [version.version for version in _versions(tmp_path)] == [1, 2, 3, 4]
    assert {part.site for version in _versions(tmp_path) for part in version.contributions} == {"site-1"}


def test_an_unsigned_stranger_and_a_replayed_hello_change_nothing(
    tmp_path: Path, mosquitto_url: str, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """Messages that a broker's owner can make up or repeat are refused, and the run goes on to its end."""
    caplog.set_level(logging.DEBUG)
    write_toy(tmp_path, mosquitto_url, sites=1, versions=3, sealed=True)
    up = "mb/v1/toy/site/site-1/up/ctl"
    unsigned = Hello(
        site="site-1",
        session="0" * 16,
        fingerprint=digest("f"),
        config_sha256=digest("c"),
        frozen_sha256=digest("w"),
        software="",
        clock=0.0,
    )

    async def everybody() -> None:
        spy = Spy(BrokerSection(url=mosquitto_url))
        spying = asyncio.create_task(spy.run())
        await spy.listening.wait()
        async with asyncio.TaskGroup() as group:
            group.create_task(toy_coordinator(tmp_path / "coordinator.toml"))
            group.create_task(toy_site(tmp_path / "site-1.toml", seconds=0.5))
            hello = await spy.until(up)
            await spy.until("mb/v1/toy/site/site-1/up/data")
            for payload in (encode(unsigned), hello.payload, b"\xc1", b"x" * 100_000):
                await spy.link.publish(up, payload)
        spying.cancel()

    run_async(everybody(), timeout_s=60)
    assert [version.version for version in _versions(tmp_path)] == [1, 2, 3]
    told = capsys.readouterr().out
    assert all(rule in told for rule in ("unsigned", "replayed", "bad-envelope"))


def test_the_coordinator_restarts_and_the_sites_get_its_new_key(tmp_path: Path, mosquitto_url: str) -> None:
    """Each process of the coordinator draws a federation key of its own; sites that were there ask for it and go on."""
    write_toy(tmp_path, mosquitto_url, sites=2, versions=6, quorum=2, sealed=True)

    async def everybody() -> None:
        async with asyncio.TaskGroup() as group:
            sites = [group.create_task(toy_site(tmp_path / f"site-{number}.toml", seconds=0.3)) for number in (1, 2)]
            first = asyncio.create_task(toy_coordinator(tmp_path / "coordinator.toml"))
            await _exists(tmp_path / "coordinator" / "masters" / "v00000002.safetensors")
            first.cancel()
            await asyncio.wait([first])
            assert not any(site.done() for site in sites)
            group.create_task(toy_coordinator(tmp_path / "coordinator.toml"))

    run_async(everybody(), timeout_s=60)
    assert [version.version for version in _versions(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_a_site_without_trust_gets_nothing_from_a_sealed_federation(tmp_path: Path, mosquitto_url: str) -> None:
    """There is no way down: a site whose federation.toml says `none` is neither heard nor does it hear anything."""
    write_toy(tmp_path, mosquitto_url, sites=2, versions=2, quorum=1, sealed=True)
    plain = (tmp_path / "federation.toml").read_text().replace('mode = "sealed"', 'mode = "none"')
    (tmp_path / "plain.toml").write_text(plain)
    site = (tmp_path / "site-2.toml").read_text().replace('"federation.toml"', '"plain.toml"')
    (tmp_path / "site-2.toml").write_text(site)
    plan = toy_plan(load_config(tmp_path / "plain.toml", FederationConfig), 100_000)

    async def everybody() -> None:
        async with asyncio.TaskGroup() as group:
            lonely = group.create_task(toy_site(tmp_path / "site-2.toml", plan=plan))
            both = (
                group.create_task(toy_coordinator(tmp_path / "coordinator.toml")),
                group.create_task(toy_site(tmp_path / "site-1.toml")),
            )
            await asyncio.wait(both)
            lonely.cancel()

    run_async(everybody(), timeout_s=60)
    assert {part.site for version in _versions(tmp_path) for part in version.contributions} == {"site-1"}
    assert not list((tmp_path / "site-2" / "states").glob("*.manifest"))
