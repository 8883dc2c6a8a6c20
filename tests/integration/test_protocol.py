"""What the protocol promises when something happens in mid-run, over a real Mosquitto with real disks."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from broker.launcher import find_mosquitto, run_broker
from coordinator.journal import Journal
from coordinator.records import Accepted, Record, Rejected, VersionCommitted
from edge_client.training import Standing
from shared import codec as codecs
from shared.codec import Codec, encode_file, group_size
from shared.errors import MailboatError
from shared.mailroom import Mailroom
from shared.manifest import manifest_from_bytes
from shared.messages import Announce, Message, Receipt
from shared.slices import FrameWriter, make_transfer_frames
from shared.store import FrameStore
from shared.tensorfile import NUMPY_DTYPES, F32Array, header_size, parse_header
from shared.topics import Channel
from tests.helpers import run_async
from tests.toys import INITIAL, ToyTrained, toy_coordinator, toy_records, toy_site, write_toy

POLL_S = 0.02


def _versions(root: Path) -> list[VersionCommitted]:
    return [record for record in toy_records(root) if isinstance(record, VersionCommitted)]


def _master(root: Path, version: int) -> dict[str, F32Array]:
    master: dict[str, F32Array] = load_file(root / "coordinator" / "masters" / f"v{version:08d}.safetensors")
    return master


def _assert_each_counted_once(root: Path) -> None:
    """Every accepted update has its place in exactly one version (or was dropped at the end)."""
    counted = [part.update_id for version in _versions(root) for part in version.contributions]
    accepted = [record.update_id for record in toy_records(root) if isinstance(record, Accepted)]
    assert len(counted) == len(set(counted))
    assert len(accepted) == len(set(accepted))
    assert set(counted) <= set(accepted)


async def _until_recorded(root: Path, kind: type[Any], count: int = 1) -> None:
    """Wait until the journal holds so many records of a kind."""
    path = root / "coordinator" / "journal.sqlite"
    while True:
        if path.exists():
            with contextlib.suppress(MailboatError), Journal.open_read(path) as journal:
                if sum(isinstance(record, kind) for record in journal.replay()) >= count:
                    return
        await asyncio.sleep(POLL_S)


async def _everybody(root: Path, *sites: Coroutine[Any, Any, None]) -> None:
    """A coordinator and these sites until all are done."""
    async with asyncio.TaskGroup() as group:
        group.create_task(toy_coordinator(root / "coordinator.toml"))
        for site in sites:
            group.create_task(site)


# -- somebody is killed, away or restarted ---


def test_a_coordinator_killed_between_acceptance_and_merge_counts_the_update_once(
    tmp_path: Path, mosquitto_url: str
) -> None:
    """Killed -9 with one update accepted of the two that the quorum asks for: the journal knows it, and it counts."""
    write_toy(tmp_path, mosquitto_url, sites=2, versions=1, quorum=2)

    async def start() -> asyncio.subprocess.Process:
        command = (sys.executable, "-m", "tests.toys", "coordinator", str(tmp_path / "coordinator.toml"))
        return await asyncio.create_subprocess_exec(*command, cwd=Path(__file__).parents[2])

    async def scenario() -> None:
        coordinator = await start()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(toy_site(tmp_path / "site-1.toml"))
                await _until_recorded(tmp_path, Accepted)
                coordinator.kill()
                await coordinator.wait()
                assert _versions(tmp_path) == []
                coordinator = await start()
                group.create_task(toy_site(tmp_path / "site-2.toml"))
            assert await coordinator.wait() == 0
        finally:
            with contextlib.suppress(ProcessLookupError):
                coordinator.kill()
            await coordinator.wait()

    run_async(scenario(), timeout_s=60)
    (version,) = _versions(tmp_path)
    assert [part.site for part in version.contributions] == ["site-1", "site-2"]
    _assert_each_counted_once(tmp_path)
    for values in _master(tmp_path, 1).values():
        np.testing.assert_allclose(values, INITIAL + 1.0)


def test_a_site_that_never_comes_is_not_waited_for(tmp_path: Path, mosquitto_url: str) -> None:
    """Two of three are the quorum, and the third one's machine is off: rounds close without it."""
    write_toy(tmp_path, mosquitto_url, sites=3, versions=2, quorum=2)
    run_async(_everybody(tmp_path, *(toy_site(tmp_path / f"site-{number}.toml") for number in (1, 2))), timeout_s=60)
    assert [{part.site for part in version.contributions} for version in _versions(tmp_path)] == [
        {"site-1", "site-2"}
    ] * 2
    _assert_each_counted_once(tmp_path)


def test_a_broker_that_is_killed_and_comes_back_costs_nothing_but_time(tmp_path: Path, free_port: int) -> None:
    """It forgets all that it held, retained announcement and presence included; everybody says it again."""
    if find_mosquitto() is None:
        pytest.skip("Mosquitto is not installed: apt-get install mosquitto")
    write_toy(tmp_path, f"mqtt://127.0.0.1:{free_port}", sites=2, versions=4, quorum=2)

    async def scenario() -> None:
        async with asyncio.TaskGroup() as group:
            async with run_broker("mosquitto", tmp_path / "broker", port=free_port) as broker:
                running = group.create_task(
                    _everybody(tmp_path, *(toy_site(tmp_path / f"site-{n}.toml") for n in (1, 2)))
                )
                await _until_recorded(tmp_path, Accepted, 3)
                os.kill(broker.pid, signal.SIGKILL)
                await broker.wait()
            async with run_broker("mosquitto", tmp_path / "again", port=free_port):
                await _until_recorded(tmp_path, VersionCommitted, 4)
                await running  # the broker serves until all have left

    run_async(scenario(), timeout_s=90)
    assert [len(version.contributions) for version in _versions(tmp_path)] == [2] * 4
    _assert_each_counted_once(tmp_path)
    for values in _master(tmp_path, 4).values():
        np.testing.assert_allclose(values, INITIAL + 4.0)


def test_a_restarted_coordinator_goes_on_with_its_momentum(tmp_path: Path, mosquitto_url: str) -> None:
    """Deltas of 1 with momentum 0.5 make steps of 1, 1.5 and 1.75, also when the process ended in between."""
    server = '[aggregation.server]\noptimizer = "momentum"\nmomentum = 0.5\nlr = 1.0\n'
    write_toy(tmp_path, mosquitto_url, sites=1, versions=3, extra=server)

    async def scenario() -> None:
        async with asyncio.TaskGroup() as group:
            coordinator = group.create_task(toy_coordinator(tmp_path / "coordinator.toml"))
            group.create_task(toy_site(tmp_path / "site-1.toml", seconds=0.3))
            await _until_recorded(tmp_path, VersionCommitted)
            coordinator.cancel()
            await asyncio.wait([coordinator])
            group.create_task(toy_coordinator(tmp_path / "coordinator.toml"))

    run_async(scenario(), timeout_s=60)
    for version, expected in ((1, 1.0), (2, 1.0 + 1.5), (3, 1.0 + 1.5 + 1.75)):
        record = _versions(tmp_path)[version - 1]
        assert record.optimizer_digest is not None
        if version > 1:  # of older masters only version 0 is kept
            for values in _master(tmp_path, version).values():
                np.testing.assert_allclose(values, INITIAL + expected)


def test_the_coordinator_journals_before_it_speaks(
    tmp_path: Path, mosquitto_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that takes its time delays the word: no receipt and no announcement says what is not yet durable."""
    durable: set[str] = set()
    said: list[str] = []
    append, post = Journal.append, Mailroom.post

    def slow_append(self: Journal, records: Sequence[Record]) -> None:
        time.sleep(0.05)
        append(self, records)
        for record in records:
            match record:
                case Accepted():
                    durable.add(f"accepted {record.update_id}")
                case VersionCommitted():
                    durable.add(f"version {record.version}")
                    durable.update(f"merged {part.update_id}" for part in record.contributions)

    async def watched_post(self: Mailroom, message: Message, channel: Channel, site: str | None = None) -> None:
        match message:
            case Receipt():
                said.append(f"{message.outcome} {message.update_id}")
                assert said[-1] in durable
            case Announce() if message.manifest.state.version:
                said.append(f"version {message.manifest.state.version}")
                assert said[-1] in durable
        await post(self, message, channel, site)

    monkeypatch.setattr(Journal, "append", slow_append)
    monkeypatch.setattr(Mailroom, "post", watched_post)
    write_toy(tmp_path, mosquitto_url, sites=1, versions=2)
    run_async(_everybody(tmp_path, toy_site(tmp_path / "site-1.toml")), timeout_s=60)
    assert set(said) == durable


# -- what travels ---


def _decoded(path: Path, codec: Codec, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, F32Array]:
    """The tensors of a safetensors file of this codec."""
    data = np.fromfile(path, dtype=np.uint8)
    begin = header_size(data[:8].tobytes(), len(data))
    parts = {
        spec.name: data[begin + spec.begin : begin + spec.end].view(NUMPY_DTYPES[spec.dtype]).reshape(spec.shape)
        for spec in parse_header(data[:begin].tobytes(), len(data)).specs
    }
    return {
        name: codecs.decode_tensor([parts[part] for part, _, _ in codecs.part_specs(name, shape, codec)], codec, shape)
        for name, shape in shapes.items()
    }


SHAPES: dict[str, tuple[int, ...]] = {"a.weight": (500,), "b.weight": (500,)}
TARGET = {name: np.random.default_rng(number).random(500, np.float32) * 2 for number, name in enumerate(SHAPES)}


class HalfwayTrainer:
    """Goes half of the way from the state that it was given to the target: it must really read that state."""

    standing = Standing()

    def __init__(self, codec: Codec) -> None:
        self.codec = codec

    async def train(
        self, state: Path, base_version: int, delta: Path, *, on_progress: Callable[[float, float], None]
    ) -> ToyTrained:
        """Write half of what is missing."""
        on_progress(1.0, 0.0)
        found = _decoded(state, self.codec, SHAPES)
        save_file({name: (TARGET[name] - values) / 2 for name, values in found.items()}, delta)
        return ToyTrained(10, {"loss": float(base_version)})


@pytest.mark.parametrize(("codec", "tolerance"), [("f32", 1e-5), ("bf16", 0.017), ("int8", 0.017), ("int4", 0.3)])
def test_what_is_learnt_survives_its_codec_both_ways(
    codec: Codec, tolerance: float, tmp_path: Path, mosquitto_url: str
) -> None:
    """Four half-way steps leave a sixteenth of the distance, plus what the codec may round.

    Values reach 2, deltas 1: a state is off by at most 2/254 (int8), 2/256 (bf16) or 2/14 (int4), a delta by half of
    that, and of each step's error half is made good by the next: 2 x (state / 2 + delta), which is 0.016, or 0.29.
    """
    write_toy(tmp_path, mosquitto_url, sites=2, versions=4, quorum=2, parameters=1000, codec=codec, slice_kib=4)
    sites = (toy_site(tmp_path / f"site-{n}.toml", trainer=HalfwayTrainer(codec)) for n in (1, 2))
    run_async(_everybody(tmp_path, *sites), timeout_s=60)
    master = _master(tmp_path, 4)
    for name, target in TARGET.items():
        expected = target + (INITIAL - target) / 16
        np.testing.assert_allclose(master[name], expected, atol=tolerance, rtol=0)
    state = manifest_from_bytes(_versions(tmp_path)[-1].state)
    assert state.codec == codec
    stored = FrameStore(tmp_path / "coordinator" / "states").get(state.transfer_id)
    assert stored is not None
    with stored.open_tensors(verify=True) as reader:
        for name, values in reader.tensors():
            np.testing.assert_allclose(values, master[name], atol=tolerance / 2, rtol=0)


def test_an_update_with_nan_is_rejected_and_the_run_goes_on(
    tmp_path: Path, mosquitto_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that checks nothing sends one: the rule is named to it and in the journal, and it counts nowhere."""
    spoilt: list[str] = []

    def careless(tensors: Any, codec: Codec, metadata: Mapping[str, str], slice_size: int) -> FrameWriter:
        if spoilt:
            return make_transfer_frames(tensors, codec, metadata, slice_size)
        spoilt.append(metadata["update_id"])
        data = bytearray(b"".join(encode_file(tensors, codec, metadata)))
        data[-4:] = np.float32("nan").tobytes()
        return FrameWriter([bytes(data)], group=group_size(codec), slice_size=slice_size)

    monkeypatch.setattr("edge_client.sealing.make_transfer_frames", careless)
    write_toy(tmp_path, mosquitto_url, sites=2, versions=2)
    run_async(_everybody(tmp_path, *(toy_site(tmp_path / f"site-{n}.toml") for n in (1, 2))), timeout_s=60)
    (rejected,) = (record for record in toy_records(tmp_path) if isinstance(record, Rejected))
    assert (rejected.update_id, rejected.rule) == (spoilt[0], "non-finite")
    receipt = json.loads((tmp_path / rejected.site / "receipts" / f"{rejected.update_id}.json").read_text())
    assert (receipt["outcome"], receipt["rule"]) == ("rejected", "non-finite")
    assert [len(version.contributions) for version in _versions(tmp_path)] == [1, 2]
    for values in _master(tmp_path, 2).values():
        np.testing.assert_allclose(values, INITIAL + 2.0)
    assert not list((tmp_path / "coordinator" / "updates").glob(f"{rejected.update_id}*"))
