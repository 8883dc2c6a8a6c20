"""The sealed envelope: golden bytes, golden ciphertexts that must open, and a rule for any other bytes."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import RefusedError
from shared.messages import MAX_CONTROL_BYTES
from shared.trust.envelope import (
    Content,
    FederationKey,
    Header,
    decrypt_own,
    encrypt_for,
    pack,
    parse,
    parse_content,
)
from shared.trust.signing import framed, key_id, sign, verifies

GOLDEN = Path(__file__).parents[3] / "golden" / "trust"
SIGN = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
BOX = X25519PrivateKey.from_private_bytes(bytes(range(32)))
FEDERATION = FederationKey(bytes(range(32)))
PUBLIC = SIGN.public_key().public_bytes_raw()
CONTENT = Content(b"body", b"g" * 32)


def header(encryption: str, counter: int = 5) -> Header:
    """The header of the golden files."""
    topic = "mb/v1/ward/site/north/up/ctl"
    return Header(topic, key_id(PUBLIC), counter, 1_800_000_600, bytes(range(32)), encryption)


def test_the_bytes_of_an_envelope_in_clear_are_the_published_ones() -> None:
    """A change of the wire format must be meant; Ed25519 gives the same signature each time."""
    data = pack(header(""), CONTENT.to_bytes(), SIGN)
    assert data == (GOLDEN / "clear.envelope").read_bytes()
    assert parse(data, header("").topic).signed_by(PUBLIC)


def test_published_ciphertexts_still_open() -> None:
    """Sealing is random by design, so its golden files are read, not compared."""
    data = (GOLDEN / "pair.envelope").read_bytes()
    envelope = parse(data, header("pair").topic)
    assert envelope.signed_by(PUBLIC)
    assert parse_content(decrypt_own(BOX, envelope.header, envelope.body)) == CONTENT
    envelope = parse((GOLDEN / "fed.envelope").read_bytes(), header("pair").topic)
    assert envelope.header.encryption == FEDERATION.encryption
    assert parse_content(FEDERATION.decrypt(envelope.header, envelope.body)) == CONTENT


def test_a_ciphertext_opens_under_its_own_header_alone() -> None:
    """For one receiver and for the federation, every field of the header is bound, and so is the receiver's key."""
    right, wrong = header("pair"), header("pair", counter=6)
    sealed = encrypt_for(BOX.public_key().public_bytes_raw(), right, b"text")
    assert decrypt_own(BOX, right, sealed) == b"text"
    for key, head in ((BOX, wrong), (X25519PrivateKey.generate(), right)):
        with pytest.raises(RefusedError) as refused:
            decrypt_own(key, head, sealed)
        assert refused.value.rule == "undecipherable"
    sealed = FEDERATION.encrypt(right, b"text")
    assert FEDERATION.decrypt(right, sealed) == b"text"
    for federation, head in ((FEDERATION, wrong), (FederationKey.new(), right)):
        with pytest.raises(RefusedError) as refused:
            federation.decrypt(head, sealed)
        assert refused.value.rule == "undecipherable"


@pytest.mark.parametrize("data", [b"", bytes(16), bytes(32), bytes(48), bytes(100), b"\xff" * 100])
def test_what_is_no_ciphertext_is_refused_alike(data: bytes) -> None:
    """Too short, or an ephemeral key of zeros: the same rule."""
    with pytest.raises(RefusedError) as refused:
        decrypt_own(BOX, header("pair"), data)
    assert refused.value.rule == "undecipherable"
    with pytest.raises(RefusedError) as refused:
        FEDERATION.decrypt(header("x"), data)
    assert refused.value.rule == "undecipherable"


def test_equal_texts_never_give_equal_ciphertexts() -> None:
    """Each message has a key of its own."""
    public = BOX.public_key().public_bytes_raw()
    assert len({encrypt_for(public, header("pair"), b"text") for _ in range(20)}) == 20
    assert len({FEDERATION.encrypt(header("x"), b"text") for _ in range(20)}) == 20


def test_framing_keeps_parts_and_domains_apart() -> None:
    """No byte can move to its neighbour, and a signature for one purpose is none for another."""
    assert framed("d", b"ab", b"c") != framed("d", b"a", b"bc")
    assert framed("d", b"ab") != framed("d", b"ab", b"")
    signature = sign(SIGN, "one", b"text")
    assert verifies(PUBLIC, signature, "one", b"text")
    assert not verifies(PUBLIC, signature, "two", b"text")
    assert not verifies(PUBLIC, signature, "one", b"tex", b"t")
    assert not verifies(bytes(31), signature, "one", b"text")


def test_size_is_bounded_before_anything_is_parsed() -> None:
    """A packet larger than any control message is refused as it is."""
    with pytest.raises(RefusedError) as refused:
        parse(b"\x81" + bytes(MAX_CONTROL_BYTES), "t")
    assert refused.value.rule == "bad-envelope"


@given(st.binary(max_size=400))
def test_any_bytes_are_refused_or_parsed(data: bytes) -> None:
    """Nothing else can happen."""
    with contextlib.suppress(RefusedError):
        parse(data, "t")
    with contextlib.suppress(RefusedError):
        parse_content(data)
