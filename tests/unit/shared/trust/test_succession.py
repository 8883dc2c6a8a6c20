"""One key of the authority after another: who is believed through whom, and what an earlier key has signed."""

from __future__ import annotations

import hashlib

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from shared.errors import RefusedError
from shared.trust.membership import (
    Believed,
    Endorsements,
    public_bytes,
    sign_endorsements,
    sign_membership,
    verify_endorsements,
)
from shared.trust.signing import sign
from shared.trust.succession import INTRODUCTION_DOMAIN, Introduction, introduce, introduced
from tests.unit.shared.trust.test_membership import GOLDEN, NORTH

FIRST, SECOND, THIRD, STRANGER = (Ed25519PrivateKey.from_private_bytes(bytes([n] * 32)) for n in range(1, 5))
ONE, TWO, THREE = (public_bytes(key) for key in (FIRST, SECOND, THIRD))
WORDS = introduce(FIRST, TWO, "ward"), introduce(SECOND, THREE, "ward")


def test_whoever_knows_one_key_believes_those_that_follow() -> None:
    """Through any number of them, however long a kit slept; and none that went before."""
    assert introduced([ONE], WORDS, "ward") == (ONE, TWO, THREE)
    assert introduced([TWO], WORDS, "ward") == (TWO, THREE)
    assert introduced([THREE], WORDS, "ward") == (THREE,)
    assert introduced([ONE], (), "ward") == (ONE,)


@pytest.mark.parametrize(
    "word",
    [
        introduce(STRANGER, TWO, "ward"),
        introduce(FIRST, TWO, "another"),
        Introduction(by=ONE, key=TWO, signature=bytes(64)),
        Introduction(by=ONE, key=TWO, signature=introduce(FIRST, THREE, "ward").signature),
        Introduction(by=ONE, key=TWO, signature=introduce(SECOND, TWO, "ward").signature),
        Introduction(by=ONE, key=TWO, signature=sign(FIRST, "mailboat grant v1", b"ward", TWO)),
        Introduction(by=ONE, key=TWO, signature=sign(FIRST, INTRODUCTION_DOMAIN, b"war", b"d" + TWO)),
    ],
)
def test_an_introduction_that_is_none_introduces_nobody(word: Introduction) -> None:
    """By a stranger, for another federation, unsigned, or signed for something else."""
    assert introduced([ONE], [word], "ward") == (ONE,)


def test_what_an_earlier_key_signed_counts_when_the_newest_says_so() -> None:
    """Document by document: a thief of the first key can add none, whatever date it bears."""
    genuine, forged = sign_membership(FIRST, NORTH), sign_membership(FIRST, NORTH.model_copy(update={"serial": 8}))
    listed = verify_endorsements(sign_endorsements(SECOND, "ward", [genuine, genuine]), [TWO], federation="ward")
    assert listed.sha256 == (hashlib.sha256(genuine).digest(),)
    believed = Believed((TWO,), frozenset(listed.sha256))
    assert believed.membership(genuine, federation="ward") == NORTH
    assert believed.membership(sign_membership(SECOND, NORTH), federation="ward") == NORTH
    for document, federation, rule in (
        (forged, "ward", "unknown-authority"),
        (genuine, "another", "other-federation"),
        (genuine + b"\0", "ward", "bad-document"),
    ):
        with pytest.raises(RefusedError) as refused:
            believed.membership(document, federation=federation)
        assert refused.value.rule == rule


@pytest.mark.parametrize(
    ("document", "rule"),
    [
        (sign_endorsements(FIRST, "ward", []), "unknown-authority"),
        (sign_endorsements(SECOND, "another", []), "other-federation"),
        (sign_membership(SECOND, NORTH), "bad-signature"),
        (sign_endorsements(SECOND, "ward", [b"one"])[:-1] + b"\0", "bad-signature"),
    ],
)
def test_a_list_that_the_newest_key_did_not_sign_endorses_nothing(document: bytes, rule: str) -> None:
    """Another key's, another federation's, another kind of document, one that was altered."""
    with pytest.raises(RefusedError) as refused:
        verify_endorsements(document, [TWO], federation="ward")
    assert refused.value.rule == rule


def test_the_bytes_of_endorsements_are_the_published_ones() -> None:
    """They lie in bundles that are out there; equal lists give equal bytes in whatever order."""
    made = sign_endorsements(FIRST, "ward", [b"two", b"one"])
    assert made == sign_endorsements(FIRST, "ward", [b"one", b"two", b"one"])
    assert made == (GOLDEN / "endorsements").read_bytes()
    assert verify_endorsements(made, [ONE], federation="ward") == Endorsements(
        federation="ward", sha256=tuple(sorted(hashlib.sha256(each).digest() for each in (b"one", b"two")))
    )
