"""Memberships and revocation lists: golden bytes, and a named rule for whatever was not signed as it stands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgpack
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import ValidationError

from shared.errors import RefusedError
from shared.trust.membership import (
    Membership,
    Revocations,
    public_bytes,
    sign_membership,
    sign_revocations,
    verify_membership,
    verify_revocations,
)

GOLDEN = Path(__file__).parents[3] / "golden" / "trust"
AUTHORITY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OTHER = Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))
PUBLIC = public_bytes(AUTHORITY)
NORTH = Membership(
    role="site",
    name="north",
    federation="ward",
    sign_key=b"s" * 32,
    box_key=b"b" * 32,
    serial=7,
    not_before=1_000,
    not_after=2_000,
)
LIST = Revocations(federation="ward", number=3, serials=(9, 2, 2))


def test_the_bytes_of_a_membership_and_a_list_are_the_published_ones() -> None:
    """A change of these formats must be meant: kits that are out there hold them."""
    assert sign_membership(AUTHORITY, NORTH) == (GOLDEN / "north.member").read_bytes()
    assert sign_revocations(AUTHORITY, LIST) == (GOLDEN / "revocations").read_bytes()


def test_what_was_signed_is_read_again() -> None:
    """A membership survives; a list comes back sorted and without doubles; either of two authorities will do."""
    assert verify_membership(sign_membership(AUTHORITY, NORTH), [PUBLIC], federation="ward") == NORTH
    assert verify_membership(sign_membership(OTHER, NORTH), [PUBLIC, public_bytes(OTHER)], federation="ward") == NORTH
    found = verify_revocations(sign_revocations(AUTHORITY, LIST), [PUBLIC], federation="ward")
    assert (found.number, found.serials, found.revoked) == (3, (2, 9), frozenset({2, 9}))


def test_no_bit_of_a_membership_can_be_changed() -> None:
    """Whichever bit flips, the document is refused."""
    data = sign_membership(AUTHORITY, NORTH)
    for bit in range(len(data) * 8):
        altered = bytearray(data)
        altered[bit // 8] ^= 1 << bit % 8
        with pytest.raises(RefusedError):
            verify_membership(bytes(altered), [PUBLIC], federation="ward")


def _resigned(change: Callable[[dict[str, object]], object]) -> bytes:
    outer = msgpack.unpackb(sign_membership(AUTHORITY, NORTH))
    body = msgpack.unpackb(outer["d"])
    change(body)
    packed: bytes = msgpack.packb({**outer, "d": msgpack.packb(body)})
    return packed


@pytest.mark.parametrize(
    ("data", "rule"),
    [
        (b"", "bad-document"),
        (msgpack.packb([1]), "bad-document"),
        (msgpack.packb({"a": "0" * 16, "d": b""}), "bad-document"),
        (sign_membership(OTHER, NORTH), "unknown-authority"),
        (_resigned(lambda body: body.update(name="south")), "bad-signature"),
        (_resigned(lambda body: body.update(not_after=9_000)), "bad-signature"),
        (sign_membership(AUTHORITY, NORTH.model_copy(update={"federation": "other"})), "other-federation"),
        (sign_revocations(AUTHORITY, LIST), "bad-signature"),
        (sign_membership(AUTHORITY, NORTH.model_copy(update={"sign_key": b"short"})), "bad-document"),
    ],
    ids=["empty", "list", "fields", "stranger", "name", "dates", "federation", "other kind of document", "short key"],
)
def test_each_broken_document_has_its_rule(data: bytes, rule: str) -> None:
    """Also a valid signature over another kind of document does not serve: domains are kept apart."""
    with pytest.raises(RefusedError) as refused:
        verify_membership(data, [PUBLIC], federation="ward")
    assert refused.value.rule == rule


def test_dates_are_inclusive_and_in_order() -> None:
    """A membership counts from its first to its last second, and cannot end before it begins."""
    assert [NORTH.valid_at(now) for now in (999, 1_000, 2_000, 2_001)] == [False, True, True, False]
    with pytest.raises(ValidationError):
        Membership(**{**dict(NORTH), "not_after": 1_000})
