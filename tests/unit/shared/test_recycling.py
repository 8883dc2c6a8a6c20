"""A store whose deleted transfers leave their place to the next ones."""

from __future__ import annotations

from pathlib import Path

from shared.room import Room
from shared.store import FrameStore, Stored
from tests.unit.shared.transfers import ID, manifest_builder, tensors_of, transfer_of, writer_of


def seal(store: FrameStore, seed: int = 0) -> Stored:
    """A transfer made here."""
    return store.seal(writer_of(tensors_of(seed)), manifest_builder())


def test_a_store_that_recycles_writes_over_what_it_deleted(tmp_path: Path) -> None:
    """Made here or arriving, the next transfer lies where the last one lay, and holds its own bytes alone."""
    store = FrameStore(tmp_path, recycles=True)
    place = seal(store).path.stat().st_ino
    store.delete(ID)
    manifest, frames = transfer_of(tensors_of(1))
    with store.open_partial(manifest) as partial:
        assert len(partial.have) == 0
        assert sum(partial.write(index, frame) for index, frame in enumerate(frames)) == manifest.frames
        arrived = partial.finish()
    assert arrived.path.stat().st_ino == place
    arrived.verify()
    store.delete(ID)
    made = seal(store)
    assert made.path.stat().st_ino == place
    made.verify()
    store.delete(ID)
    store.close()
    assert list(tmp_path.iterdir()) == []


def test_what_was_begun_over_another_transfer_is_not_taken_for_its_own(tmp_path: Path) -> None:
    """A process that is killed finds old bytes behind its own: they have other hashes, and are asked for again."""
    store = FrameStore(tmp_path, recycles=True)
    seal(store)
    store.delete(ID)
    manifest, frames = transfer_of(tensors_of(1))
    with store.open_partial(manifest) as partial:
        partial.write(2, frames[2])
    with FrameStore(tmp_path, recycles=True).open_partial(manifest) as resumed:
        assert list(resumed.have.missing()) == [index for index in range(manifest.frames) if index != 2]


def test_what_a_store_is_to_forget_is_not_kept_for_reuse(tmp_path: Path) -> None:
    """Deleting from a store that does not recycle leaves no byte behind."""
    store = FrameStore(tmp_path)
    seal(store)
    store.delete(ID)
    assert list(tmp_path.iterdir()) == []


def test_a_file_with_another_name_is_not_written_over(tmp_path: Path) -> None:
    """A backup by hard links keeps what it had."""
    store = FrameStore(tmp_path / "store", recycles=True)
    copy = tmp_path / "copy"
    copy.hardlink_to(seal(store).path)
    before = copy.read_bytes()
    store.delete(ID)
    seal(store, 1)
    assert copy.read_bytes() == before


def test_a_spare_takes_no_room(tmp_path: Path) -> None:
    """A store that may hold one transfer may hold the next when the first is gone."""
    store = FrameStore(tmp_path, recycles=True)
    size = sum(path.stat().st_size for path in (tmp_path / seal(store).path.name,))
    room = Room(tmp_path, 0, limit=size)
    assert room.lacking(size) is not None
    store.delete(ID)
    assert room.lacking(size) is None
