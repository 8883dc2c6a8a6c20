from __future__ import annotations

from pathlib import Path

import pytest

from edge_client.privacy.ledger import LEDGER, Charge, Ledger, Spent, charges_of, read_ledger, row_named
from shared import durable
from shared.errors import CorruptError, NoRoomError

GOLDEN = Path(__file__).resolve().parents[3] / "golden" / "storage" / "privacy.jsonl"
RUN, OTHER = "a" * 64, "b" * 64
CHARGE = Charge(sample_rate=0.25, noise_multiplier=1.5, steps=4)


def spent(epsilon: float = 1.0, **changes: object) -> Spent:
    """A training that was done."""
    return Spent(charge=CHARGE.model_copy(update=changes), epsilon=epsilon, delta=1e-5)


@pytest.fixture
def three(tmp_path: Path) -> Ledger:
    """Two trainings of one run and one of another."""
    ledger = Ledger(tmp_path, known=0)
    for number, run in enumerate((RUN, RUN, OTHER), start=1):
        assert ledger.add("ward", run, number - 1, spent(float(number))) == number
    return ledger


def test_rows_survive(three: Ledger, tmp_path: Path) -> None:
    """A later process reads what was written, and numbers go on."""
    again = Ledger(tmp_path, known=3)
    assert again.rows == three.rows
    assert [(row.run, row.base_version, row.spent.epsilon) for row in again.rows] == [
        (RUN, 0, 1.0),
        (RUN, 1, 2.0),
        (OTHER, 2, 3.0),
    ]
    assert again.add("ward", RUN, 3, spent()) == 4


def test_a_row_is_on_the_disk_before_it_counts(tmp_path: Path) -> None:
    """The file is synced with each row, and its folder with the first."""
    ledger = Ledger(tmp_path, known=0)
    before = durable.SYNCS.files, durable.SYNCS.folders
    ledger.add("ward", RUN, 0, spent())
    assert (durable.SYNCS.files - before[0], durable.SYNCS.folders - before[1]) == (1, 1)
    ledger.add("ward", RUN, 1, spent())
    assert (durable.SYNCS.files - before[0], durable.SYNCS.folders - before[1]) == (2, 1)


def test_a_line_that_a_crash_cut_short_is_taken_off(three: Ledger, tmp_path: Path) -> None:
    """Nothing was sealed under it; the rows before stand, and the next one follows them."""
    path = tmp_path / LEDGER
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    assert read_ledger(path) == (three.rows[:2], True)
    again = Ledger(tmp_path, known=2)
    assert again.add("ward", OTHER, 2, spent(3.0)) == 3
    assert len(Ledger(tmp_path, known=3).rows) == 3


@pytest.mark.parametrize("known", [1, 3])
def test_a_ledger_that_was_deleted_is_found_out(three: Ledger, tmp_path: Path, known: int) -> None:
    """An update of this folder names a row that is not there."""
    (tmp_path / LEDGER).unlink()
    with pytest.raises(CorruptError, match=rf"0 rows, and an update names row {known}") as caught:
        Ledger(tmp_path, known=known)
    assert "backup" in caught.value.hint


def test_one_that_was_cut_at_a_line_is_found_out(three: Ledger, tmp_path: Path) -> None:
    """The chain is sound; an update knows better."""
    lines = (tmp_path / LEDGER).read_bytes().splitlines(keepends=True)
    (tmp_path / LEDGER).write_bytes(b"".join(lines[:2]))
    assert len(Ledger(tmp_path, known=2).rows) == 2
    with pytest.raises(CorruptError, match="2 rows"):
        Ledger(tmp_path, known=3)


@pytest.mark.parametrize("line", [0, 1, 2])
@pytest.mark.parametrize(("old", "new"), [(b'"steps": 4', b'"steps": 1'), (b'"base_version"', b'"based_version"')])
def test_a_row_that_was_changed_is_found_out(three: Ledger, tmp_path: Path, line: int, old: bytes, new: bytes) -> None:
    """By the next row's hash, and the last row by the form in which rows are written."""
    path = tmp_path / LEDGER
    lines = path.read_bytes().splitlines(keepends=True)
    lines[line] = lines[line].replace(old, new)
    path.write_bytes(b"".join(lines))
    if line == 2 and b"steps" in new:
        assert read_ledger(path)[0][2].spent.charge.steps == 1  # nothing follows that could show it
        return
    with pytest.raises(CorruptError, match=rf"{LEDGER}, line {min(line + 2, 3) if b'steps' in new else line + 1}"):
        Ledger(tmp_path, known=0)


def test_a_row_that_is_missed_in_the_middle_is_found_out(three: Ledger, tmp_path: Path) -> None:
    """Whatever is known."""
    lines = (tmp_path / LEDGER).read_bytes().splitlines(keepends=True)
    (tmp_path / LEDGER).write_bytes(lines[0] + lines[2])
    with pytest.raises(CorruptError, match="line 2"):
        Ledger(tmp_path, known=0)


def test_a_file_that_changes_under_a_running_site_stops_it(three: Ledger, tmp_path: Path) -> None:
    """Deleted or longer: no row is added to what is not the ledger that was read."""
    with (tmp_path / LEDGER).open("ab") as file:
        file.write(b"x")
    with pytest.raises(CorruptError, match="while the site ran"):
        three.add("ward", RUN, 3, spent())
    (tmp_path / LEDGER).unlink()
    with pytest.raises(CorruptError, match="while the site ran"):
        three.add("ward", RUN, 3, spent())
    assert not (tmp_path / LEDGER).exists()


def test_a_full_disk_adds_nothing(three: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The row can be written later, once."""

    def full(*_: object) -> None:
        raise NoRoomError("full")

    with monkeypatch.context() as context:
        context.setattr(durable, "append", full)
        with pytest.raises(NoRoomError):
            three.add("ward", RUN, 3, spent())
    assert three.add("ward", RUN, 3, spent()) == 4
    assert len(Ledger(tmp_path, known=4).rows) == 4


def test_neighbours_of_a_kind_are_charged_as_one(tmp_path: Path) -> None:
    """Steps add up; another rate or noise begins anew; rows can be chosen."""
    ledger = Ledger(tmp_path, known=0)
    for run, steps, noise in ((RUN, 4, 1.0), (RUN, 5, 1.0), (OTHER, 2, 2.0), (RUN, 3, 1.0)):
        ledger.add("ward", run, 0, spent(steps=steps, noise_multiplier=noise))
    assert [(each.steps, each.noise_multiplier) for each in charges_of(ledger.rows)] == [(9, 1.0), (2, 2.0), (3, 1.0)]
    assert [each.steps for each in charges_of(ledger.rows, lambda row: row.run == RUN)] == [12]


def test_what_names_a_row() -> None:
    """The metrics of an update, as floats, and its receipt; nothing is 0."""
    assert [row_named(told) for told in ({"charges": 3.0}, {"charges": 4}, {})] == [3, 4, 0]


def test_a_ledger_of_this_release_stays_readable() -> None:
    """The bytes of its first rows, as they were written on a day in 2026."""
    rows, torn = read_ledger(GOLDEN)
    assert not torn
    assert [(row.federation, row.base_version, row.spent) for row in rows] == [
        ("ward", 0, spent(1.25)),
        ("ward", 1, spent(2.5, steps=8)),
    ]
