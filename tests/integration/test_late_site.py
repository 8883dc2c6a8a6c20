"""A site that was away when its update was decided upon learns what became of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coordinator.records import Accepted, Finished, VersionCommitted
from mailboat.flaky import FlakyProxy
from shared.mailroom import Mailroom
from shared.messages import Message, Offer, Receipt
from shared.topics import Channel
from tests.helpers import run_async
from tests.toys import Gated, toy_coordinator, toy_records, toy_site, write_toy

pytestmark = pytest.mark.integration

POLL_S = 0.02


async def _until(holds: Callable[[], bool]) -> None:
    while not holds():  # noqa: ASYNC110 - files have no event
        await asyncio.sleep(POLL_S)


def _recorded(root: Path, kind: type[Any]) -> bool:
    journal = root / "coordinator" / "journal.sqlite"
    return journal.exists() and any(isinstance(record, kind) for record in toy_records(root))


def _receipts(root: Path, site: str) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in (root / site / "receipts").glob("*.json")]


def _stay_after_the_end(root: Path) -> None:
    path = root / "coordinator.toml"
    path.write_text(path.read_text().replace("exit_when_done = true", "exit_when_done = false"))


def test_a_site_that_was_killed_before_its_receipt_learns_that_it_was_merged(
    tmp_path: Path, mosquitto_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its receipts were lost, the run ended without it: when it comes back it offers again and is told the version."""
    write_toy(tmp_path, mosquitto_url, sites=1, versions=1)
    _stay_after_the_end(tmp_path)
    offered: list[str] = []
    post = Mailroom.post
    lost = True

    async def losing(self: Mailroom, message: Message, channel: Channel, site: str | None = None) -> None:
        if isinstance(message, Offer):
            offered.append(message.manifest.transfer_id)
        if not (lost and isinstance(message, Receipt)):
            await post(self, message, channel, site)

    monkeypatch.setattr(Mailroom, "post", losing)

    async def scenario() -> None:
        nonlocal lost
        coordinator = asyncio.create_task(toy_coordinator(tmp_path / "coordinator.toml"))
        site = asyncio.create_task(toy_site(tmp_path / "site-1.toml"))
        await _until(lambda: _recorded(tmp_path, Finished))
        site.cancel()
        await asyncio.wait([site])
        assert _receipts(tmp_path, "site-1") == []
        lost = False
        await toy_site(tmp_path / "site-1.toml")  # ends by itself: the run is complete, and nothing is left to send
        coordinator.cancel()
        await asyncio.wait([coordinator])

    run_async(scenario(), timeout_s=60)
    (receipt,) = _receipts(tmp_path, "site-1")
    assert (receipt["update_id"], receipt["outcome"], receipt["version"]) == (offered[0], "merged", 1)
    assert set(offered) == {offered[0]}
    assert sum(isinstance(record, Accepted) for record in toy_records(tmp_path)) == 1
    assert not list((tmp_path / "site-1" / "outbox").iterdir())


def test_a_site_whose_link_was_down_until_the_run_was_over_is_told_so(tmp_path: Path, mosquitto_url: str) -> None:
    """Its update is turned away under a named rule, and the site ends in good order instead of offering for ever."""
    gate = asyncio.Event()

    async def scenario() -> None:
        host, _, port = mosquitto_url.removeprefix("mqtt://").partition(":")
        async with FlakyProxy(host, int(port)) as proxy:
            write_toy(tmp_path, mosquitto_url, sites=2, versions=2, urls={"site-2": proxy.url})
            _stay_after_the_end(tmp_path)
            coordinator = asyncio.create_task(toy_coordinator(tmp_path / "coordinator.toml"))
            late = asyncio.create_task(toy_site(tmp_path / "site-2.toml", trainer=Gated(gate, 0)))
            await _until(lambda: bool(list((tmp_path / "site-2" / "work").glob("*"))))
            await proxy.down()  # while it trains
            gate.set()
            await _until(lambda: bool(list((tmp_path / "site-2" / "outbox").glob("*.manifest"))))
            await toy_site(tmp_path / "site-1.toml")
            assert _recorded(tmp_path, Finished)
            await proxy.up()
            await late
            coordinator.cancel()
            await asyncio.wait([coordinator])

    run_async(scenario(), timeout_s=100)
    (receipt,) = _receipts(tmp_path, "site-2")
    assert receipt["outcome"] in {"rejected", "dropped"}
    assert receipt["rule"]
    versions = [record for record in toy_records(tmp_path) if isinstance(record, VersionCommitted)]
    assert [[part.site for part in version.contributions] for version in versions] == [["site-1"], ["site-1"]]
    assert not list((tmp_path / "site-2" / "outbox").iterdir())
