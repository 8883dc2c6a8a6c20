"""Sealed chunks: only the right frame, at its place, of its transfer, under the key that was handed over."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from blake3 import blake3

from shared.errors import RefusedError
from shared.manifest import Manifest
from shared.messages import CHUNK_HEADER_BYTES, parse_chunk
from shared.trust.payload import STATE_DOMAIN, UPDATE_DOMAIN, Recent, cipher, open_chunk, seal_chunk
from tests.factories import digest, make_update
from tests.unit.shared.trust.sealed_world import OFFER, PLAN, STATE, World, altered, chunk_rule

GOLDEN = Path(__file__).parents[3] / "golden" / "trust"
FRAME = b"\x28\xb5\x2f\xfd" + bytes(range(200))
KEY = bytes(range(32))


@pytest.fixture
def world(tmp_path: Path) -> World:
    """A federation in which north was welcomed and has offered its update."""
    made = World(tmp_path)
    made.welcomed()
    made.taken(made.up(OFFER))
    return made


def _packet(guard_chunk: bytes) -> bytes:
    assert FRAME[:8] not in guard_chunk
    return guard_chunk


def test_the_bytes_of_sealed_chunks_are_the_published_ones() -> None:
    """A change of the wire format must be meant; the header's length is that of the ciphertext."""
    for name, domain, manifest in (("update", UPDATE_DOMAIN, OFFER.manifest), ("state", STATE_DOMAIN, STATE)):
        packet = seal_chunk(cipher(KEY, domain, manifest.transfer_id), manifest, 3, FRAME)
        assert packet == (GOLDEN / f"{name}.chunk").read_bytes()
        assert len(packet) == CHUNK_HEADER_BYTES + len(FRAME) + 16
        assert struct.unpack(">I", packet[24:28])[0] == len(FRAME) + 16


def test_chunks_of_updates_and_states_arrive_as_they_were(world: World) -> None:
    """Up under the update's own key, down under the federation's."""
    up = _packet(world.north.seal_chunk(OFFER.manifest, 2, FRAME))
    assert world.coordinator.open_chunk(OFFER.manifest, parse_chunk(up)) == FRAME
    down = _packet(world.coordinator.seal_chunk(STATE, 4, FRAME))
    assert world.north.open_chunk(STATE, parse_chunk(down)) == FRAME


@pytest.mark.parametrize("state", [False, True])
def test_no_bit_of_a_chunk_can_be_changed(world: World, state: bool) -> None:
    """Header or ciphertext: whichever bit flips, the packet is refused."""
    sender, receiver = (world.coordinator, world.north) if state else (world.north, world.coordinator)
    manifest = STATE if state else OFFER.manifest
    packet = sender.seal_chunk(manifest, 2, FRAME)
    for bit in range(len(packet) * 8):
        assert chunk_rule(receiver, manifest, altered(packet, bit)) in {"bad-seal", "bad-chunk", "frame-index"}


def test_a_chunk_counts_at_its_place_alone(world: World) -> None:
    """Another index, another transfer, another direction, a cut or an empty packet: each is refused."""
    manifest = OFFER.manifest
    other = make_update(PLAN, "north", STATE, update_id=digest("other")[:32])
    packet = world.north.seal_chunk(manifest, 2, FRAME)
    moved = packet[:20] + struct.pack(">I", 3) + packet[24:]
    renamed = packet[:4] + bytes.fromhex(other.transfer_id) + packet[20:]
    assert chunk_rule(world.coordinator, manifest, moved) == "bad-seal"
    assert chunk_rule(world.coordinator, other, renamed) == "bad-seal"
    assert chunk_rule(world.coordinator, manifest, world.coordinator.seal_chunk(manifest, 2, FRAME)) == "bad-seal"
    for length in (0, 15, 16):
        cut = packet[:24] + struct.pack(">I", length) + packet[28 : 28 + length]
        assert chunk_rule(world.coordinator, manifest, cut) == "bad-seal"
    beyond = packet[:20] + struct.pack(">I", manifest.frames) + packet[24:]
    assert chunk_rule(world.coordinator, manifest, beyond) == "frame-index"


def test_another_members_chunk_is_not_ours(world: World) -> None:
    """South cannot slip a chunk into north's update, also after it offered the same id under its own key."""
    twin = make_update(PLAN, "south", STATE, update_id=OFFER.manifest.transfer_id)
    world.taken(world.up(OFFER.model_copy(update={"manifest": twin}), "south"), "south")
    packet = world.south.seal_chunk(twin, 2, FRAME)
    assert chunk_rule(world.coordinator, OFFER.manifest, packet) == "bad-seal"
    assert world.coordinator.open_chunk(twin, parse_chunk(packet)) == FRAME


def test_a_restarted_site_offers_again_under_another_key(world: World) -> None:
    """Keys of updates are never written down: what was in flight is refused, what follows the next offer arrives."""
    before = world.north.seal_chunk(OFFER.manifest, 1, FRAME)
    world.north = world.site("north")
    world.taken(world.up(OFFER))
    assert chunk_rule(world.coordinator, OFFER.manifest, before) == "bad-seal"
    after = world.north.seal_chunk(OFFER.manifest, 1, FRAME)
    assert world.coordinator.open_chunk(OFFER.manifest, parse_chunk(after)) == FRAME
    assert before[28:] != after[28:]


def test_a_site_reads_chunks_of_the_key_before_and_no_older_ones(world: World) -> None:
    """What was on its way when the key changed is not lost; without the new key nothing of it is read."""
    packets = []
    for _ in range(3):
        packets.append(world.coordinator.seal_chunk(STATE, 0, FRAME))
        world.kits.revoke()
        world.coordinator.refresh(world.now)
        assert chunk_rule(world.north, STATE, world.coordinator.seal_chunk(STATE, 0, FRAME)) == "bad-seal"
        world.welcomed()
    assert world.north.open_chunk(STATE, parse_chunk(packets[-1])) == FRAME
    assert chunk_rule(world.north, STATE, packets[0]) == "bad-seal"


def test_one_nonce_never_seals_two_frames() -> None:
    """The same state cut into other frames is sealed under other nonces."""
    by = cipher(KEY, STATE_DOMAIN, STATE.transfer_id)
    hashes = bytearray(STATE.frame_hashes)
    hashes[:32] = blake3(b"other frame").digest()
    recut: Manifest = STATE.model_copy(update={"frame_hashes": bytes(hashes)})
    zeros = bytes(64)
    first, second = seal_chunk(by, STATE, 0, zeros)[28:-16], seal_chunk(by, recut, 0, zeros)[28:-16]
    assert first != second  # of zeros the ciphertext is the key stream itself
    packet = parse_chunk(seal_chunk(by, STATE, 0, zeros))
    assert open_chunk(by, STATE, packet) == zeros
    assert open_chunk(by, recut, packet) is None


def test_a_site_that_offers_without_end_displaces_its_own_keys_alone(world: World) -> None:
    """What is kept for one site is bounded, and another site's offers do not touch it."""
    for number in range(100):
        manifest = make_update(PLAN, "south", STATE, update_id=digest(f"flood {number}")[:32])
        world.taken(world.up(OFFER.model_copy(update={"manifest": manifest}), "south"), "south")
    packet = world.north.seal_chunk(OFFER.manifest, 0, FRAME)
    assert world.coordinator.open_chunk(OFFER.manifest, parse_chunk(packet)) == FRAME


def test_a_chunk_before_any_offer_is_refused(tmp_path: Path) -> None:
    """No key was handed over for it."""
    world = World(tmp_path)
    assert chunk_rule(world.coordinator, OFFER.manifest, world.north.seal_chunk(OFFER.manifest, 0, FRAME)) == "bad-seal"


def test_the_values_used_last_are_kept() -> None:
    """Asking for a value is using it."""
    kept: Recent[int] = Recent(2)
    kept.put("a", 1)
    kept.put("b", 2)
    assert kept.get("a") == 1
    assert kept.get_or_make("c", lambda: 3) == 3
    assert (kept.get("a"), kept.get("b"), kept.get("c")) == (1, None, 3)


def test_rules_do_not_tell_why(world: World) -> None:
    """A wrong key and a broken tag give the same error, word for word."""
    manifest = OFFER.manifest
    packet = world.north.seal_chunk(manifest, 2, FRAME)
    told = set()
    for wrong in (altered(packet, 8 * 40), world.south.seal_chunk(manifest, 2, FRAME)):
        with pytest.raises(RefusedError) as refused:
            world.coordinator.open_chunk(manifest, parse_chunk(wrong))
        told.add((refused.value.rule, refused.value.message))
    assert len(told) == 1
