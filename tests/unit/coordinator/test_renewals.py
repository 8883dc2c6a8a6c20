"""Who is offered which grant, and when; and what of a folder of grants is fit to be offered."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from coordinator.renewals import AGAIN_S, Offers, Renewals, ending_members, read_grants
from coordinator.sites import Sites
from shared.config import CoordinatorConfig
from shared.messages import Message, Probe, Renewal, Renewed
from shared.topics import Channel
from shared.trust.kit import GRANTS, make_private_folder, write_private
from tests.factories import make_federation
from tests.grants import GrantBench, other_authority
from tests.helpers import run_async
from tests.kits import Kits

A, B = "a" * 16, "b" * 16
SEALED = make_federation(federation={"name": "ward"}, trust={"mode": "sealed"})


def answer(grant: bytes, session: str = A, rule: str | None = None) -> Renewed:
    """A site's word about a grant."""
    return Renewed(session=session, grant_sha256=hashlib.sha256(grant).hexdigest(), rule=rule)


def offered(offers: Offers, now: float, **sessions: str) -> dict[str, bytes]:
    """What is due, by site."""
    return {site: renewal.grant for site, renewal in offers.due(sessions, now)}


def test_a_grant_goes_once_to_each_process_of_its_site() -> None:
    """Not to others, not again while its answer may be on its way, again to a site that started anew."""
    offers = Offers()
    offers.hold({"north": b"one", "south": b"two"})
    assert offered(offers, 0.0, north=A, west=B) == {"north": b"one"}
    assert offered(offers, 1.0, north=A, south=B) == {"south": b"two"}
    assert offered(offers, 2.0, north=A, south=B) == {}
    assert offered(offers, 3.0, north=B, south=B) == {"north": b"one"}


def test_an_offer_without_an_answer_is_repeated() -> None:
    """The message may be lost, and a site of an older release says nothing; with an answer it is over."""
    offers = Offers()
    offers.hold({"north": b"one"})
    assert offered(offers, 0.0, north=A)
    assert offered(offers, AGAIN_S - 1, north=A) == {}
    assert offered(offers, AGAIN_S, north=A) == {"north": b"one"}
    assert list(offers.waiting) == ["north"]
    assert offers.answered("north", answer(b"one"))
    assert not offers.answered("north", answer(b"one"))
    assert offered(offers, 3 * AGAIN_S, north=A) == {}
    assert list(offers.waiting) == []


def test_a_newer_grant_is_offered_at_once_and_an_older_answer_does_not_count() -> None:
    """What was said about the grant before says nothing about this one."""
    offers = Offers()
    offers.hold({"north": b"one"})
    assert offered(offers, 0.0, north=A)
    offers.hold({"north": b"two"})
    assert not offers.answered("north", answer(b"one"))
    assert offers.waiting == ("north",)
    assert offered(offers, 0.5, north=A) == {"north": b"two"}


def test_who_refuses_is_not_asked_again_and_is_still_missed() -> None:
    """Whoever waits for everybody to have a grant must not take a no for a yes; a new process is asked again."""
    offers = Offers()
    offers.hold({"north": b"one"})
    assert offered(offers, 0.0, north=A)
    assert offers.answered("north", answer(b"one", rule="kit-not-writable"))
    assert offered(offers, 2 * AGAIN_S, north=A) == {}
    assert offers.waiting == ("north",)
    assert offered(offers, 3 * AGAIN_S, north=B) == {"north": b"one"}
    assert offers.answered("north", answer(b"one", B))
    assert list(offers.waiting) == []


def test_nobody_answers_for_another() -> None:
    """A site without a grant, and an answer about another's, change nothing."""
    offers = Offers()
    offers.hold({"north": b"one", "south": b"two"})
    assert not offers.answered("west", answer(b"one"))
    assert not offers.answered("south", answer(b"one"))
    assert offers.waiting == ("north", "south")


@pytest.fixture
def bench(tmp_path: Path) -> GrantBench:
    """Two sites and grants for them."""
    kits = Kits(tmp_path)
    kits.site("north")
    kits.site("south")
    make_private_folder(kits.coordinator / GRANTS)
    return GrantBench(kits)


def put(bench: GrantBench, name: str, data: bytes) -> None:
    """Place a file among the grants."""
    write_private(bench.kits.coordinator / GRANTS / name, data)


def test_only_the_authoritys_grants_are_offered(bench: GrantBench, tmp_path: Path) -> None:
    """Forged, altered, misnamed and open files are left out, each with its rule; the sound ones count all the same."""
    put(bench, "north.grant", sound := bench.grant("north"))
    put(bench, "south.grant", bench.grant("south", key=other_authority(tmp_path)))
    put(bench, "west.grant", bench.grant("south"))
    put(bench, "east.grant", b"{}")
    put(bench, "open.grant", sound)
    (bench.kits.coordinator / GRANTS / "open.grant").chmod(0o644)
    put(bench, "notes.txt", b"x")
    grants, unfit = read_grants(bench.kits.coordinator)
    assert grants == {"north": sound}
    told = {Path(reason.split(" ")[0].rstrip(":")).stem: reason for reason in unfit}
    assert sorted(told) == ["east", "open", "south", "west"]
    assert "bad-document" in told["east"]
    assert "unknown-authority" in told["south"]
    assert "other-site" in told["west"]
    assert "0644" in told["open"]


def test_a_kit_without_grants_offers_nothing(tmp_path: Path) -> None:
    """Kits of earlier releases have no such folder."""
    assert read_grants(Kits(tmp_path).coordinator) == ({}, ())


def test_it_is_told_whose_membership_ends_soon(bench: GrantBench) -> None:
    """With less than a third of its time left, and not when it was revoked."""
    bench.kits.site("late", not_after=3_000)
    bench.kits.site("gone", not_after=3_000)
    bench.kits.revoke("gone")
    assert ending_members(bench.kits.coordinator, "ward", 1_999) == []
    assert ending_members(bench.kits.coordinator, "ward", 2_001) == ["late"]


def test_a_grant_that_is_put_there_reaches_a_site_that_is_here(bench: GrantBench) -> None:
    """Seen within seconds, sent on the site's own channel; its answer is told in the log, and ends here."""
    sites, sent = Sites(probe_s=1.0), asyncio.Event()
    sites.hello("north", A, 0.0)
    out: list[tuple[Message, Channel, str | None]] = []

    async def post(message: Message, channel: Channel, site: str | None) -> None:
        out.append((message, channel, site))
        sent.set()

    config = CoordinatorConfig.model_validate(
        {"federation": "f", "storage": "s", "trust": {"kit": str(bench.kits.coordinator)}}
    )
    renewals = Renewals(config, SEALED, sites, post)

    async def run() -> None:
        looking = asyncio.create_task(renewals.run())
        put(bench, "north.grant", data)
        await sent.wait()
        looking.cancel()

    data = bench.grant("north")
    run_async(run())
    assert out == [(Renewal(grant=data), Channel.DOWN_CTL, "north")]
    with capture_logs() as logs:
        assert renewals.takes("north", answer(data, rule="other-keys"))
        assert renewals.takes("north", answer(data, session=B))
        assert not renewals.takes("north", Probe(session=A))
    assert [line["event"] for line in logs] == ["a site refused a grant", "a site has its newest grant"]
    assert logs[0]["rule"] == "other-keys"


def test_nothing_is_offered_without_trust(bench: GrantBench) -> None:
    """An open federation has no grants, whatever lies in a folder."""
    put(bench, "north.grant", bench.grant("north"))
    config = CoordinatorConfig.model_validate(
        {"federation": "f", "storage": "s", "trust": {"kit": str(bench.kits.coordinator)}}
    )

    async def post(_message: Message, _channel: Channel, _site: str | None) -> None:
        raise AssertionError("sent something")

    sites = Sites(probe_s=1.0)
    sites.hello("north", A, 0.0)
    run_async(Renewals(config, make_federation(), sites, post).run())
