"""A site's folder: its schema, its one writer, and what a check finds there."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from edge_client.fsck import check
from edge_client.layout import LAYOUT, LOCK, check_layout
from edge_client.outbox import Outbox, read_receipt
from edge_client.privacy.ledger import LEDGER, Charge, Ledger, Spent
from shared.errors import ConfigError, CorruptError, RefusedError, UnavailableError
from shared.lock import FolderLock
from shared.manifest import Manifest, UpdateFacts
from shared.messages import Receipt
from shared.slices import FileSummary
from shared.store import FrameStore
from tests.factories import digest
from tests.unit.shared.transfers import manifest_builder, tensors_of, writer_of

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "storage" / "site-schema1"
ONE, TWO = "1" * 32, "2" * 32


def seal(outbox: Outbox, update_id: str, **metrics: float) -> Manifest:
    """Put an update there."""
    facts = UpdateFacts(site="north", base_version=0, base_digest=digest("base"), examples=10, metrics=metrics)

    def build(summary: FileSummary) -> Manifest:
        return manifest_builder(transfer_id=update_id)(summary).model_copy(update={"facts": facts})

    return outbox.seal(writer_of(tensors_of()), build)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A site's folder with one update that waits and one that has its receipt."""
    outbox = Outbox(tmp_path)
    seal(outbox, ONE)
    manifest = seal(outbox, TWO)
    outbox.settle(Receipt(update_id=TWO, manifest_sha256=manifest.digest, outcome="accepted"))
    outbox.store.close()
    FrameStore(tmp_path / "states").seal(writer_of(tensors_of(1)), manifest_builder())
    return tmp_path


def rules(storage: Path, *, repair: bool = False) -> list[tuple[str, bool]]:
    """Rule and whether it is repaired, of each problem."""
    return [(each.rule, each.repaired) for each in check(storage, repair=repair).problems]


def spoil(path: Path) -> None:
    """Turn one bit over in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def test_a_sound_site_has_no_problem(site: Path) -> None:
    """Both ways of asking; what waits and what has its receipt are counted."""
    for repair in (False, True):
        found = check(site, repair=repair)
        assert (found.waiting, found.receipts, found.problems) == (1, 1, ())


def test_leftovers_go_and_the_waiting_update_stays(site: Path) -> None:
    """An update whose receipt is here, temporary files and frames without a manifest are deleted on demand."""
    for suffix in ("frames", "manifest"):
        shutil.copy(site / "outbox" / f"{ONE}.{suffix}", site / "outbox" / f"{TWO}.{suffix}")
    (site / "outbox" / ".tmp-12").write_bytes(b"half")
    (site / "states" / f"{ONE}.frames").write_bytes(b"half")
    (site / "prefix").mkdir()
    (site / "prefix" / ".tmp-12").write_bytes(b"half")
    left = [("settled-update", False), *[("litter", False)] * 3]
    assert rules(site) == left
    assert rules(site, repair=True) == [(rule, True) for rule, _ in left]
    assert rules(site) == []
    assert len(Outbox(site).pending()) == 1


def test_a_damaged_state_can_be_pulled_again(site: Path) -> None:
    """It is deleted on demand; until then it is damage."""
    spoil(next((site / "states").glob("*.frames")))
    assert rules(site) == [("damaged-state", False)]
    assert rules(site, repair=True) == [("damaged-state", True)]
    assert FrameStore(site / "states").ids() == []


def test_a_damaged_update_is_never_deleted(site: Path) -> None:
    """There is no other copy: the check says what a person can do."""
    spoil(site / "outbox" / f"{ONE}.frames")
    (problem,) = check(site, repair=True).problems
    assert (problem.rule, problem.where, problem.repaired) == ("damaged-update", f"outbox/{ONE}", False)
    assert "trains on that version again" in problem.advice
    assert (site / "outbox" / f"{ONE}.frames").exists()


def test_a_damaged_receipt_is_named(site: Path) -> None:
    """By its file, and it stays."""
    (site / "receipts" / f"{TWO}.json").write_bytes(b"{")
    (problem,) = check(site, repair=True).problems
    assert (problem.rule, problem.repaired) == ("damaged-receipt", False)


def test_what_stays_here_is_looked_at(site: Path) -> None:
    """A spoilt file is damage and is never deleted; one whose update was never sealed is a leftover."""
    outbox = Outbox(site)
    (site / "head").write_bytes(b"head")
    for update_id in (ONE, "3" * 32):
        outbox.own.keep(site / "head", update_id)
    assert rules(site) == [("stale-own", False)]
    assert rules(site, repair=True) == [("stale-own", True)]
    (kept,) = (site / "own").iterdir()
    spoil(kept)
    (problem,) = check(site, repair=True).problems
    assert (problem.rule, problem.where, problem.repaired) == ("damaged-own", f"own/{kept.name}", False)
    assert "move it away" in problem.advice
    assert kept.exists()


@pytest.fixture
def private(tmp_path: Path) -> Path:
    """A site's folder with two trainings charged: one update waits, one has its receipt."""
    outbox = Outbox(tmp_path)
    charge = Charge(sample_rate=0.5, noise_multiplier=1.0, steps=2)
    ledger = Ledger(tmp_path, known=0)
    for version, update_id in enumerate((ONE, TWO)):
        row = ledger.add("ward", "a" * 64, version, Spent(charge=charge, epsilon=1.0, delta=1e-5))
        manifest = seal(outbox, update_id, epsilon=1.0, delta=1e-5, charges=float(row))
    receipt = Receipt(update_id=TWO, manifest_sha256=manifest.digest, outcome="accepted")
    outbox.settle(receipt)
    outbox.settle(receipt.model_copy(update={"outcome": "merged", "version": 1, "weight": 1.0}))
    outbox.store.close()
    return tmp_path


def test_a_sound_ledger(private: Path) -> None:
    """Its trainings are counted; a receipt keeps the row that its update named, through every later word."""
    found = check(private)
    assert (found.charges, found.problems) == (2, ())
    assert read_receipt(private / "receipts" / f"{TWO}.json")["charges"] == 2
    assert Outbox(private).charges() == 2


def test_a_ledger_that_was_reset_is_named(private: Path) -> None:
    """Deleted, or put back from before the newest update: by what the updates name, and nothing repairs it."""
    whole = (private / LEDGER).read_bytes()
    (private / LEDGER).unlink()
    for repair in (False, True):
        (problem,) = check(private, repair=repair).problems
        assert (problem.kind, problem.rule, problem.where, problem.repaired) == (
            "damage",
            "short-ledger",
            LEDGER,
            False,
        )
        assert problem.what == "has 0 rows, and an update names row 2: what was spent is not all here"
    (private / LEDGER).write_bytes(whole.splitlines(keepends=True)[0])
    assert rules(private) == [("short-ledger", False)]
    (private / "receipts" / f"{TWO}.json").unlink()
    assert rules(private) == []  # the update that waits names row 1


def test_a_damaged_ledger_is_named(private: Path) -> None:
    """By its line; a line that a crash cut short is litter and goes."""
    whole = (private / LEDGER).read_bytes()
    (private / LEDGER).write_bytes(whole.replace(b'"steps": 2', b'"steps": 1', 1))
    (problem,) = check(private, repair=True).problems
    assert (problem.rule, problem.what, problem.repaired) == ("damaged-ledger", "line 2: not what was written", False)
    (private / LEDGER).write_bytes(whole + b'{"at": 17')
    assert rules(private) == [("litter", False)]
    assert rules(private, repair=True) == [("litter", True)]
    assert (private / LEDGER).read_bytes() == whole


def test_what_cannot_be_read_does_not_hide_the_ledger(private: Path) -> None:
    """A damaged receipt and a damaged manifest are told, and so is the ledger that is short."""
    (private / LEDGER).unlink()
    (private / "outbox" / f"{ONE}.manifest").write_bytes(b"{")
    assert {rule for rule, _ in rules(private)} == {"short-ledger", "damaged-update"}
    (private / "receipts" / f"{TWO}.json").write_bytes(b"{")
    assert {rule for rule, _ in rules(private)} == {"damaged-receipt", "damaged-update"}


@pytest.fixture
def owing(tmp_path: Path) -> Path:
    """A site's folder with one update that waits, and what it left out."""
    leave(Outbox(tmp_path), ONE)
    return tmp_path


def leave(outbox: Outbox, update_id: str) -> None:
    """Seal an update that leaves something out."""
    outbox.residuals.put(writer_of(tensors_of()), manifest_builder(transfer_id=update_id, version=7))
    seal(outbox, update_id)


def test_what_is_owed_is_no_problem(owing: Path) -> None:
    """It is there for the next update."""
    assert rules(owing, repair=True) == []
    assert FrameStore(owing / "residual").ids() == [ONE]


def test_a_residual_that_does_not_count_is_deleted(owing: Path) -> None:
    """Its update was never sealed: the process died in between."""
    Outbox(owing).residuals.put(writer_of(tensors_of()), manifest_builder(transfer_id=TWO, version=8))
    (owing / "residual" / ".tmp-12").write_bytes(b"half")
    assert rules(owing) == [("stale-residual", False), ("litter", False)]
    assert rules(owing, repair=True) == [("stale-residual", True), ("litter", True)]
    assert FrameStore(owing / "residual").ids() == [ONE]


@pytest.mark.parametrize("suffix", ["frames", "manifest"])
def test_a_damaged_residual_can_be_given_up(owing: Path, suffix: str) -> None:
    """Nothing is owed then, and the update that left it still waits."""
    spoil(owing / "residual" / f"{ONE}.{suffix}")
    (problem,) = check(owing).problems
    assert (problem.rule, problem.where, problem.repaired) == ("damaged-residual", f"residual/{ONE}", False)
    assert "never sent" in problem.advice
    assert rules(owing, repair=True) == [("damaged-residual", True)]
    assert rules(owing) == []
    assert len(Outbox(owing).pending()) == 1


def test_a_running_site_and_an_empty_folder_say_so(site: Path, tmp_path: Path) -> None:
    """One process at a time, and the configuration of a site that has run."""
    with FolderLock(site / LOCK, holder="site"), pytest.raises(UnavailableError, match="another site runs there"):
        check(site)
    with pytest.raises(ConfigError, match="no site has run there"):
        check(tmp_path / "none")


def test_a_run_that_an_earlier_release_began_is_left_to_it(tmp_path: Path) -> None:
    """A site of before there was a schema: its update has another hash than ours, so nothing is touched."""
    storage = Path(shutil.copytree(GOLDEN, tmp_path / "site"))
    for opener in (Outbox, check):
        with pytest.raises(RefusedError, match="an earlier release began") as caught:
            opener(storage)
        assert caught.value.rule == "older-schema"
        assert "copy privacy.jsonl there" in caught.value.hint
    assert not (storage / LAYOUT).exists()
    assert len(list((storage / "outbox").iterdir())) == 2


def test_what_outlives_a_run_is_carried_on(tmp_path: Path) -> None:
    """What was spent of privacy stays when the run's folders go; from then on the folder has our schema."""
    storage = Path(shutil.copytree(GOLDEN, tmp_path / "site"))
    shutil.copy(GOLDEN.parent / "privacy.jsonl", storage)
    for folder in ("outbox", "receipts"):
        shutil.rmtree(storage / folder)
    assert Outbox(storage).pending() == []
    assert (storage / LAYOUT).read_text() == '{"schema": 2}\n'
    assert (storage / "privacy.jsonl").read_bytes() == (GOLDEN.parent / "privacy.jsonl").read_bytes()
    assert rules(storage) == []


def test_a_folder_of_a_newer_release_is_refused(site: Path) -> None:
    """Before anything in it is read or removed, with the release to use."""
    (site / LAYOUT).write_text('{"schema": 3}\n')
    (site / "outbox" / ".tmp-12").write_bytes(b"half")
    for opener in (Outbox, check):
        with pytest.raises(RefusedError, match="schema version 3, this release knows 2") as caught:
            opener(site)
        assert "its updates wait" in caught.value.hint
    assert (site / "outbox" / ".tmp-12").exists()


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 0}', '{"schema": "1"}'])
def test_a_schema_that_is_none_is_corrupt(site: Path, text: str) -> None:
    """It was not written by us."""
    (site / LAYOUT).write_text(text)
    with pytest.raises(CorruptError, match=LAYOUT):
        check_layout(site)
