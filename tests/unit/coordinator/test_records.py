from __future__ import annotations

from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator import records
from coordinator.records import (
    Accepted,
    Anchored,
    Contribution,
    Dropped,
    Finished,
    Opened,
    Pruned,
    Quarantined,
    Record,
    Rejected,
    Released,
    Signed,
    Snapshot,
    Substituted,
    Validated,
    VersionCommitted,
    Witnessed,
)
from shared.errors import CorruptError, RefusedError
from shared.manifest import Manifest, StateFacts, StepFacts, manifest_from_bytes

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "journal"

STATE = Manifest(
    transfer_id="5e" * 16,
    federation="north",
    fingerprint="0f" * 32,
    codec="bf16",
    group=2,
    slice_size=4096,
    file_size=5000,
    file_digest="5e" * 32,
    frame_lengths=(4000, 900),
    frame_hashes=bytes(range(64)),
    created=1_763_629_200.25,
    facts=StateFacts(version=1),
).to_bytes()

STEP = manifest_from_bytes(STATE).model_copy(
    update={"facts": StepFacts(version=1, base_digest="5d" * 32, state_digest="5e" * 32)}
)

SAMPLES: dict[str, Record] = {
    "opened": Opened("0f" * 32, "c0" * 32, "f0" * 32, STATE, "3a" * 32),
    "accepted": Accepted("a1" * 16, "st-mary", 3, 812, "3b" * 32, "f1" * 32, 0.4375, 1_763_629_300.5),
    "rejected": Rejected("a2" * 16, "st-john", "3c" * 32, "bad-digest", "frame 3", 1_763_629_301.5),
    "dropped": Dropped("a1" * 16, "run-ended", 1_763_629_302.5),
    "committed": VersionCommitted(
        4, (Contribution("a1" * 16, "st-mary", 3, 0, 0.625),), STATE, "3d" * 32, "0e" * 32, 1_763_629_303.5
    ),
    "committed_without_slots": VersionCommitted(1, (), STATE, "3d" * 32, None, 1_763_629_304.5),
    "committed_by_a_step": VersionCommitted(1, (), STEP.to_bytes(), "3d" * 32, None, 1_763_629_311.5),
    "anchored": Anchored(1, STATE, 1_763_629_312.5),
    "validated": Validated("a1" * 16, 0.71875, 1_763_629_311.5),
    "substituted": Substituted(4, "median", 3, 5, 1_763_629_303.25),
    "finished": Finished(10, 1_763_629_305.5),
    "pruned": Pruned(3, 1_763_629_312.5),
    "snapshot": Snapshot(9, 27, "5a" * 32, 1_763_629_306.5),
    "quarantined": Quarantined("a1" * 16, "norm-factor", "its norm is 5, 50 times the usual 0.1", 1_763_629_309.5),
    "released": Released("a1" * 16, 1_763_629_310.5),
    "signed": Signed(4, 27, "5b" * 32, bytes(range(64)), b"a membership", 1_763_629_307.5),
    "witnessed": Witnessed(
        "a1" * 16, "st-mary", "5c" * 32, 27, "5b" * 32, bytes(range(64, 128)), b"a membership", 1_763_629_308.5
    ),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_bytes_are_those_of_the_golden_file(name: str) -> None:
    """A record of this release has the bytes that earlier releases wrote, and their bytes read as that record."""
    golden = (GOLDEN / f"{name}.msgpack").read_bytes()
    assert records.to_bytes(SAMPLES[name]) == golden
    assert records.from_bytes(golden) == SAMPLES[name]


def test_every_kind_has_a_golden_file() -> None:
    """No kind of record is left out of the golden files, and none has two names."""
    assert {sample.kind for sample in SAMPLES.values()} == set(records._KINDS)
    assert {path.stem for path in GOLDEN.glob("*.msgpack")} == set(SAMPLES)


hexes = st.integers(0, 2**128 - 1).map(lambda value: f"{value:032x}")
counts = st.integers(0, 2**40)
reals = st.floats(0, allow_nan=False, allow_infinity=False)
idents = st.text("abcxyz019_-", min_size=1, max_size=64)
contributions = st.builds(Contribution, hexes, idents, counts, counts, reals)


@settings(deadline=None)
@given(
    st.one_of(
        st.builds(Accepted, hexes, idents, counts, counts, st.just("00" * 32), st.just("ff" * 32), reals, reals),
        st.builds(Rejected, hexes, idents, st.just("00" * 32), st.just("bad-frame"), st.text(max_size=500), reals),
        st.builds(Dropped, hexes, st.just("run-ended"), reals),
        st.builds(
            VersionCommitted,
            counts,
            st.lists(contributions, max_size=5).map(tuple),
            st.binary(max_size=40),
            st.just("00" * 32),
            st.none() | st.just("ff" * 32),
            reals,
        ),
        st.builds(Finished, counts, reals),
    )
)
def test_records_survive_their_encoding(record: Record) -> None:
    """Reading back what was written gives an equal record and, written again, equal bytes."""
    body = records.to_bytes(record)
    assert records.from_bytes(body) == record
    assert records.to_bytes(records.from_bytes(body)) == body


def changed(name: str, **fields: Any) -> dict[str, Any]:
    """The wire form of a sample with some fields replaced."""
    return {**records.to_wire(SAMPLES[name]), **fields}


@pytest.mark.parametrize(
    ("wire", "named"),
    [
        ([], "not a map"),
        ({}, "unknown kind"),
        (changed("finished", t="later"), "unknown kind"),
        (changed("finished", t=7), "unknown kind"),
        (changed("finished", v=0), "unknown kind"),
        (changed("finished", v="1"), "unknown kind"),
        (changed("finished", extra=1), "field extra"),
        (changed("finished", version=True), "field version"),
        (changed("finished", version="1"), "field version"),
        (changed("finished", version=-1), "field version"),
        (changed("finished", version=2**63), "field version"),
        (changed("signed", seq=0), "field seq"),
        (changed("signed", signature=bytes(63)), "field signature"),
        (changed("witnessed", signature=bytes(65)), "field signature"),
        (changed("finished", at=float("nan")), "field at"),
        (changed("accepted", site="St Mary"), "field site"),
        (changed("accepted", norm=float("inf")), "field norm"),
        (changed("accepted", file_digest="F1" * 32), "field file_digest"),
        (changed("validated", loss=float("nan")), "field loss"),
        (changed("rejected", rule="Bad Rule"), "field rule"),
        (changed("opened", state="text"), "field state"),
        (changed("committed", contributions=[{"site": "a"}]), "field contributions.0.update_id"),
        ({key: value for key, value in records.to_wire(SAMPLES["dropped"]).items() if key != "rule"}, "field rule"),
    ],
)
def test_a_wrong_field_is_named(wire: object, named: str) -> None:
    """Whatever is not exactly a record raises CorruptError that names the field."""
    with pytest.raises(CorruptError, match=named):
        records.from_wire(wire)


@pytest.mark.parametrize("body", [b"", b"\xc1", b"\x81", msgpack.packb({1: 2})])
def test_bytes_that_are_not_a_record_are_corrupt(body: bytes) -> None:
    """Truncated or foreign bytes raise CorruptError, never msgpack's own errors."""
    with pytest.raises(CorruptError):
        records.from_bytes(body)


def test_a_newer_schema_is_told_apart_from_damage() -> None:
    """A record of a later release is refused with advice to update, not called corrupt."""
    with pytest.raises(RefusedError, match="schema version 3") as caught:
        records.from_wire(changed("finished", v=3))
    assert caught.value.rule == "newer-schema"


def test_opened_is_dated_by_its_state() -> None:
    """Each record has a time for people; that of Opened is when version 0 was sealed."""
    assert records.recorded_at(SAMPLES["opened"]) == 1_763_629_200.25
    assert records.recorded_at(SAMPLES["finished"]) == 1_763_629_305.5
