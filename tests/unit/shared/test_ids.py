"""The shapes of ids: safe as file names and as topic levels, whatever somebody sends."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from shared.ids import Ident, SessionId, Sha256Hex, TransferId, is_update_id_of, new_session_id, new_update_id

HEX = {SessionId: 16, TransferId: 32, Sha256Hex: 64}


def _valid(kind: Any, value: object) -> bool:
    try:
        return bool(TypeAdapter(kind).validate_python(value) == value)
    except ValidationError:
        return False


@pytest.mark.parametrize("name", ["a", "north_2", "9", "-", "x" * 64, "st-mary"])
def test_names_that_people_may_choose(name: str) -> None:
    """Lower case, digits, underscore and hyphen, up to 64 characters."""
    assert _valid(Ident, name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "x" * 65,
        "North",
        "a.b",
        "a/b",
        "..",
        "a b",
        "a+",
        "#",
        "é",
        "a\n",
        "\na",
        "a\x00",
        "$SYS",
        "\u0661",
        b"a",
        5,
    ],
)
def test_names_that_nobody_may_choose(name: object) -> None:
    """No dot, slash, blank, wildcard, line end or foreign digit gets into a file name or topic."""
    assert not _valid(Ident, name)


@pytest.mark.parametrize("kind", HEX, ids=lambda kind: str(HEX[kind]))
def test_ids_are_lower_case_hex_of_one_length(kind: Any) -> None:
    """One more or fewer digit, another alphabet, a line end: all refused."""
    size = HEX[kind]
    assert _valid(kind, ("0123456789abcdef" * 4)[:size])
    wrong = ["0" * (size - 1), "0" * (size + 1), "A" * size, "g" * size, "0" * size + "\n", "", 7, b"0" * size]
    assert not any(_valid(kind, value) for value in wrong)


def test_fresh_ids_are_valid_and_differ() -> None:
    """Each draw is new."""
    updates, sessions = [new_update_id("st-mary") for _ in range(100)], [new_session_id() for _ in range(100)]
    assert all(_valid(TransferId, each) for each in updates)
    assert all(_valid(SessionId, each) for each in sessions)
    assert len({*updates, *sessions}) == 200


def test_an_update_id_is_of_the_site_that_drew_it_and_of_no_other() -> None:
    """Neither a site whose name is longer or shorter, nor a random id, nor one with a changed digit."""
    drawn = new_update_id("st-mary")
    assert is_update_id_of(drawn, "st-mary")
    assert not any(is_update_id_of(drawn, name) for name in ("st-john", "st-mar", "st-mary1", ""))
    changed = [drawn[:at] + ("0" if drawn[at] != "0" else "1") + drawn[at + 1 :] for at in range(32)]
    assert not any(is_update_id_of(each, "st-mary") for each in changed)
