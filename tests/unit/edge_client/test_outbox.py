"""Sealed updates and receipts on real disks: nothing is thrown away without a receipt, none is lost to a crash."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from edge_client.outbox import Outbox
from shared.errors import CorruptError
from shared.manifest import Manifest, UpdateFacts
from shared.messages import LOST, Receipt
from shared.slices import FileSummary
from shared.store import Stored
from tests.factories import digest
from tests.unit.shared.transfers import manifest_builder, tensors_of, writer_of

ONE, TWO, THREE = (digit * 32 for digit in "123")


def _seal(outbox: Outbox, update_id: str, *, base: int = 0, created: float = 1.0) -> Manifest:
    facts = UpdateFacts(
        site="north", base_version=base, base_digest=digest(f"base {base}"), examples=10, metrics={"loss": 0.5}
    )

    def build(summary: FileSummary) -> Manifest:
        made = manifest_builder(transfer_id=update_id)(summary)
        return made.model_copy(update={"facts": facts, "created": created})

    return outbox.seal(writer_of(tensors_of()), build)


def _receipt(update_id: str, **changes: Any) -> Receipt:
    fields = {"update_id": update_id, "manifest_sha256": digest("m"), "outcome": "accepted", **changes}
    return Receipt.model_validate(fields)


def _kept(folder: Path, update_id: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "receipts" / f"{update_id}.json").read_text())
    return loaded


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_sealed_update_waits_across_restarts(tmp_path: Path) -> None:
    """What was sealed is pending for every later process, until its receipt."""
    sealed = _seal(Outbox(tmp_path), ONE)
    again = Outbox(tmp_path)
    assert again.pending() == [sealed]
    stored = again.store.get(ONE)
    assert stored is not None
    with stored.open_tensors(verify=True):
        pass


def test_updates_wait_in_the_order_in_which_they_were_trained(tmp_path: Path) -> None:
    """By base version, then by time; ids are drawn at random and say nothing."""
    outbox = Outbox(tmp_path)
    _seal(outbox, ONE, base=2, created=1.0)  # the clock was set back meanwhile
    _seal(outbox, TWO, base=1, created=3.0)
    _seal(outbox, THREE, base=1, created=2.0)
    assert [manifest.transfer_id for manifest in outbox.pending()] == [THREE, TWO, ONE]


def test_a_receipt_is_kept_and_the_bytes_go(tmp_path: Path) -> None:
    """The receipt says what the coordinator said, and which state the update was trained on."""
    outbox = Outbox(tmp_path)
    _seal(outbox, ONE, base=4)
    _seal(outbox, TWO)
    receipt = _receipt(ONE, outcome="rejected", rule="too-stale", detail="late")
    assert outbox.settle(receipt)
    assert _kept(tmp_path, ONE) == {
        "base_version": 4,
        "base_digest": digest("base 4"),
        **receipt.model_dump(mode="json"),
    }
    assert [manifest.transfer_id for manifest in outbox.pending()] == [TWO]
    assert _names(tmp_path / "outbox") == [".spare-frames", f"{TWO}.frames", f"{TWO}.manifest"]
    outbox.store.close()
    assert _names(tmp_path / "outbox") == [f"{TWO}.frames", f"{TWO}.manifest"]


def test_a_later_receipt_replaces_the_first(tmp_path: Path) -> None:
    """Accepted, then merged: the origin stays, the outcome is the latest, also over a restart."""
    outbox = Outbox(tmp_path)
    _seal(outbox, ONE, base=4)
    outbox.settle(_receipt(ONE))
    assert Outbox(tmp_path).settle(_receipt(ONE, outcome="merged", version=5, staleness=0, weight=0.5))
    kept = _kept(tmp_path, ONE)
    assert (kept["outcome"], kept["version"], kept["weight"], kept["base_version"]) == ("merged", 5, 0.5, 4)
    assert _names(tmp_path / "receipts") == [f"{ONE}.json"]


def test_a_receipt_for_nothing_of_ours_is_not_kept(tmp_path: Path) -> None:
    """Anybody may say anything; only what was sealed here has a receipt here."""
    outbox = Outbox(tmp_path)
    assert not outbox.settle(_receipt(ONE))
    assert _names(tmp_path / "receipts") == []


def test_a_receipt_does_not_take_a_frame_from_under_its_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks are read in one thread and updates settled in another: a frame is read whole, or not at all."""
    outbox = Outbox(tmp_path)
    sealed = _seal(outbox, ONE)
    look_up = outbox.store.get
    settling = threading.Thread(target=outbox.settle, args=(_receipt(ONE),))

    def interrupted(update_id: str) -> Stored | None:
        found = look_up(update_id)
        if threading.current_thread() is threading.main_thread():
            settling.start()
            settling.join(0.2)
        return found

    monkeypatch.setattr(outbox.store, "get", interrupted)
    found = outbox.read_frame(ONE, 0)
    assert found is not None
    assert found[0] == sealed
    assert len(found[1]) == sealed.frame_lengths[0]
    settling.join()
    monkeypatch.undo()
    assert outbox.read_frame(ONE, 0) is None


def test_a_crash_between_receipt_and_deletion_is_mended_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The receipt is durable before the bytes go; with both there, the bytes go now."""
    outbox = Outbox(tmp_path)
    _seal(outbox, ONE)

    def crash(_update_id: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(outbox.store, "delete", crash)
    with pytest.raises(KeyboardInterrupt):
        outbox.settle(_receipt(ONE))
    assert f"{ONE}.frames" in _names(tmp_path / "outbox")
    again = Outbox(tmp_path)
    assert again.pending() == []
    again.store.close()
    assert _names(tmp_path / "outbox") == []
    assert _kept(tmp_path, ONE)["outcome"] == "accepted"


def test_half_written_files_of_a_crash_go_at_the_next_start(tmp_path: Path) -> None:
    """Neither a receipt nor an update: nothing that was promised."""
    Outbox(tmp_path)
    (tmp_path / "receipts" / ".tmp-0123").write_text("{")
    (tmp_path / "outbox" / ".tmp-0123").write_text("x")
    (tmp_path / "outbox" / f"{ONE}.frames").write_text("x")
    Outbox(tmp_path)
    assert _names(tmp_path / "receipts") == []
    assert _names(tmp_path / "outbox") == []


def test_states_that_were_trained_on_are_remembered(tmp_path: Path) -> None:
    """From the updates that wait and from the receipts, so that a restart trains on none of them twice."""
    outbox = Outbox(tmp_path)
    assert outbox.trained() == set()
    _seal(outbox, ONE, base=1)
    _seal(outbox, TWO, base=2)
    outbox.settle(_receipt(ONE))
    assert Outbox(tmp_path).trained() == {digest("base 1"), digest("base 2")}


def test_a_state_whose_update_was_rejected_may_be_trained_on_again(tmp_path: Path) -> None:
    """After a restart: the cause may be mended, and no other update of this state exists."""
    outbox = Outbox(tmp_path)
    _seal(outbox, ONE, base=1)
    outbox.settle(_receipt(ONE, outcome="rejected", rule="non-finite"))
    assert Outbox(tmp_path).trained() == set()


def test_a_state_whose_update_was_lost_may_be_trained_on_again(tmp_path: Path) -> None:
    """The coordinator took it and lost it; an update that was dropped for another reason stays done."""
    outbox = Outbox(tmp_path)
    for name, base, rule in ((ONE, 1, LOST), (TWO, 2, "run-complete")):
        _seal(outbox, name, base=base)
        assert outbox.settle(_receipt(name)) == digest(f"base {base}")
        assert outbox.settle(_receipt(name, outcome="dropped", rule=rule)) == digest(f"base {base}")
    assert Outbox(tmp_path).trained() == {digest("base 2")}


def test_a_receipt_that_is_repeated_is_no_news(tmp_path: Path) -> None:
    """The file is not written again."""
    outbox = Outbox(tmp_path)
    _seal(outbox, ONE)
    outbox.settle(_receipt(ONE))
    before = (tmp_path / "receipts" / f"{ONE}.json").stat().st_ino
    assert outbox.settle(_receipt(ONE)) is None
    assert (tmp_path / "receipts" / f"{ONE}.json").stat().st_ino == before


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "7", "\xff"])
def test_a_receipt_that_is_not_what_was_written_is_corrupt(text: str, tmp_path: Path) -> None:
    """The file is named, and what to do; the site does not guess what it has trained on."""
    outbox = Outbox(tmp_path)
    _seal(outbox, ONE)
    outbox.settle(_receipt(ONE))
    path = tmp_path / "receipts" / f"{ONE}.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(CorruptError) as corrupt:
        Outbox(tmp_path).trained()
    assert corrupt.value.message == f"{path} is not what was written"
    with pytest.raises(CorruptError):
        Outbox(tmp_path).settle(_receipt(ONE, outcome="merged"))


def test_files_that_are_not_receipts_are_left_alone(tmp_path: Path) -> None:
    """An operator's own file beside them stops nothing."""
    Outbox(tmp_path)
    (tmp_path / "receipts" / "notes.json").write_text("{}")
    outbox = Outbox(tmp_path)
    assert outbox.trained() == set()
