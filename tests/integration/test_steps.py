"""Whole runs whose versions travel as steps, over a real Mosquitto with real disks: every replica is the same."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3

from coordinator import fsck
from coordinator.proof import prove
from coordinator.records import Anchored, Finished, VersionCommitted
from coordinator.replay import replay
from coordinator.service import Service
from coordinator.views import load_run
from edge_client.layout import open_layout
from edge_client.states import States
from shared.config import FederationConfig
from shared.configfile import load_config
from shared.manifest import Manifest, StateFacts, manifest_from_bytes
from shared.plan import load_plan
from shared.states import Imprint, extract_state, seal_state
from shared.store import FrameStore
from tests.helpers import run_async
from tests.tiny_run import run_tiny, write_tiny
from tests.toys import RandomTrainer, toy_coordinator, toy_records, toy_site, write_toy

pytestmark = pytest.mark.integration

POLL_S = 0.02
STEPS = 3


def _published(root: Path) -> dict[int, str]:
    """Digest of each version's state, extracted from what the coordinator keeps."""
    store, digests = FrameStore(root / "coordinator" / "states"), {}
    for view in load_run(root / "coordinator").versions:
        path = root / f"extracted-{view.version}"
        extract_state(store, view.parts, path)
        digests[view.version] = blake3(path.read_bytes()).hexdigest()
        assert digests[view.version] == view.state.leads_to
    return digests


def _held(root: Path, site: str) -> Manifest:
    """The newest state that lies whole in a site's folder."""
    store = FrameStore(root / site / "states")
    kept = [stored.manifest for each in store.ids() if (stored := store.get(each)) is not None]
    return max((each for each in kept if isinstance(each.facts, StateFacts)), key=lambda each: each.version)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Ids of the transfers that a coordinator in this process sends chunks of."""
    sent: set[str] = set()
    real = Service._read_state_chunk

    def read(self: Service, transfer_id: str, index: int) -> bytes:
        sent.add(transfer_id)
        return real(self, transfer_id, index)

    monkeypatch.setattr(Service, "_read_state_chunk", read)
    return sent


def _wholes(root: Path) -> dict[int, str]:
    """Transfer ids of the states that can be had whole, by version."""
    records = toy_records(root)
    found = [manifest_from_bytes(records[0].state)]  # type: ignore[union-attr]
    found += [manifest_from_bytes(record.state) for record in records if isinstance(record, Anchored)]
    return {manifest.version: manifest.transfer_id for manifest in found}


def _nothing_is_wrong(root: Path) -> None:
    """Proof, replay and fsck of the run."""
    storage = root / "coordinator"
    federation = load_config(root / "federation.toml", FederationConfig)
    plan = load_plan(storage / "plan.json", federation)
    assert prove(storage, federation, plan).findings == ()
    scratch = root / "scratch"
    scratch.mkdir()
    assert [made.differences for made in replay(storage, federation, plan, scratch)] == [()] * len(_published(root))
    assert fsck.check(storage, federation, plan).problems == ()


@pytest.mark.parametrize(("mode", "sealed"), [("sync", False), ("fedasync", False), ("sync", True)])
def test_sites_that_stay_fetch_one_state_and_then_steps(
    mode: str, sealed: bool, tmp_path: Path, mosquitto_url: str, served: set[str]
) -> None:
    """All train on the published states bit for bit; in sync mode none but version 0 has travelled whole.

    With fedasync versions may come so fast that a site falls too far behind.
    """
    write_toy(
        tmp_path, mosquitto_url, sites=2, versions=7, mode=mode, quorum=2, codec="int8", steps=STEPS, sealed=sealed
    )
    trainers = {f"site-{number}": RandomTrainer(number) for number in (1, 2)}

    async def everybody() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(toy_coordinator(tmp_path / "coordinator.toml"))
            for name, trainer in trainers.items():
                group.create_task(toy_site(tmp_path / f"{name}.toml", trainer=trainer))

    run_async(everybody(), timeout_s=90)
    digests, wholes = _published(tmp_path), _wholes(tmp_path)
    assert sorted(wholes) == [0, 3, 6]
    assert mode == "fedasync" or served & set(wholes.values()) == {wholes[0]}
    for name, trainer in trainers.items():
        assert trainer.given.items() <= digests.items()
        assert _held(tmp_path, name).file_digest == digests[7]
    _nothing_is_wrong(tmp_path)


async def _until(holds: Callable[[], bool]) -> None:
    while not holds():  # noqa: ASYNC110 - files have no event
        await asyncio.sleep(POLL_S)


def _version(root: Path) -> int:
    journal = root / "coordinator" / "journal.sqlite"
    return sum(isinstance(record, VersionCommitted) for record in toy_records(root)) if journal.exists() else 0


def test_a_site_that_was_away_follows_by_steps_and_a_new_one_takes_a_whole_state(
    tmp_path: Path, mosquitto_url: str, served: set[str]
) -> None:
    """Two or three versions behind: so many steps. New at version 3 or later: a whole state and the steps behind it."""
    write_toy(tmp_path, mosquitto_url, sites=3, versions=8, mode="fedasync", codec="int8", steps=STEPS)
    first, away = RandomTrainer(1, seconds=0.3), RandomTrainer(2, seconds=0.5)

    async def leaves(site: asyncio.Task[None]) -> None:
        site.cancel()
        await asyncio.wait([site])

    async def scenario() -> None:
        coordinator = asyncio.create_task(toy_coordinator(tmp_path / "coordinator.toml"))
        leaving = asyncio.create_task(toy_site(tmp_path / "site-2.toml", trainer=away))
        await _until(lambda: 1 in away.given)
        await leaves(leaving)
        working = asyncio.create_task(toy_site(tmp_path / "site-1.toml", trainer=first))
        await _until(lambda: _version(tmp_path) >= 3)
        await leaves(working)  # else its next versions might come before the steps, which are then announced no more
        served.clear()
        back = asyncio.create_task(toy_site(tmp_path / "site-2.toml", trainer=away))
        await _until(lambda: max(away.given) >= 3)
        assert not served & set(_wholes(tmp_path).values())
        names = ((1, first), (3, RandomTrainer(3)))
        others = (toy_site(tmp_path / f"site-{number}.toml", trainer=trainer) for number, trainer in names)
        await asyncio.gather(*others, back, coordinator)

    run_async(scenario(), timeout_s=90)
    digests, wholes = _published(tmp_path), _wholes(tmp_path)
    assert served & {wholes[3], wholes[6]}
    assert wholes[0] not in served
    assert away.given.items() <= digests.items()
    assert _held(tmp_path, "site-3").file_digest == digests[8]
    _nothing_is_wrong(tmp_path)


@pytest.mark.parametrize("point", ["seal.before:2", "seal.middle:2", "seal.after:2", "transfer-whole.after:2"])
def test_a_site_killed_while_it_makes_a_state_makes_it_again(
    point: str, tmp_path: Path, mosquitto_url: str, served: set[str]
) -> None:
    """Between the step's arrival and the state's name: it goes on from what it has, and fetches no state again."""
    write_toy(tmp_path, mosquitto_url, sites=1, versions=3, codec="int8", steps=STEPS)

    def run_site(**environment: str) -> int:
        command = [sys.executable, "-m", "tests.toys", "site", str(tmp_path / "site-1.toml")]
        return subprocess.run(command, env={**os.environ, **environment}, check=False, timeout=60).returncode

    async def scenario() -> None:
        coordinator = asyncio.create_task(toy_coordinator(tmp_path / "coordinator.toml"))
        # The first thing that a site seals is its update of version 0, the second the state of version 1.
        assert await asyncio.to_thread(run_site, MAILBOAT_DIE_AT=point) == -signal.SIGKILL
        served.clear()
        assert await asyncio.to_thread(run_site) == 0
        await coordinator

    run_async(scenario(), timeout_s=90)
    assert any(isinstance(record, Finished) for record in toy_records(tmp_path))
    digests = _published(tmp_path)
    assert not served & set(_wholes(tmp_path).values())
    assert _held(tmp_path, "site-1").file_digest == digests[3]
    _nothing_is_wrong(tmp_path)


def test_a_state_that_lies_here_in_other_frames_is_fetched_again(
    tmp_path: Path, mosquitto_url: str, served: set[str]
) -> None:
    """As one that steps made and that is then announced whole, when a newer one was spoilt: no process ends of it."""
    write_toy(tmp_path, mosquitto_url, sites=1, versions=1, codec="int8", steps=STEPS)
    federation = load_config(tmp_path / "federation.toml", FederationConfig)
    plan = load_plan(tmp_path / "coordinator" / "plan.json", federation)
    open_layout(tmp_path / "site-1")
    states = States(tmp_path / "site-1" / "states", federation, plan.fingerprint)
    states.begin(tmp_path / "coordinator" / "initial.safetensors")  # of another moment than the coordinator's
    strange = {name: np.zeros(shape, np.float32) for name, shape in plan.tensors.items()}
    seal_state(states.store, Imprint(federation, plan.fingerprint, 9), strange.__getitem__, plan.tensors)

    async def everybody() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(toy_coordinator(tmp_path / "coordinator.toml"))
            group.create_task(toy_site(tmp_path / "site-1.toml", trainer=RandomTrainer(1)))

    run_async(everybody(), timeout_s=60)
    assert served >= {_wholes(tmp_path)[0]}
    assert _held(tmp_path, "site-1").file_digest == _published(tmp_path)[1]


@pytest.mark.parametrize(
    ("trained", "down"),
    [
        ('[layers]\nplan = "top:2"\npersonal = ["score.*"]\n', "int4"),
        ('[layers]\nplan = "top:2"\n[adapter]\nkind = "lora"\nrank = 4\n', "topk2x4"),
        ('[layers]\nplan = "top:2"\n[adapter]\nkind = "ffa-lora"\nrank = 4\n', "bf16"),
        ('[layers]\nplan = "top:2"\n[adapter]\nkind = "fedsa-lora"\nrank = 4\n', "int8"),
        ('[layers]\nplan = "top:2"\n[adapter]\nkind = "fedex-lora"\nrank = 4\n', "topk2"),
    ],
)
def test_whatever_is_trained_travels_as_steps(
    trained: str, down: str, tmp_path: Path, mosquitto_url: str, served: set[str]
) -> None:
    """Tensors that stay, adapters, and what averaging those loses: version 0 is in the base model all the same.

    So no state travels whole, and every site ends with the coordinator's.
    """
    write_tiny(tmp_path, mosquitto_url, versions=3, codec=f'down = "{down}"\nsteps = 2', federation=trained)
    run_tiny(tmp_path)
    digests, wholes = _published(tmp_path), _wholes(tmp_path)
    assert not served & set(wholes.values())
    assert [_held(tmp_path, name).file_digest for name in ("site-1", "site-2")] == [digests[3]] * 2
    _nothing_is_wrong(tmp_path)


def test_damaged_steps_and_anchors_are_made_again(tmp_path: Path, mosquitto_url: str) -> None:
    """`fsck --repair` computes them from version 0 and the kept updates, and takes them only if they are the same."""
    write_toy(tmp_path, mosquitto_url, sites=1, versions=4, codec="int8", steps=2)

    async def everybody() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(toy_coordinator(tmp_path / "coordinator.toml"))
            group.create_task(toy_site(tmp_path / "site-1.toml", trainer=RandomTrainer(1)))

    run_async(everybody(), timeout_s=60)
    storage = tmp_path / "coordinator"
    federation = load_config(tmp_path / "federation.toml", FederationConfig)
    plan = load_plan(storage / "plan.json", federation)
    sound = {path.name: path.read_bytes() for path in (storage / "states").iterdir()}
    parts = [load_run(storage).versions[version].state.transfer_id for version in (1, 4)]
    parts.append(_wholes(tmp_path)[2])
    for part in parts:
        (storage / "states" / f"{part}.frames").write_bytes(b"nothing")
    checked = fsck.check(storage, federation, plan)
    assert {problem.where.partition(":")[0] for problem in checked.problems} == {
        f"states/{part}.frames" for part in parts
    }
    mended = fsck.check(storage, federation, plan, repair=True)
    assert all(problem.repaired for problem in mended.problems)
    assert {path.name: path.read_bytes() for path in (storage / "states").iterdir()} == sound
    _nothing_is_wrong(tmp_path)
