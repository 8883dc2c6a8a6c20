"""The sealed guards: who is believed, what is refused under which rule, and what a wrong message teaches its sender."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import pytest

from shared.errors import ConfigError, RefusedError
from shared.messages import Message, Offer, Presence, Probe, Refused, Status, encode
from shared.topics import Channel, topic
from shared.trust.envelope import Header, encrypt_for, pack
from shared.trust.grant import check_renewal, holder_of, install
from shared.trust.guard import Changes, StaleKeyError, TurnedAwayError
from shared.trust.kit import AUTHORITY, REVOCATIONS, ROSTER, authority_pem, load_authorities, write_private
from shared.trust.membership import public_bytes, sign_membership
from shared.trust.replay import RepeatedError
from tests.factories import digest
from tests.grants import GrantBench
from tests.unit.shared.trust.sealed_world import (
    ANNOUNCE,
    OFFER,
    PLAN,
    SESSION,
    START,
    STATE,
    WELCOME,
    World,
    altered,
    hello,
    rule_of,
)

PRESENCE = Presence(site="north", session=SESSION, online=True)


@pytest.fixture
def world(tmp_path: Path) -> World:
    """A coordinator and two sites."""
    return World(tmp_path)


# -- what passes ---


@pytest.mark.parametrize("message", [hello(), OFFER, Probe(session=SESSION)], ids=lambda message: message.kind)
def test_a_members_message_arrives_as_it_was(world: World, message: Message) -> None:
    """Up, sealed for the coordinator."""
    assert world.taken(world.up(message)) == message


def test_a_welcome_brings_the_key_to_announcements(world: World) -> None:
    """Before the welcome an announcement cannot be read, and says so in a way that a hello mends; after it, it can."""
    announced = world.coordinator.seal(ANNOUNCE, Channel.ANNOUNCE, None, world.now)
    with pytest.raises(StaleKeyError):
        world.north.open(announced, Channel.ANNOUNCE, None, world.now)
    world.welcomed()
    assert world.north.open(announced, Channel.ANNOUNCE, None, world.now) == ANNOUNCE
    assert world.north.open(announced, Channel.ANNOUNCE, None, world.now) == ANNOUNCE  # retained: at each subscription


def test_presence_is_signed_and_may_be_told_again(world: World) -> None:
    """The broker tells a last will at any later time, also after messages that are newer."""
    will = world.north.seal(PRESENCE.model_copy(update={"online": False}), Channel.PRESENCE, "north", world.now)
    here = world.north.seal(PRESENCE, Channel.PRESENCE, "north", world.now)
    world.now += 86_400 * 300
    for data in (here, will, here):
        assert isinstance(world.taken(data, channel=Channel.PRESENCE), Presence)
    for bit in range(0, len(will) * 8, 5):
        with pytest.raises(RefusedError):
            world.taken(altered(will, bit), channel=Channel.PRESENCE)


def test_nothing_of_a_message_can_be_read_on_the_wire(world: World) -> None:
    """Names of metrics and fields, ids and digests stand in the open form, and not in the sealed one."""
    status = Status(site="north", session=SESSION, phase="training", version=2, metrics={"macro_f1": 0.25})
    for message, words in ((status, [b"macro_f1", b"training", b"metrics"]), (OFFER, [b"frame_hashes", b"examples"])):
        sealed, bare = world.up(message), encode(message)
        assert all(word in bare for word in words)
        assert not any(word in sealed for word in words)
    announced = world.coordinator.seal(ANNOUNCE, Channel.ANNOUNCE, None, world.now)
    assert STATE.transfer_id.encode() not in announced
    assert STATE.frame_hashes[:32] not in announced


def test_no_two_sealed_messages_share_a_byte_of_their_ciphertexts_key(world: World) -> None:
    """The same message sealed twice, also by a process whose clock and counter fell back, is never the same bytes."""
    bodies = set()
    for _ in range(4):
        (world.kits.root / "north" / "trust" / "counter").unlink(missing_ok=True)
        guard = world.site("north")
        bodies.add(msgpack.unpackb(guard.seal(hello(), Channel.UP_CTL, "north", START))["b"][:32])
    assert len(bodies) == 4  # the ephemeral public keys


# -- what is altered or moved ---


def test_no_bit_of_an_envelope_can_be_changed(world: World) -> None:
    """Whichever bit flips, the message is refused; afterwards the true one still passes."""
    data = world.up(hello())
    for bit in range(len(data) * 8):
        with pytest.raises(RefusedError):
            world.taken(altered(data, bit))
    assert world.taken(data) == hello()


def _fields(data: bytes) -> dict[str, Any]:
    fields: dict[str, Any] = msgpack.unpackb(data)
    return fields


@pytest.mark.parametrize(
    ("field", "change", "rule"),
    [
        ("k", lambda _: "0" * 16, "unknown-key"),
        ("n", lambda n: n + 1, "bad-signature"),
        ("x", lambda x: x + 1, "bad-signature"),
        ("f", lambda _: bytes(32), "bad-signature"),
        ("e", lambda _: "", "bad-signature"),
        ("b", lambda b: b[:-1] + bytes([b[-1] ^ 1]), "bad-signature"),
        ("s", lambda s: s[:-1] + bytes([s[-1] ^ 1]), "bad-signature"),
        ("s", lambda _: b"", "bad-envelope"),
        ("n", lambda _: -1, "bad-envelope"),
        ("n", lambda _: True, "bad-envelope"),
        ("f", lambda _: b"short", "bad-envelope"),
        ("b", lambda _: "text", "bad-envelope"),
    ],
)
def test_each_altered_field_has_its_rule(world: World, field: str, change: Callable[[Any], Any], rule: str) -> None:
    """The rule says what was wrong; only a member's own signature gets beyond `bad-signature`."""
    fields = _fields(world.up(hello()))
    assert world.rule(msgpack.packb({**fields, field: change(fields[field])})) == rule


def test_garbage_and_the_unsigned_are_refused(world: World) -> None:
    """The open form is refused under a rule of its own: there is no way down from sealed to open."""
    assert world.rule(encode(hello())) == "unsigned"
    for garbage in (b"", b"\xc1", b"\x90", msgpack.packb({"k": "0" * 16}), b"x" * 2_000_000):
        assert world.rule(garbage) == "bad-envelope"


def test_a_message_counts_on_its_own_topic_alone(world: World, tmp_path: Path) -> None:
    """Moved to another channel, site or federation it is refused, and so is the coordinator's own word thrown back."""
    data = world.up(hello())
    assert world.rule(data, channel=Channel.PRESENCE) == "bad-signature"
    assert world.rule(data, site="south") == "unknown-key"
    assert world.rule(data, site="nobody") == "unknown-key"
    with pytest.raises(RefusedError, match="no membership of nobody: is its roster the newest"):
        world.coordinator.open(data, Channel.UP_CTL, "nobody", world.now)
    (tmp_path / "twin").mkdir()
    other = World(tmp_path / "twin", "other")
    write_private(other.kits.coordinator / ROSTER / "north.member", _member_of(world, other))
    other.coordinator.refresh(other.now)
    assert other.coordinator.peers.members["north"].key_id == world.north.kit.member.key_id
    assert other.rule(data) == "bad-signature"  # the same keys enrolled in two federations
    down = world.coordinator.seal(WELCOME, Channel.DOWN_CTL, "north", world.now)
    assert world.rule(down) == "unknown-key"
    assert rule_of(world.south, down, Channel.DOWN_CTL, "north", world.now) == "undecipherable"
    assert rule_of(world.south, down, Channel.DOWN_CTL, "south", world.now) == "bad-signature"


def _member_of(world: World, other: World) -> bytes:
    member = world.north.kit.member.model_copy(update={"federation": "other", "serial": 99})
    return sign_membership(other.kits.authority, member)


def test_one_member_cannot_speak_in_anothers_name(world: World) -> None:
    """A valid signature by south on north's topic is not north's."""
    assert world.rule(world.south.seal(hello(), Channel.UP_CTL, "north", world.now)) == "unknown-key"


def _signed_by_north(world: World, encryption: str, body: bytes, channel: Channel = Channel.UP_CTL) -> bytes:
    header = Header(
        topic=topic("ward", channel, "north"),
        key_id=world.north.kit.member.key_id,
        counter=2**63,
        expiry=int(world.now) + 600,
        fingerprint=bytes.fromhex(PLAN.fingerprint),
        encryption=encryption,
    )
    return pack(header, body, world.north.kit.sign_key)


def test_a_member_must_encrypt_and_says_nothing_else_in_clear(world: World) -> None:
    """Signed is not enough: control messages are encrypted for the receiver, and only presence is in clear."""
    content = msgpack.packb({"b": msgpack.unpackb(encode(hello()))["b"], "g": b""})
    assert world.rule(_signed_by_north(world, "", content)) == "unencrypted"
    assert world.rule(_signed_by_north(world, "fed:0", content)) == "unencrypted"
    assert world.rule(_signed_by_north(world, "", content, Channel.PRESENCE), channel=Channel.PRESENCE) == "unencrypted"
    for short in (b"", bytes(47), bytes(80), b"x" * 200):
        assert world.rule(_signed_by_north(world, "pair", short)) == "undecipherable"


def test_a_ciphertext_cannot_be_signed_anew_by_another(world: World) -> None:
    """South takes north's ciphertext and signs it as its own: it does not decrypt, because the header is bound."""
    stolen = _fields(world.up(hello()))["b"]
    header = Header(
        topic("ward", Channel.UP_CTL, "south"),
        world.south.kit.member.key_id,
        1,
        int(world.now),
        bytes.fromhex(PLAN.fingerprint),
        "pair",
    )
    assert world.rule(pack(header, stolen, world.south.kit.sign_key), site="south") == "undecipherable"


# -- replay and clocks ---


def test_a_replay_is_refused_in_the_same_process_and_after_a_restart(world: World) -> None:
    """The second delivery is told apart from an older message; both are refused, by the next process as well."""
    old, new = world.up(hello()), world.up(hello())
    world.taken(old)
    with pytest.raises(RepeatedError):
        world.taken(old)
    world.taken(new)
    assert world.rule(old) == "replayed"
    world.coordinator.save()
    world.coordinator = world.boot()
    assert world.rule(old) == "replayed"
    assert world.rule(new) == "repeated"
    assert world.taken(world.up(hello())) == hello()


def test_an_older_announcement_cannot_come_back(world: World) -> None:
    """The broker may repeat what it retains, not go back to an earlier version."""
    world.welcomed()
    first = world.coordinator.seal(ANNOUNCE, Channel.ANNOUNCE, None, world.now)
    second = world.coordinator.seal(ANNOUNCE, Channel.ANNOUNCE, None, world.now)
    world.north.open(second, Channel.ANNOUNCE, None, world.now)
    assert rule_of(world.north, first, Channel.ANNOUNCE, None, world.now) == "replayed"


def test_a_message_counts_for_ten_minutes_and_the_clocks_may_differ_by_five(world: World) -> None:
    """Inside the bounds it passes; past them it is refused under a rule that names both clocks."""
    for late in (600 + 299, -299):
        assert world.coordinator.open(world.up(hello()), Channel.UP_CTL, "north", world.now + late) == hello()
    for late, rule in ((600 + 301, "expired"), (-301, "from-the-future")):
        with pytest.raises(RefusedError, match="2027-01-15 08:00:00 UTC, this one says 2027-01-15") as refused:
            world.coordinator.open(world.up(hello()), Channel.UP_CTL, "north", world.now + late)
        assert refused.value.rule == rule


def test_a_site_whose_clock_runs_ahead_is_told_and_one_that_is_late_is_not(world: World) -> None:
    """A hello from the future gets an answer; an expired one gets none, for the broker could have held it back."""
    ahead = world.north.seal(hello(), Channel.UP_CTL, "north", world.now + 86_400 * 365)
    with pytest.raises(TurnedAwayError) as told:
        world.taken(ahead)
    assert told.value.answer.rule == "from-the-future"
    late = world.up(hello())
    world.now += 3_600
    with pytest.raises(RefusedError) as refused:
        world.taken(late)
    assert refused.value.rule == "expired"
    assert not isinstance(refused.value, TurnedAwayError)


def test_a_clock_that_was_wrong_does_not_lock_a_site_out(world: World) -> None:
    """Refused hellos from the future leave no mark: once the clock is right, the site is heard."""
    fast = world.site("north")
    with pytest.raises(RefusedError):
        world.taken(fast.seal(hello(), Channel.UP_CTL, "north", world.now + 86_400 * 365))
    (world.kits.root / "north" / "trust" / "counter").unlink()
    assert world.taken(world.site("north").seal(hello(), Channel.UP_CTL, "north", world.now)) == hello()


# -- membership ---


def test_a_revoked_member_is_out_without_a_restart(world: World) -> None:
    """The list counts from the next refresh: its messages are refused, its hello is told why, and a key is drawn."""
    before = world.coordinator.seal(ANNOUNCE, Channel.ANNOUNCE, None, world.now)
    world.welcomed()
    assert world.coordinator.refresh(world.now) == Changes()
    world.kits.revoke("north")
    changes = world.coordinator.refresh(world.now)
    assert [(name, why.rule) for name, why in changes.lost] == [("north", "revoked")]
    assert changes.rekeyed
    with pytest.raises(TurnedAwayError) as told:
        world.taken(world.up(hello()))
    assert told.value.answer == Refused(session=SESSION, rule="revoked", detail=told.value.message)
    assert world.rule(world.up(OFFER)) == "revoked"
    presence = world.north.seal(PRESENCE, Channel.PRESENCE, "north", world.now)
    assert world.rule(presence, channel=Channel.PRESENCE) == "revoked"
    answer = world.coordinator.seal(told.value.answer, Channel.DOWN_CTL, "north", world.now)
    assert world.north.open(answer, Channel.DOWN_CTL, "north", world.now) == told.value.answer
    with pytest.raises(RefusedError):  # nothing but the refusal is said to it
        world.coordinator.seal(WELCOME, Channel.DOWN_CTL, "north", world.now)
    after = world.coordinator.seal(ANNOUNCE, Channel.ANNOUNCE, None, world.now)
    assert _fields(after)["e"] != _fields(before)["e"]
    with pytest.raises(StaleKeyError):  # the new key is not among those that it holds
        world.north.open(after, Channel.ANNOUNCE, None, world.now)
    assert world.taken(world.up(hello("south"), "south"), "south") == hello("south")


def test_a_member_taken_off_the_roster_is_out_and_a_new_one_is_in(world: World) -> None:
    """The roster is read again when it changes; one who left is still told so once."""
    (world.kits.coordinator / ROSTER / "north.member").unlink()
    changes = world.coordinator.refresh(world.now)
    assert [(name, why.rule) for name, why in changes.lost] == [("north", "revoked")]
    assert world.rule(world.up(hello())) == "unknown-key"
    refused = Refused(session=SESSION, rule="revoked", detail="")
    data = world.coordinator.seal(refused, Channel.DOWN_CTL, "north", world.now)
    assert world.north.open(data, Channel.DOWN_CTL, "north", world.now) == refused
    world.kits.site("east")
    assert world.coordinator.refresh(world.now) == Changes()
    east = world.site("east")
    data = east.seal(hello("east"), Channel.UP_CTL, "east", world.now)
    assert world.taken(data, "east") == hello("east")


def test_a_membership_that_is_being_copied_is_kept(world: World) -> None:
    """A file that is torn for a moment puts nobody out; it is told in the log, and a revocation counts all the same."""
    path = world.kits.coordinator / ROSTER / "north.member"
    whole = path.read_bytes()
    for torn in (b"", whole[:100]):
        write_private(path, torn)
        assert world.coordinator.refresh(world.now) == Changes()
        assert world.taken(world.up(hello())) == hello()
    world.kits.revoke("north")
    assert [name for name, _why in world.coordinator.refresh(world.now).lost] == ["north"]


def test_running_ends_follow_another_key_of_the_authority(world: World) -> None:
    """Files that it has signed take the place of the others' one by one: nobody is lost, and no key is drawn."""
    bench = GrantBench(world.kits, issued=int(world.now))
    first = public_bytes(world.kits.authority)
    bench.roll_over()
    second, kit = public_bytes(world.kits.authority), world.kits.folder("north")
    write_private(world.kits.coordinator / AUTHORITY, authority_pem([first, second]))
    assert world.coordinator.refresh(world.now) == Changes()
    install(kit, check_renewal(bench.grant("north"), holder_of(kit, "ward"), world.now))
    for name in ("north", "south"):
        member = sign_membership(world.kits.authority, bench.member(name))
        write_private(world.kits.coordinator / ROSTER / f"{name}.member", member)
        assert world.coordinator.refresh(world.now) == Changes()
    write_private(world.kits.coordinator / AUTHORITY, authority_pem([second]))
    assert world.coordinator.refresh(world.now) == Changes()
    assert world.north.refresh(world.now) == Changes()
    assert world.taken(world.up(hello())) == hello()
    world.welcomed()
    assert load_authorities(kit / AUTHORITY) == (second,)
    world.kits.revoke()  # signed with the new key alone
    assert world.coordinator.refresh(world.now).rekeyed


def test_a_membership_that_runs_out_is_out(tmp_path: Path) -> None:
    """No file needs to change for that."""
    world = World(tmp_path)
    world.kits.site("brief", not_after=int(START) + 100)
    world.coordinator.refresh(world.now)
    brief = world.site("brief")
    world.now += 101
    changes = world.coordinator.refresh(world.now)
    assert [(name, why.rule) for name, why in changes.lost] == [("brief", "membership-expired")]
    with pytest.raises(TurnedAwayError) as told:
        world.taken(brief.seal(hello("brief"), Channel.UP_CTL, "brief", world.now), "brief")
    assert told.value.answer.rule == "membership-expired"


def test_a_higher_list_alone_draws_a_new_key(world: World) -> None:
    """Rotation on command: the same serials under the next number."""
    world.kits.revoke()
    assert world.coordinator.refresh(world.now) == Changes(lost=(), rekeyed=True)
    assert world.coordinator.refresh(world.now) == Changes()


def test_an_older_list_does_not_bring_a_revoked_member_back(world: World) -> None:
    """While running the newer one stays in force; at a start the older one is refused."""
    world.kits.revoke()
    older = (world.kits.coordinator / REVOCATIONS).read_bytes()
    world.kits.revoke("north")
    world.coordinator.refresh(world.now)
    write_private(world.kits.coordinator / REVOCATIONS, older)
    world.coordinator.refresh(world.now)
    assert world.rule(world.up(OFFER)) == "revoked"
    world.coordinator.save()
    with pytest.raises(ConfigError, match="list 1, list 2 was in force"):
        world.boot()
    (world.kits.coordinator / REVOCATIONS).unlink()
    with pytest.raises(ConfigError, match="list 0"):
        world.boot()


# -- plan and grants ---


def test_another_plan_is_told_by_hello_and_refused_alone(world: World) -> None:
    """A site with another plan can say hello and hear why it is refused; nothing else passes between the two."""
    stranger = world.site("north", digest("another plan"))
    assert world.taken(stranger.seal(hello(), Channel.UP_CTL, "north", world.now)) == hello()
    assert world.rule(stranger.seal(OFFER, Channel.UP_CTL, "north", world.now)) == "other-fingerprint"
    refused = Refused(session=SESSION, rule="other-plan", detail="")
    data = world.coordinator.seal(refused, Channel.DOWN_CTL, "north", world.now)
    assert stranger.open(data, Channel.DOWN_CTL, "north", world.now) == refused
    data = world.coordinator.seal(WELCOME, Channel.DOWN_CTL, "north", world.now)
    assert rule_of(stranger, data, Channel.DOWN_CTL, "north", world.now) == "other-fingerprint"


@pytest.mark.parametrize("grant", [b"", bytes(31)])
def test_an_offer_without_its_key_is_refused(world: World, grant: bytes) -> None:
    """The key of its chunks goes with the offer."""
    body = msgpack.unpackb(encode(Offer(manifest=OFFER.manifest)))["b"]
    content = msgpack.packb({"b": body, "g": grant})
    draft = _signed_by_north(world, "pair", b"")
    fields = _fields(draft)
    header = Header(topic("ward", Channel.UP_CTL, "north"), *(fields[name] for name in "knxfe"))
    sealed = pack(header, encrypt_for(world.coordinator.kit.member.box_key, header, content), world.north.kit.sign_key)
    assert world.rule(sealed) == "bad-message"
