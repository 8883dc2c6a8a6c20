"""The sealed plan: its fingerprint, and what is refused when it is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shared.errors import ConfigError, RefusedError
from shared.plan import BLOCKS_KEY, SealedPlan, blocks_from, load_plan
from tests.factories import digest, make_federation, make_plan

FEDERATION = make_federation()
PLAN = make_plan(FEDERATION)


def _write(folder: Path, text: str | bytes) -> Path:
    path = folder / "plan.json"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_a_plan_survives_its_file(tmp_path: Path) -> None:
    """What was sealed is what is read, fingerprint included."""
    again = load_plan(_write(tmp_path, PLAN.model_dump_json(indent=1)), FEDERATION)
    assert again == PLAN
    assert again.fingerprint == PLAN.fingerprint


@pytest.mark.parametrize(
    "change",
    [
        {"architecture": "Other"},
        {"depth": 5},
        {"layers": (2, 3)},
        {"tensors": {"w": (100, 1000)}},
        {"tensors": {"v": (100_000,)}},
        {"personal": {"head": (3,)}},
        {"at_once": 1},
        {"trained_parameters": 99_999},
        {"total_parameters": 400_001},
        {"config_sha256": digest("c")},
        {"frozen_sha256": digest("w")},
        {"tokenizer_sha256": digest("t")},
        {"labels": ("x",)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_whatever_differs_gives_another_fingerprint(change: dict[str, Any]) -> None:
    """Two sites with one fingerprint train the same tensors over the same weights."""
    assert PLAN.model_copy(update=change).fingerprint != PLAN.fingerprint


def test_the_order_of_tensors_does_not_count() -> None:
    """The fingerprint is of a mapping, not of how it was built."""
    one, other = ({"a": (1,), "b": (2,)}, {"b": (2,), "a": (1,)})
    fingerprints = {PLAN.model_copy(update={"tensors": tensors}).fingerprint for tensors in (one, other)}
    assert len(fingerprints) == 1


def test_the_saving_is_the_share_that_never_travels() -> None:
    """100,000 of 400,000 parameters are trained: three quarters stay at home."""
    assert PLAN.saving == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, "no such file"),
        ("", "plan: field whole: Invalid JSON"),
        (b"\xff\xfe", "plan: field whole: Invalid JSON"),
        ("[]", "plan: field whole:"),
        ("{}", "plan: field architecture: Field required"),
        (PLAN.model_copy(update={"depth": 0}).model_dump_json(), "plan: field depth:"),
        (PLAN.model_dump_json().replace('"depth"', '"extra":1,"depth"'), "plan: field extra:"),
    ],
)
def test_what_is_not_a_plan_is_named_with_the_way_to_get_one(
    text: str | bytes | None, problem: str, tmp_path: Path
) -> None:
    """The file, the field, and the command that seals it again."""
    path = tmp_path / "plan.json" if text is None else _write(tmp_path, text)
    with pytest.raises(ConfigError) as refused:
        load_plan(path, FEDERATION)
    assert refused.value.message.startswith(f"{path}: {problem}")
    assert refused.value.hint == "seal it again: mailboat coordinator seal"


def test_a_plan_of_another_federation_is_not_used(tmp_path: Path) -> None:
    """federation.toml was changed after sealing; a run that has begun needs the old one, as `seal` would refuse."""
    path = _write(tmp_path, PLAN.model_dump_json())
    other = make_federation(federation={"name": "ward", "versions": 4})
    with pytest.raises(ConfigError, match="was sealed from another federation") as refused:
        load_plan(path, other)
    assert "goes on with that one alone" in (refused.value.hint or "")
    assert isinstance(load_plan(path, FEDERATION), SealedPlan)


def test_a_header_names_blocks() -> None:
    """As an ascending list, or not at all."""
    assert blocks_from({}) is None
    assert blocks_from({BLOCKS_KEY: "3"}) == (3,)
    assert blocks_from({BLOCKS_KEY: "3,7,11"}) == (3, 7, 11)
    for text in ("", "7,3", "3,3", "3,", "a", "-1", "3, 7", "9" * 7):
        with pytest.raises(RefusedError) as caught:
            blocks_from({BLOCKS_KEY: text})
        assert caught.value.rule == "header-metadata"
