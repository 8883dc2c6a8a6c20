from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from shared import durable
from shared.codec import encode_file
from shared.errors import CorruptError, RefusedError, UnavailableError
from shared.manifest import Manifest
from shared.slices import FrameWriter
from shared.store import FrameStore, Partial, Stored
from shared.transfer import Bitmap
from tests.unit.shared.forgetful_disk import ForgetfulDisk
from tests.unit.shared.transfers import ID, manifest_builder, tensors_of, transfer_of, with_frames, writer_of

MANIFEST, FRAMES = transfer_of(tensors_of())


def names(folder: Path) -> list[str]:
    """What is in a folder."""
    return sorted(path.name for path in folder.iterdir())


def receive(store: FrameStore, indices: list[int] | None = None) -> Partial:
    """A partial transfer that holds some frames, or all of them."""
    partial = store.open_partial(MANIFEST)
    for index in range(MANIFEST.frames) if indices is None else indices:
        partial.write(index, FRAMES[index])
    return partial


def check_whole(stored: Stored | None) -> None:
    """The transfer is there, and is the one that was made."""
    assert stored is not None
    assert stored.manifest == MANIFEST
    assert [stored.read_frame(index) for index in range(MANIFEST.frames)] == FRAMES
    with stored.open_tensors(verify=True) as reader:
        assert sorted(name for name, _ in reader.tensors()) == sorted(tensors_of())


@pytest.fixture
def store(tmp_path: Path) -> FrameStore:
    """An empty store, in a folder that was not there."""
    return FrameStore(tmp_path / "a" / "store")


@pytest.fixture
def syncs(monkeypatch: pytest.MonkeyPatch, store: FrameStore) -> durable.SyncCount:
    """A counter of the syncs that follow."""
    count = durable.SyncCount()
    monkeypatch.setattr(durable, "SYNCS", count)
    return count


class TestReceiving:
    @pytest.mark.parametrize("seed", range(3))
    def test_frames_in_any_order_make_a_whole(self, store: FrameStore, seed: int) -> None:
        """Frames that arrive shuffled and doubled end as the transfer that was sent."""
        order = list(range(MANIFEST.frames)) * 2
        random.Random(seed).shuffle(order)
        with store.open_partial(MANIFEST) as partial:
            fresh = [index for index in order if partial.write(index, memoryview(FRAMES[index]))]
            assert sorted(fresh) == list(range(MANIFEST.frames))
            check_whole(partial.finish())
        check_whole(store.get(ID))
        assert store.ids() == [ID]
        assert store.partial_ids() == []
        assert names(store.root) == [f"{ID}.frames", f"{ID}.manifest"]

    def test_an_arriving_transfer_is_not_there_yet(self, store: FrameStore) -> None:
        """Until it is finished, a transfer is listed as partial and cannot be got."""
        receive(store).close()
        assert store.get(ID) is None
        assert store.ids() == []
        assert store.partial_ids() == [ID]

    def test_bitmap_is_in_the_wires_form(self, store: FrameStore) -> None:
        """Sync returns the frames written as the bitmap of a Want."""
        with receive(store, [1, 4]) as partial:
            assert partial.sync() == Bitmap(MANIFEST.frames, [1, 4]).to_bytes()

    def test_resuming_finds_what_was_written(self, store: FrameStore) -> None:
        """A transfer opened again holds exactly the frames written before, and only needs the others."""
        receive(store, [0, 3, 5]).close()
        with FrameStore(store.root).open_partial(MANIFEST) as partial:
            missing = list(partial.have.missing())
            assert missing == [index for index in range(MANIFEST.frames) if index not in {0, 3, 5}]
            for index in missing:
                partial.write(index, FRAMES[index])
            check_whole(partial.finish())

    def test_resuming_a_complete_one_needs_nothing(self, store: FrameStore) -> None:
        """All frames there and the crash just before the end: the transfer is finished without a byte sent."""
        receive(store).close()
        with store.open_partial(MANIFEST) as partial:
            assert partial.have.full
            check_whole(partial.finish())

    @settings(max_examples=30)
    @given(data=st.data())
    def test_damage_to_the_part_is_found(self, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
        """After truncation or a changed byte anywhere, resuming keeps the sound frames and asks for the others."""
        store = FrameStore(tmp_path_factory.mktemp("store"))
        receive(store).close()
        path = store.root / f"{ID}.frames"
        whole = path.read_bytes()
        place = data.draw(st.integers(0, len(whole) - 1))
        if data.draw(st.booleans()):
            damaged, spoiled = whole[:place], range(place, len(whole))
        else:
            damaged = whole[:place] + bytes([whole[place] ^ data.draw(st.integers(1, 255))]) + whole[place + 1 :]
            spoiled = range(place, place + 1)
        path.write_bytes(damaged)
        with store.open_partial(MANIFEST) as partial:
            ends = np.cumsum(MANIFEST.frame_lengths).tolist()
            expected = [
                index
                for index, (end, length) in enumerate(zip(ends, MANIFEST.frame_lengths, strict=True))
                if end > spoiled.start and end - length < spoiled.stop
            ]
            assert list(partial.have.missing()) == expected
            for index in expected:
                partial.write(index, FRAMES[index])
            check_whole(partial.finish())

    @pytest.mark.parametrize(
        ("index", "frame", "rule"),
        [
            (-1, FRAMES[0], "frame-index"),
            (len(FRAMES), FRAMES[0], "frame-index"),
            (2**31, FRAMES[0], "frame-index"),
            (0, b"", "frame-length"),
            (0, FRAMES[0][:-1], "frame-length"),
            (0, FRAMES[0] + b"\0", "frame-length"),
            (0, FRAMES[0][:-1] + bytes([FRAMES[0][-1] ^ 1]), "frame-hash"),
        ],
    )
    def test_wrong_frames_are_refused(self, store: FrameStore, index: int, frame: bytes, rule: str) -> None:
        """A frame that the manifest does not name is refused and leaves no trace."""
        with store.open_partial(MANIFEST) as partial:
            with pytest.raises(RefusedError) as caught:
                partial.write(index, frame)
            assert caught.value.rule == rule
            assert len(partial.have) == 0

    def test_finishing_early_is_a_mistake_of_ours(self, store: FrameStore) -> None:
        """A transfer with a frame missing cannot be finished."""
        with receive(store, [0]) as partial, pytest.raises(AssertionError):
            partial.finish()

    def test_another_manifest_under_the_id_is_refused(self, store: FrameStore) -> None:
        """An id that began to arrive under one manifest does not go on under another."""
        receive(store, [0]).close()
        with pytest.raises(RefusedError) as caught:
            store.open_partial(MANIFEST.model_copy(update={"created": 1001.0}))
        assert caught.value.rule == "manifest-changed"

    def test_syncs_are_counted_and_few(self, store: FrameStore, syncs: durable.SyncCount) -> None:
        """Opening costs two syncs, each round of frames one, none without new frames, and finishing one more."""
        partial = store.open_partial(MANIFEST)
        assert (syncs.files, syncs.folders) == (1, 1)
        partial.write(0, FRAMES[0])
        partial.write(1, FRAMES[1])
        partial.sync()
        partial.sync()
        assert (syncs.files, syncs.folders) == (2, 1)
        for index in range(2, MANIFEST.frames):
            partial.write(index, FRAMES[index])
        partial.sync()
        partial.finish()
        assert (syncs.files, syncs.folders) == (3, 2)

    def test_a_full_disk_is_told_before_the_first_frame(
        self, store: FrameStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Without room for the whole transfer nothing begins, nothing is left, and the error says how much it takes."""

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "posix_fallocate", full)
        with pytest.raises(UnavailableError, match=f"{MANIFEST.wire_bytes:,} bytes"):
            store.open_partial(MANIFEST)
        assert names(store.root) == []

    def test_a_failed_resumption_keeps_what_was_there(self, store: FrameStore, monkeypatch: pytest.MonkeyPatch) -> None:
        """When resuming fails on a full disk, the frames received before are still there afterwards."""
        receive(store, [2]).close()

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr(os, "posix_fallocate", full)
            with pytest.raises(UnavailableError):
                store.open_partial(MANIFEST)
        with store.open_partial(MANIFEST) as partial:
            assert 2 in partial.have


class TestSealing:
    def test_a_sealed_transfer_is_whole(self, store: FrameStore, syncs: durable.SyncCount) -> None:
        """Sealing writes the frames and the manifest made of them, durably, with four syncs."""
        check_whole(store.seal(writer_of(tensors_of()), manifest_builder()))
        check_whole(store.get(ID))
        assert names(store.root) == [f"{ID}.frames", f"{ID}.manifest"]
        assert (syncs.files, syncs.folders) == (2, 2)

    def test_sealing_again_changes_nothing(self, store: FrameStore) -> None:
        """The same transfer made again, at another time, gives the one that is there."""
        first = store.seal(writer_of(tensors_of()), manifest_builder())
        later = store.seal(
            writer_of(tensors_of()), lambda summary: manifest_builder()(summary).model_copy(update={"created": 2e9})
        )
        assert later == first
        assert names(store.root) == [f"{ID}.frames", f"{ID}.manifest"]

    @pytest.mark.parametrize(("seed", "version"), [(1, 3), (0, 4)])
    def test_another_transfer_under_the_id_is_refused(self, store: FrameStore, seed: int, version: int) -> None:
        """Other tensors, or the same ones with other facts, cannot take an id that is given."""
        store.seal(writer_of(tensors_of()), manifest_builder())
        with pytest.raises(CorruptError, match="written once"):
            store.seal(writer_of(tensors_of(seed)), manifest_builder(version=version))
        check_whole(store.get(ID))
        assert names(store.root) == [f"{ID}.frames", f"{ID}.manifest"]

    def test_a_source_that_fails_leaves_nothing(self, store: FrameStore) -> None:
        """When a tensor is refused half way, the folder is as before."""
        tensors = tensors_of()
        tensors["norm"] = np.full(100, np.nan, dtype=np.float32)
        with pytest.raises(RefusedError):
            store.seal(writer_of(tensors), manifest_builder())
        assert names(store.root) == []

    def test_a_full_disk_leaves_nothing(self, store: FrameStore, monkeypatch: pytest.MonkeyPatch) -> None:
        """When the disk is full half way, the folder is as before and the error says how much was needed."""
        real, calls = os.pwrite, iter(range(100))

        def filling_up(fd: int, data: memoryview, offset: int) -> int:
            if next(calls) == 3:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(fd, data, offset)

        before = threading.active_count()
        monkeypatch.setattr(os, "pwrite", filling_up)
        with pytest.raises(UnavailableError, match=f"{sum(MANIFEST.frame_lengths[:4]):,} bytes"):
            store.seal(writer_of(tensors_of()), manifest_builder())
        assert threading.active_count() <= before  # at once: whoever tries again each second must not gather threads
        assert names(store.root) == []


class TestReading:
    @pytest.fixture
    def stored(self, store: FrameStore) -> Stored:
        """A whole transfer."""
        return store.seal(writer_of(tensors_of()), manifest_builder())

    def test_its_plain_bytes_are_the_safetensors_file(self, stored: Stored, tmp_path: Path) -> None:
        """They have the manifest's hash, and safetensors opens them; writing them twice is harmless."""
        path = tmp_path / "out.safetensors"
        durable.write_scratch(path, stored.plain())
        durable.write_scratch(path, stored.plain())
        assert names(tmp_path) == ["a", path.name]
        data = path.read_bytes()
        assert data == b"".join(encode_file(tensors_of(), "bf16", {"codec": "bf16"}))
        assert blake3(data).hexdigest() == MANIFEST.file_digest
        with safetensors.safe_open(path, "numpy") as file:
            assert sorted(file.keys()) == sorted(tensors_of())

    def test_a_file_that_is_not_the_manifests_is_not_written(self, store: FrameStore, tmp_path: Path) -> None:
        """When the file's hash is wrong, no file appears."""
        liar = MANIFEST.model_copy(update={"file_digest": "00" * 32})
        with store.open_partial(liar) as partial:
            for index, frame in enumerate(FRAMES):
                partial.write(index, frame)
            stored = partial.finish()
        with pytest.raises(RefusedError) as caught:
            durable.write_scratch(tmp_path / "out", stored.plain())
        assert caught.value.rule == "file-hash"
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("place", [0, 1234, -1])
    def test_rot_is_told_from_a_sender_who_lies(self, stored: Stored, place: int) -> None:
        """A changed byte anywhere is the disk's doing, by the frame's hash; the file and the frame are named."""
        data = bytearray(stored.path.read_bytes())
        data[place] ^= 0x10
        stored.path.write_bytes(data)
        with pytest.raises(CorruptError, match=r"frames: frame \d+"), stored.open_tensors(verify=True) as reader:
            for _ in reader.tensors():
                pass
        for check in (stored.verify, stored.check_frames):
            with pytest.raises(CorruptError, match=r"frames: frame \d+"):
                check()

    def test_rot_that_changes_no_value_is_found(self, store: FrameStore) -> None:
        """What it holds is sound; `check_frames` looks at the frames themselves."""
        stored = store.seal(writer_of(tensors_of()), manifest_builder())
        data = bytearray(stored.path.read_bytes())
        data[4] ^= 0x10  # a bit of the frame's header that no decoder looks at (RFC 8878, 3.1.1.1.1)
        stored.path.write_bytes(data)
        stored.verify()
        with pytest.raises(CorruptError, match="frame 0"):
            stored.check_frames()

    def test_a_frame_that_ends_early_is_found(self, stored: Stored) -> None:
        """A file that lost its end is corrupt, with and without verification, and is not served."""
        os.truncate(stored.path, MANIFEST.wire_bytes - 1)
        for verify in (True, False):
            with pytest.raises(CorruptError):
                stored.read_frame(MANIFEST.frames - 1, verify=verify)

    def test_an_error_in_the_block_is_not_hidden(self, store: FrameStore) -> None:
        """What the reader's user raises comes out, not the verification that did not happen."""
        stored = store.seal(writer_of(tensors_of()), manifest_builder())
        with pytest.raises(KeyError), stored.open_tensors(verify=True) as reader:
            reader.tensor("unknown")

    def test_get_says_when_frames_are_lost(self, store: FrameStore, stored: Stored) -> None:
        """A manifest whose frames are short or gone is an error, not an absent transfer."""
        os.truncate(stored.path, 5)
        with pytest.raises(CorruptError, match="5 bytes"):
            store.get(ID)
        stored.path.unlink()
        with pytest.raises(CorruptError, match="0 bytes"):
            store.get(ID)

    @pytest.mark.parametrize("data", [b"", b"junk", MANIFEST.to_bytes()[:-1]])
    def test_get_says_when_the_manifest_is_lost(self, store: FrameStore, stored: Stored, data: bytes) -> None:
        """A manifest that does not parse is an error that names the file."""
        (store.root / f"{ID}.manifest").write_bytes(data)
        with pytest.raises(CorruptError, match=f"{ID}.manifest"):
            store.get(ID)

    def test_a_manifest_under_another_name_is_not_taken(self, store: FrameStore, stored: Stored) -> None:
        """Files renamed by hand are found out."""
        for suffix in (".frames", ".manifest"):
            (store.root / f"{ID}{suffix}").rename(store.root / f"{'cd' * 16}{suffix}")
        with pytest.raises(CorruptError):
            store.get("cd" * 16)

    @pytest.mark.parametrize("name", ["../../etc/passwd", "", "AB" * 16, "ab" * 15, f"{ID}\n", "*"])
    def test_ids_are_not_paths(self, store: FrameStore, name: str) -> None:
        """Only 32 hexadecimal digits are an id."""
        for action in (store.get, store.delete):
            with pytest.raises(RefusedError) as caught:
                action(name)
            assert caught.value.rule == "bad-transfer-id"


def test_deleting(store: FrameStore) -> None:
    """A transfer is gone, whole or arriving, and deleting what is not there does nothing."""
    store.seal(writer_of(tensors_of()), manifest_builder())
    store.delete(ID)
    assert names(store.root) == []
    receive(store, [1]).close()
    store.delete(ID)
    store.delete(ID)
    assert names(store.root) == []


def test_several_transfers_stand_side_by_side(store: FrameStore) -> None:
    """Ids are listed in order, arriving ones apart from whole ones."""
    for name in ("22" * 16, "11" * 16):
        store.seal(writer_of(tensors_of()), manifest_builder(transfer_id=name))
    receive(store, [1]).close()
    assert store.ids() == ["11" * 16, "22" * 16]
    assert store.partial_ids() == [ID]


# -- crashes ----------------------------------------------------------------------------------------------------------


def in_three_rounds(store: FrameStore, disk: ForgetfulDisk) -> None:
    """Receive in rounds; each one that is synced is promised."""
    with store.open_partial(MANIFEST) as partial:
        for start in range(3):
            for index in range(start, MANIFEST.frames, 3):
                partial.write(index, FRAMES[index])
            disk.promise = partial.sync().hex()
        partial.finish()


def after_a_kill(store: FrameStore, disk: ForgetfulDisk) -> None:
    """Receive some frames and be killed before any sync, resume, promise what is found there, and finish."""
    receive(store, [0, 2, 3]).close()
    with store.open_partial(MANIFEST) as partial:
        disk.promise = partial.have.to_bytes().hex()
        for index in list(partial.have.missing()):
            partial.write(index, FRAMES[index])
        partial.finish()


@pytest.mark.parametrize("scenario", [in_three_rounds, after_a_kill])
def test_no_crash_while_receiving_loses_a_promised_frame(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scenario: Callable[[FrameStore, ForgetfulDisk], None]
) -> None:
    """After a kill or a power loss at each step, promised frames are there, and the transfer can be completed."""
    store = FrameStore(tmp_path / "store")
    with monkeypatch.context() as patch:
        disk = ForgetfulDisk(store.root, patch)
        scenario(store, disk)
        disk.promise = "whole"
        disk.close()
    images = list(disk.images)
    assert {image.promise for image in images} >= {"", "whole"}
    assert {image.before for image in images} >= {"pwrite", "fsync", "rename", "posix_fallocate", "the end"}
    for number, image in enumerate(images):
        store = FrameStore(image.restore(tmp_path / f"image{number}"))
        store.recover()
        if image.promise == "whole":
            assert store.ids() == [ID]
        if store.ids():
            check_whole(store.get(ID))
            assert store.partial_ids() == []
            continue
        with store.open_partial(MANIFEST) as partial:
            promised = Bitmap.from_bytes(MANIFEST.frames, bytes.fromhex(image.promise))
            assert all(index in partial.have for index in range(MANIFEST.frames) if index in promised)
            for index in list(partial.have.missing()):
                partial.write(index, FRAMES[index])
            check_whole(partial.finish())
        assert names(store.root) == [f"{ID}.frames", f"{ID}.manifest"]


def test_no_crash_while_sealing_leaves_half_a_transfer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a kill or a power loss at each step there is the whole transfer or nothing; once sealed, the whole."""
    store = FrameStore(tmp_path / "store")
    with monkeypatch.context() as patch:
        disk = ForgetfulDisk(store.root, patch)
        store.seal(writer_of(tensors_of()), manifest_builder())
        disk.promise = "whole"
        disk.close()
    for number, image in enumerate(disk.images):
        again = FrameStore(image.restore(tmp_path / f"image{number}"))
        again.recover()
        assert names(again.root) in ([], [f"{ID}.frames", f"{ID}.manifest"]), image.before
        if image.promise:
            assert again.ids() == [ID]
        check_whole(again.seal(writer_of(tensors_of()), manifest_builder()))


def test_no_crash_while_deleting_leaves_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a kill or a power loss at each step of deleting, the transfer is whole or gone."""
    store = FrameStore(tmp_path / "store")
    store.seal(writer_of(tensors_of()), manifest_builder())
    with monkeypatch.context() as patch:
        disk = ForgetfulDisk(store.root, patch)
        store.delete(ID)
        disk.promise = "gone"
        disk.close()
    for number, image in enumerate(disk.images):
        again = FrameStore(image.restore(tmp_path / f"image{number}"))
        removed = again.recover()
        assert removed in ([], [f"{ID}.frames"])
        if image.promise:
            assert names(again.root) == []
        elif again.ids():
            check_whole(again.get(ID))


def test_recovery_removes_only_litter(store: FrameStore) -> None:
    """Temporary files and frames without a manifest go; whole and arriving transfers stay."""
    store.seal(writer_of(tensors_of()), manifest_builder(transfer_id="11" * 16))
    receive(store, [1]).close()
    before = names(store.root)
    (store.root / f"{durable.TEMPORARY_PREFIX}0123").write_bytes(b"half")
    (store.root / f"{'22' * 16}.frames").write_bytes(b"no manifest")
    assert store.recover() == [f"{'22' * 16}.frames"]
    assert names(store.root) == before


def test_a_hostile_sender_is_refused_when_verifying(store: FrameStore) -> None:
    """A transfer whose frames have the hashes announced, but hold another file, is stored, then refused by rule."""
    lying = [FRAMES[0], FRAMES[0], *FRAMES[2:]]
    manifest: Manifest = with_frames(MANIFEST, lying)
    with store.open_partial(manifest) as partial:
        for index, frame in enumerate(lying):
            partial.write(index, frame)
        stored = partial.finish()
    with pytest.raises(RefusedError) as caught, stored.open_tensors(verify=True) as reader:
        for _ in reader.tensors():
            pass
    assert caught.value.rule == "file-hash"


def test_an_unused_writer_has_no_summary() -> None:
    """A summary cannot be asked for before the frames were taken."""
    with pytest.raises(AssertionError):
        _ = FrameWriter([b"x"], group=1).summary
