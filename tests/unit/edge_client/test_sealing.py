"""Updates and what they leave out, on real disks: both are there, or neither, whenever the process is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_client.outbox import Outbox
from edge_client.residual import Residuals
from edge_client.sealing import seal_delta
from shared.errors import NoRoomError, RefusedError
from shared.faultpoint import VARIABLE
from shared.manifest import Manifest, UpdateFacts
from shared.messages import LOST, Receipt
from shared.store import FrameStore
from shared.tensorfile import F32Array
from tests.factories import digest, make_federation

PLAN = digest("plan")
FEDERATION = make_federation(codec={"up": "topk2", "feedback": 0.5})
Tensors = dict[str, F32Array]


def values_of(*first: float) -> F32Array:
    """These, and zeros behind them, 64 in all: of which one is sent."""
    values = np.zeros(64, dtype=np.float32)
    values[: len(first)] = first
    return values


FIRST, SECOND = values_of(4, 2, 1), values_of(0, 1, 1)
LEFT = {1: values_of(0, 2, 1), 2: values_of(0, 0, 1.5)}
"""By hand, b = 0.5: of 4, 2, 1 the 4 is sent; of 0, 2, 1.5 the 2 is."""


def seal(outbox: Outbox, delta: F32Array | Tensors, *, plan: str = PLAN, federation: Any = FEDERATION) -> Manifest:
    """Seal an update of a tensor `w`, or of several."""
    facts = UpdateFacts(site="north", base_version=0, base_digest=digest("base"), examples=10, metrics={})
    tensors = delta if isinstance(delta, dict) else {"w": delta}
    return seal_delta(outbox, tensors, facts, federation, plan, lambda manifest: manifest)


def sent(outbox: Outbox, manifest: Manifest) -> Tensors:
    """What a receiver sees of an update."""
    stored = outbox.store.get(manifest.transfer_id)
    assert stored is not None
    with stored.open_tensors(verify=True) as reader:
        return dict(reader.tensors())


def owed(outbox: Outbox, *, plan: str = PLAN) -> Tensors | None:
    """What the site owes."""
    stored = outbox.residuals.current(plan)
    if stored is None:
        return None
    with stored.open_tensors(verify=True) as reader:
        return dict(reader.tensors())


def owes(outbox: Outbox, expected: F32Array) -> bool:
    """Whether it owes just this of `w`."""
    found = owed(outbox)
    return found is not None and found.keys() == {"w"} and np.array_equal(found["w"], expected)


def settle(outbox: Outbox, manifest: Manifest, outcome: str, rule: str | None = None) -> str | None:
    """Take a receipt."""
    said = {"update_id": manifest.transfer_id, "manifest_sha256": manifest.digest, "outcome": outcome, "rule": rule}
    return outbox.settle(Receipt.model_validate(said))


def test_what_is_left_out_is_added_to_the_next_update(tmp_path: Path) -> None:
    """By hand: 4 is sent, then 2; each time the rest is owed."""
    outbox = Outbox(tmp_path)
    np.testing.assert_array_equal(sent(outbox, seal(outbox, FIRST))["w"], values_of(4))
    assert owes(outbox, LEFT[1])
    np.testing.assert_array_equal(sent(outbox, seal(outbox, SECOND))["w"], values_of(0, 2))
    assert owes(outbox, LEFT[2])
    assert len(FrameStore(tmp_path / "residual").ids()) == 1


def test_a_restart_and_receipts_change_nothing(tmp_path: Path) -> None:
    """Accepted, merged, opened again: the residual is that of the last update."""
    outbox = Outbox(tmp_path)
    manifest = seal(outbox, FIRST)
    settle(outbox, manifest, "accepted")
    assert owes(Outbox(tmp_path), LEFT[1])
    again = Outbox(tmp_path)
    settle(again, manifest, "merged")
    assert owes(again, LEFT[1])
    seal(again, SECOND)
    assert owes(Outbox(tmp_path), LEFT[2])


@pytest.mark.parametrize(
    ("outcome", "rule"), [("rejected", "non-finite"), ("dropped", "quarantine"), ("dropped", LOST)]
)
def test_a_refused_update_takes_its_residual_along(tmp_path: Path, outcome: str, rule: str) -> None:
    """What was refused as a whole does not travel in parts: the next update is its delta alone."""
    outbox = Outbox(tmp_path)
    manifest = seal(outbox, FIRST)
    if rule == LOST:
        settle(outbox, manifest, "accepted")
    settle(outbox, manifest, outcome, rule)
    assert owed(outbox) is None
    assert owed(Outbox(tmp_path)) is None
    np.testing.assert_array_equal(sent(outbox, seal(outbox, values_of(0, 1, 3)))["w"], values_of(0, 0, 3))
    settle(outbox, manifest, outcome, rule)  # repeated: no news, and nothing of the new one goes
    assert owes(outbox, values_of(0, 1))


def test_an_update_that_is_being_sealed_when_another_is_refused_owes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its residual holds a part of the refused one's: the refusal waits until it is there, and takes it along."""
    outbox = Outbox(tmp_path)
    refused = seal(outbox, FIRST)
    settling = threading.Thread(target=settle, args=(outbox, refused, "rejected", "norm-bound"))
    put = Residuals.put

    def interrupted(self: Residuals, *args: Any) -> None:
        settling.start()
        settling.join(0.2)
        assert settling.is_alive(), "the refusal did not wait"
        put(self, *args)

    monkeypatch.setattr(Residuals, "put", interrupted)
    seal(outbox, SECOND)
    settling.join()
    assert owed(outbox) is None


def test_a_failed_attempt_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full between residual and update: the next attempt adds what the first one would have."""
    outbox = Outbox(tmp_path)
    seal(outbox, FIRST)
    before = outbox.store.ids()

    def full(*_args: Any) -> None:
        raise NoRoomError("full", hint="")

    with monkeypatch.context() as patch:
        patch.setattr(outbox.store, "seal", full)
        for _ in range(3):
            with pytest.raises(NoRoomError):
                seal(outbox, SECOND)
            assert len(FrameStore(tmp_path / "residual").ids()) <= 2, "one that counts, one attempt"
    assert outbox.store.ids() == before
    assert owes(outbox, LEFT[1])
    np.testing.assert_array_equal(sent(outbox, seal(outbox, SECOND))["w"], values_of(0, 2))
    assert owes(outbox, LEFT[2])


def test_a_delta_that_is_not_finite_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    """The tensor is named; what was owed is owed still."""
    outbox = Outbox(tmp_path)
    seal(outbox, FIRST)
    with pytest.raises(RefusedError, match="tensor w holds NaN"):
        seal(outbox, values_of(np.nan))
    assert owes(Outbox(tmp_path), LEFT[1])


def test_another_plan_owes_nothing(tmp_path: Path) -> None:
    """A residual is about one model: under another fingerprint the delta alone is sent, and the old residual goes."""
    outbox = Outbox(tmp_path)
    seal(outbox, FIRST)
    manifest = seal(outbox, values_of(0, 0, 1), plan=digest("another plan"))
    np.testing.assert_array_equal(sent(outbox, manifest)["w"], values_of(0, 0, 1))
    assert owed(outbox) is None


def test_tensors_come_and_go(tmp_path: Path) -> None:
    """A site that trains other layers for a while: what a tensor owes decays until it is trained again."""
    outbox = Outbox(tmp_path)
    seal(outbox, {"w": values_of(4, 2), "x": values_of(8, 4)})
    manifest = seal(outbox, {"w": values_of(0, 0, 1)})
    assert sent(outbox, manifest).keys() == {"w"}
    found = owed(outbox)
    assert found is not None
    np.testing.assert_array_equal(found["x"], values_of(0, 2))
    np.testing.assert_array_equal(sent(outbox, seal(outbox, {"x": values_of(1)}))["x"], values_of(1))


def test_a_spoilt_residual_owes_nothing(tmp_path: Path) -> None:
    """The site goes on with its delta alone, at once and after a restart."""
    outbox = Outbox(tmp_path)
    seal(outbox, FIRST)
    path = next((tmp_path / "residual").glob("*.frames"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    assert owed(outbox) is None
    np.testing.assert_array_equal(sent(outbox, seal(outbox, SECOND))["w"], values_of(0, 1))
    next((tmp_path / "residual").glob("*.manifest")).write_bytes(b"spoilt")
    assert owed(Outbox(tmp_path)) is None
    assert not list((tmp_path / "residual").iterdir())


@pytest.mark.parametrize(("up", "feedback"), [("int4", None), ("topk2", 0.0), ("bf16", None)])
def test_without_feedback_nothing_is_kept(tmp_path: Path, up: str, feedback: float | None) -> None:
    """Which is the default of all codecs but topk2; a residual of an earlier plan goes with the first update."""
    outbox = Outbox(tmp_path)
    seal(outbox, FIRST)
    seal(outbox, FIRST, federation=make_federation(codec={"up": up, "feedback": feedback}))
    assert not list((tmp_path / "residual").iterdir())


def test_int4_may_owe_as_well(tmp_path: Path) -> None:
    """Scale 1, b = 0.5: of 7, 3.25 a quarter is left; 0.125 more than 3.375 is half, which makes level 4."""
    federation = make_federation(codec={"up": "int4", "feedback": 0.5})
    outbox = Outbox(tmp_path)
    np.testing.assert_array_equal(
        sent(outbox, seal(outbox, values_of(7, 3.25), federation=federation))["w"][:2], [7, 3]
    )
    assert owes(outbox, values_of(0, 0.25))
    manifest = seal(outbox, values_of(7, 3.5), federation=federation)
    np.testing.assert_array_equal(sent(outbox, manifest)["w"][:2], [7, 4])
    assert owes(outbox, values_of(0, -0.375))


# -- kill -9; each update passes the points of a seal twice, first with its residual ---

STORY = """
import sys
from pathlib import Path
from edge_client.outbox import Outbox
from tests.unit.edge_client.test_sealing import FIRST, SECOND, seal
outbox = Outbox(Path(sys.argv[1]))
for delta in (FIRST, SECOND):
    seal(outbox, delta)
"""


@pytest.mark.parametrize(
    ("point", "updates"),
    [
        ("seal.before:1", 0),
        ("seal.after:1", 0),
        ("seal.middle:2", 0),
        ("seal.after:2", 1),
        ("seal.after:3", 1),
        ("seal.before:4", 1),
        ("seal.middle:4", 1),
        ("seal.after:4", 2),
        ("delete.before:1", 2),
        ("delete.middle:1", 2),
    ],
)
def test_a_kill_leaves_both_or_neither(tmp_path: Path, point: str, updates: int) -> None:
    """So many updates are sealed, what is owed is theirs, and going on from there comes out as without the kill."""
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", STORY, str(tmp_path)],
        check=False,
        cwd=root,
        env=os.environ | {VARIABLE: point, "PYTHONPATH": str(root)},
    )
    assert done.returncode == -signal.SIGKILL
    outbox = Outbox(tmp_path)
    assert len(outbox.pending()) == updates
    assert len(FrameStore(tmp_path / "residual").ids()) == min(updates, 1)
    assert owes(outbox, LEFT[updates]) if updates else owed(outbox) is None
    for delta in (FIRST, SECOND)[updates:]:
        seal(outbox, delta)
    assert owes(outbox, LEFT[2])
    total = sum((sent(outbox, manifest)["w"] for manifest in outbox.pending()), start=np.zeros(64, dtype=np.float32))
    np.testing.assert_array_equal(total, values_of(4, 2))
