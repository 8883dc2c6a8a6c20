"""What open and sealed guards have in common: one contract, and who gets which."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.config import FederationConfig, LocalTrustSection
from shared.errors import ConfigError, RefusedError
from shared.messages import Message, parse_chunk
from shared.topics import Channel
from shared.trust.choose import coordinator_guard, site_guard
from shared.trust.guard import Changes, Guard, OpenGuard
from shared.trust.sealed import CoordinatorGuard, SiteGuard
from tests.factories import make_federation
from tests.unit.shared.trust.sealed_world import ANNOUNCE, OFFER, PLAN, STATE, WELCOME, World, hello

FRAME = b"frame" * 50
Pair = tuple[Guard, Guard]


@pytest.fixture(params=["open", "sealed"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Pair:
    """A coordinator's guard and a site's, of either kind."""
    if request.param == "open":
        return OpenGuard(), OpenGuard()
    world = World(tmp_path)
    return world.coordinator, world.north


def _down(pair: Pair, message: Message, channel: Channel, now: float = 1_800_000_000.0) -> Message:
    site = "north" if channel.per_site else None
    return pair[1].open(pair[0].seal(message, channel, site, now), channel, site, now)


def test_a_conversation_arrives_as_it_was_said(pair: Pair) -> None:
    """Hello up, welcome and announcements down, an offer, chunks both ways."""
    coordinator, site = pair
    now = 1_800_000_000.0
    assert coordinator.open(site.seal(hello(), Channel.UP_CTL, "north", now), Channel.UP_CTL, "north", now) == hello()
    assert _down(pair, WELCOME, Channel.DOWN_CTL) == WELCOME
    assert _down(pair, ANNOUNCE, Channel.ANNOUNCE) == ANNOUNCE
    assert _down(pair, ANNOUNCE, Channel.DOWN_CTL) == ANNOUNCE
    assert coordinator.open(site.seal(OFFER, Channel.UP_CTL, "north", now), Channel.UP_CTL, "north", now) == OFFER
    up = parse_chunk(site.seal_chunk(OFFER.manifest, 1, FRAME))
    assert bytes(coordinator.open_chunk(OFFER.manifest, up)) == FRAME
    down = parse_chunk(coordinator.seal_chunk(STATE, 1, FRAME))
    assert bytes(site.open_chunk(STATE, down)) == FRAME


def test_garbage_is_refused_with_a_rule(pair: Pair) -> None:
    """By both ends, on every channel."""
    for guard in pair:
        for channel in (Channel.UP_CTL, Channel.DOWN_CTL, Channel.PRESENCE):
            with pytest.raises(RefusedError) as refused:
                guard.open(b"\xc1garbage", channel, "north", 0.0)
            assert refused.value.rule == "bad-envelope"


def test_an_end_without_trust_is_told_that_the_others_are_sealed(tmp_path: Path) -> None:
    """The rule says which of the two federation.toml lacks something."""
    world = World(tmp_path)
    with pytest.raises(RefusedError) as refused:
        OpenGuard().open(world.up(hello()), Channel.UP_CTL, "north", world.now)
    assert refused.value.rule == "sealed"


def test_nothing_changes_by_itself(pair: Pair) -> None:
    """Refreshing and saving are harmless at any time."""
    for guard in pair:
        guard.save()
        assert guard.refresh(1_800_000_000.0) == Changes()


def test_each_end_gets_the_guard_that_the_federation_agreed_on(tmp_path: Path) -> None:
    """Without trust an open one; sealed a sealed one; a kit that is missing or another site's is an error."""
    World(tmp_path)
    sealed: FederationConfig = make_federation(trust={"mode": "sealed"})
    here, plan = LocalTrustSection(kit=tmp_path / "coordinator-kit"), PLAN.fingerprint
    north = LocalTrustSection(kit=tmp_path / "north-kit")
    nothing = LocalTrustSection()
    storage = tmp_path / "storage"
    assert isinstance(coordinator_guard(make_federation(), nothing, fingerprint=plan, storage=storage), OpenGuard)
    assert isinstance(site_guard(make_federation(), here, site="x", fingerprint=plan, storage=storage), OpenGuard)
    assert isinstance(coordinator_guard(sealed, here, fingerprint=plan, storage=storage), CoordinatorGuard)
    assert isinstance(site_guard(sealed, north, site="north", fingerprint=plan, storage=storage), SiteGuard)
    with pytest.raises(ConfigError, match="has no kit"):
        coordinator_guard(sealed, nothing, fingerprint=plan, storage=storage)
    with pytest.raises(ConfigError, match="the kit of north"):
        site_guard(sealed, north, site="south", fingerprint=plan, storage=storage)
    with pytest.raises(ConfigError, match="this is a coordinator"):
        coordinator_guard(sealed, north, fingerprint=plan, storage=storage)


def test_trust_is_agreed_by_all() -> None:
    """A sealed federation has another digest than an open one, which is what a file without the section means."""
    plain = make_federation()
    assert make_federation(trust={"mode": "none"}).config_sha256 == plain.config_sha256
    assert make_federation(trust={"mode": "sealed"}).config_sha256 != plain.config_sha256
