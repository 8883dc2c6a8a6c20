"""Sites are sent a rounded copy of the global state, and nothing of what was rounded away (FedLPP)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from coordinator import service
from coordinator.records import Opened, VersionCommitted
from edge_client.statefile import read_state
from shared.codec import decode_tensor, encode
from shared.config import CodecName
from shared.errors import RefusedError
from shared.link import Link
from shared.manifest import Manifest, manifest_from_bytes
from shared.messages import parse_chunk
from shared.reader import TensorReader
from shared.tensorfile import F32Array
from tests.helpers import run_async
from tests.toys import ToyTrained, ToyTrainer, toy_coordinator, toy_records, toy_site, write_toy

VERSIONS = 2
NAMES = ("a.weight", "b.weight")


class Drawing(ToyTrainer):
    """Adds numbers of full precision to whatever state it was sent."""

    async def train(
        self, state: Path, base_version: int, delta: Path, *, on_progress: Callable[[float, float], None]
    ) -> ToyTrained:
        """See Trainer."""
        on_progress(1.0, 0.0)
        rng = np.random.default_rng(base_version)
        shapes = {name: values.shape for name, values in read_state(state).items()}
        save_file({name: rng.normal(0, 1, shape).astype(np.float32) for name, shape in shapes.items()}, delta)
        return ToyTrained(10, {})


def frames_of(manifest: Manifest, chunks: dict[tuple[str, int], bytes]) -> list[bytes]:
    """All frames of a state, as they were sent."""
    return [chunks[manifest.transfer_id, index] for index in range(manifest.frames)]


def rounded(values: F32Array, codec: CodecName) -> F32Array:
    """What the codec leaves of a tensor."""
    return decode_tensor([part for _name, _dtype, part in encode("w", values, codec)], codec, values.shape)


@pytest.mark.parametrize("codec", ["bf16", "int8"])
def test_nothing_that_leaves_the_coordinator_is_finer_than_the_rounded_state(
    codec: CodecName, tmp_path: Path, mosquitto_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks make up the published states and no other file, each the codec's rounding of its master, number by number.

    And no message, and no byte of a state's file, holds four numbers of a master in a row.
    """
    packets: list[bytes] = []

    class Overheard(Link):
        async def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
            packets.append(payload)
            await super().publish(topic, payload, retain=retain)

    monkeypatch.setattr(service, "Link", Overheard)
    write_toy(tmp_path, mosquitto_url, sites=1, versions=VERSIONS, parameters=4_000, slice_kib=4, down=codec)

    async def everybody() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(toy_coordinator(tmp_path / "coordinator.toml"))
            group.create_task(toy_site(tmp_path / "site-1.toml", trainer=Drawing(step=0.0, seconds=0.0, examples=10)))

    run_async(everybody(), timeout_s=60)
    chunks: dict[tuple[str, int], bytes] = {}
    messages = []
    for packet in packets:
        try:
            chunk = parse_chunk(packet)
        except RefusedError:
            messages.append(packet)
        else:
            chunks[chunk.transfer_id, chunk.index] = bytes(chunk.frame)
    states = [
        manifest_from_bytes(record.state)
        for record in toy_records(tmp_path)
        if isinstance(record, Opened | VersionCommitted)
    ]
    assert {transfer_id for transfer_id, _index in chunks} == {state.transfer_id for state in states}
    for version in (1, 2):
        master = load_file(tmp_path / "coordinator" / "masters" / f"v{version:08d}.safetensors")
        frames = frames_of(states[version], chunks)
        reader = TensorReader(states[version], frames.__getitem__, verify=False)
        assert list(reader.shapes) == list(NAMES)
        for name in NAMES:
            sent = reader.tensor(name)
            assert np.array_equal(sent, rounded(master[name], codec))
            assert np.mean(sent != master[name]) > 0.9
        told = [*messages, b"".join(bytes(each) for each in reader.slices())]
        for values in master.values():
            data = values.tobytes()
            for start in range(0, len(data) - 15, 16):
                assert not any(data[start : start + 16] in each for each in told)
