"""What stays at a site, on real disks: it counts exactly when its update was sealed, and survives restarts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from edge_client.outbox import Outbox, newest_own
from edge_client.own import OWN, entries
from edge_client.statefile import read_own, write_own
from shared.errors import CorruptError, NoRoomError, RefusedError
from shared.manifest import Manifest, UpdateFacts
from shared.messages import Receipt
from shared.slices import FileSummary
from tests.factories import digest
from tests.unit.shared.transfers import manifest_builder, tensors_of, writer_of

ONE, TWO, THREE, FOUR = (digit * 32 for digit in "1234")


def seal(outbox: Outbox, update_id: str, value: float, *, fails: bool = False) -> None:
    """Seal an update together with a head of this value; `fails` after the head was kept, before the update counts."""
    file = outbox.store.root.parent / "trained.own"
    save_file({"head": np.full(3, value, np.float32)}, file)
    facts = UpdateFacts(site="north", base_version=0, base_digest=digest("base"), examples=10, metrics={})

    def build(summary: FileSummary) -> Manifest:
        return manifest_builder(transfer_id=update_id)(summary).model_copy(update={"facts": facts})

    if fails:
        outbox.own.keep(file, update_id)
        raise NoRoomError("the disk is full", hint="")
    outbox.seal(writer_of(tensors_of()), build, own=file)


def head(storage: Path) -> float | None:
    """The first value of the head that counts."""
    path = newest_own(storage)
    return None if path is None else float(load_file(path)["head"][0])


def test_the_newest_sealed_update_tells_what_stays(tmp_path: Path) -> None:
    """Before the first update there is nothing; then each replaces the one before, also for a later process."""
    outbox = Outbox(tmp_path)
    assert head(tmp_path) is None
    seal(outbox, TWO, 2.0)
    seal(outbox, ONE, 1.0)
    assert head(tmp_path) == 1.0
    assert Outbox(tmp_path).own.newest() == newest_own(tmp_path)


def test_what_was_kept_for_an_update_that_was_never_sealed_does_not_count(tmp_path: Path) -> None:
    """After a crash or a full disk between the two, training begins from what stood before, and the rest goes."""
    outbox = Outbox(tmp_path)
    seal(outbox, ONE, 1.0)
    with pytest.raises(NoRoomError):
        seal(outbox, TWO, 2.0, fails=True)
    assert head(tmp_path) == 1.0
    assert [entry.update_id for entry in entries(tmp_path / OWN)] == [ONE, TWO]
    outbox = Outbox(tmp_path)
    assert [entry.update_id for entry in entries(tmp_path / OWN)] == [ONE]
    seal(outbox, TWO, 3.0)
    assert head(tmp_path) == 3.0


def test_the_receipt_of_an_update_makes_it_count_still(tmp_path: Path) -> None:
    """What became of the update changes nothing: also a rejected one has trained what stays."""
    outbox = Outbox(tmp_path)
    seal(outbox, ONE, 1.0)
    outbox.settle(Receipt(update_id=ONE, manifest_sha256=digest("m"), outcome="rejected", rule="too-stale"))
    Outbox(tmp_path)
    assert head(tmp_path) == 1.0


def test_two_are_kept_and_the_older_counts_when_the_newer_update_is_moved_away(tmp_path: Path) -> None:
    """A person who moves a damaged update away has the site train that version again, from what it had then."""
    outbox = Outbox(tmp_path)
    for number, update_id in enumerate((FOUR, THREE, ONE), start=1):
        seal(outbox, update_id, float(number))
    assert [entry.update_id for entry in entries(tmp_path / OWN)] == [THREE, ONE]
    for path in (tmp_path / "outbox").glob(f"{ONE}.*"):
        path.unlink()
    assert head(tmp_path) == 2.0


def test_a_spoilt_file_is_never_trained_from(tmp_path: Path) -> None:
    """One turned bit is found, and the error says what a person can do; moving the file away is one of two."""
    outbox = Outbox(tmp_path)
    seal(outbox, ONE, 1.0)
    seal(outbox, TWO, 2.0)
    path = outbox.own.newest()
    assert path is not None
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(CorruptError, match=path.name) as caught:
        outbox.own.newest()
    assert "move it away" in caught.value.hint
    path.unlink()
    assert head(tmp_path) == 1.0


def test_another_federation_s_file_is_refused(tmp_path: Path) -> None:
    """A storage folder that served another federation does not lend it what was trained there."""
    write_own(tmp_path / "own", {"head": np.ones(3, np.float32)}, "a" * 64)
    np.testing.assert_array_equal(read_own(tmp_path / "own", "a" * 64)["head"], np.ones(3))
    with pytest.raises(RefusedError) as caught:
        read_own(tmp_path / "own", "b" * 64)
    assert caught.value.rule == "other-fingerprint"
