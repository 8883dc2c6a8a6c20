"""Two faults in a row, found by the worlds: what a killed process saw may not be on the disk when the power goes."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from coordinator.disk import discard_rejected, discard_uncommitted
from coordinator.ledger import Known
from edge_client.outbox import Outbox
from shared import durable
from shared.manifest import Manifest, StateFacts, UpdateFacts
from shared.messages import Receipt
from shared.store import FrameStore
from tests.cores import CoordinatorBench
from tests.factories import digest, make_federation, make_plan
from tests.sim.disk import Disk, KilledError, installed
from tests.sim.toys import ToyFrames, frames_of, manifest_of

PLAN = make_plan(make_federation())
FRAMES = frames_of("some state", 3)


@pytest.fixture(autouse=True)
def _false_disks() -> Iterator[None]:
    with installed(random.Random(0)):
        yield


class Fuse:
    """A process that dies before its n-th change of the disk; called before each."""

    def __init__(self) -> None:
        self.left: int | None = None

    def __call__(self) -> None:
        """One change is about to be made."""
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise KilledError


def _machine(seed: int) -> tuple[Disk, Fuse]:
    fuse = Fuse()
    return Disk(random.Random(seed), fuse), fuse


def _dies(fuse: Fuse, after: int, work: Callable[[], Any]) -> bool:
    """Whether the process died in its work, after so many changes."""
    fuse.left = after
    try:
        work()
    except KilledError:
        return True
    finally:
        fuse.left = None
    return False


def _state() -> Manifest:
    frames = ToyFrames(FRAMES)
    return manifest_of(PLAN, digest("some state")[:32], frames.summary, StateFacts(version=0), 0.0)


@pytest.mark.parametrize("seed", range(20))
def test_chunks_promised_after_a_kill_survive_a_power_loss(seed: int) -> None:
    """Killed at any step of beginning a transfer, started again, chunk promised, power lost: the chunk is there."""
    for after in range(12):
        disk, fuse = _machine(seed)
        store = FrameStore(disk.path("states"))
        _dies(fuse, after, lambda store=store: store.open_partial(_state()))  # type: ignore[misc]
        store.recover()
        partial = store.open_partial(_state())
        partial.write(1, FRAMES[1])
        partial.sync()
        disk.power_loss()
        store.recover()
        assert 1 in store.open_partial(_state()).have


@pytest.mark.parametrize("seed", range(20))
def test_a_whole_transfer_seen_after_a_kill_survives_a_power_loss(seed: int) -> None:
    """Killed at any step of finishing it: what the next start sees whole stays whole."""
    for after in range(8):
        disk, fuse = _machine(seed)
        store = FrameStore(disk.path("states"))
        partial = store.open_partial(_state())
        for index, frame in enumerate(FRAMES):
            partial.write(index, frame)
        _dies(fuse, after, partial.finish)
        store.recover()
        seen = store.ids()
        disk.power_loss()
        store.recover()
        assert store.ids() == seen


@pytest.mark.parametrize("seed", range(10))
def test_bytes_that_outlived_a_failed_sync_are_written_again(seed: int) -> None:
    """The kernel takes them for saved; the next start promises them only after it has saved them itself."""
    disk, _fuse = _machine(seed)
    store = FrameStore(disk.path("states"))
    partial = store.open_partial(_state())
    partial.write(0, FRAMES[0])
    disk.sync_fails = 1.0
    with pytest.raises(OSError, match="Input/output") as failed:
        partial.sync()
    assert failed.value.errno == errno.EIO
    disk.sync_fails = 0.0
    store.recover()
    assert 0 in store.open_partial(_state()).have
    disk.power_loss()
    assert 0 in store.open_partial(_state()).have


@pytest.mark.parametrize("seed", range(20))
def test_an_update_is_there_until_its_receipt_is(seed: int) -> None:
    """Killed at any step of keeping the receipt, started again, power lost: one of the two is on the disk."""
    facts = UpdateFacts(site="north", base_version=0, base_digest=digest("base"), examples=1, metrics={})
    update_id = digest("update")[:32]
    for after in range(12):
        disk, fuse = _machine(seed)
        outbox = Outbox(disk.path())
        sealing: Any = ToyFrames(FRAMES)
        sealed = outbox.seal(sealing, lambda summary: manifest_of(PLAN, update_id, summary, facts, 0.0))
        receipt = Receipt(update_id=update_id, manifest_sha256=sealed.digest, outcome="accepted")
        _dies(fuse, after, lambda outbox=outbox, receipt=receipt: outbox.settle(receipt))  # type: ignore[misc]
        Outbox(disk.path())
        disk.power_loss()
        again = Outbox(disk.path())
        assert again.pending() == [sealed] or (disk.path() / "receipts" / f"{update_id}.json").exists()


def test_bytes_of_a_rejected_update_go_at_the_next_start() -> None:
    """Killed between the record and the deletion: nobody else would ever delete them. Others stay."""
    bench = CoordinatorBench()
    store = FrameStore(Disk(random.Random(0)).path("updates"))
    facts = UpdateFacts(site="north", base_version=0, base_digest=digest("base"), examples=1, metrics={})
    for name in ("rejected", "arriving"):
        manifest = manifest_of(PLAN, digest(name)[:32], ToyFrames(FRAMES).summary, facts, 0.0)
        store.open_partial(manifest)
    for name in ("rejected", "gone already"):
        bench.core.ledger.known[digest(name)[:32]] = Known("north", digest("m"), "rejected", "non-finite")
    assert discard_rejected(store, bench.core.ledger) == [digest("rejected")[:32]]
    assert store.partial_ids() == [digest("arriving")[:32]]


def test_a_state_that_nobody_published_goes_at_the_next_start() -> None:
    """Killed between a merge and its row; a later version's state is of a journal put back from a backup, and stays."""
    bench = CoordinatorBench()
    store = FrameStore(Disk(random.Random(0)).path("states"))

    def seal(state_id: str, version: int) -> None:
        sealing: Any = ToyFrames(FRAMES)
        facts = StateFacts(version=version)
        store.seal(sealing, lambda summary: manifest_of(PLAN, state_id, summary, facts, 0.0))

    published = bench.state.transfer_id
    uncommitted, later, damaged = (digest(name)[:32] for name in ("uncommitted", "later", "damaged"))
    for state_id, version in ((published, 0), (uncommitted, 1), (later, 2), (damaged, 1)):
        seal(state_id, version)
    durable.replace_atomic(store.root / f"{damaged}.manifest", b"not a manifest")
    assert discard_uncommitted(store, bench.core.ledger) == [uncommitted]
    assert store.ids() == sorted([published, later, damaged])
