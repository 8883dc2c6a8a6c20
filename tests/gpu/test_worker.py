"""The training worker with `[training] device = "cuda"`, a process of its own, and what a codec makes of its update."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from structlog.testing import capture_logs

from bench.codec import reader_of, sealed
from edge_client.device import Device
from edge_client.model import seal_plan
from edge_client.worker_client import WorkerClient
from shared.codec import Codec
from shared.config import SiteConfig
from shared.tensorfile import F32Array
from tests.gpu.seen import Seen
from tests.gpu.ways import UPDATE_F32, distance
from tests.helpers import run_async
from tests.unit.edge_client import tiny

FEDERATION = tiny.federation(training={"epochs": 3})
ROOT = Path(__file__).resolve().parents[2]
LEFT: Mapping[Codec, float] = {"f32": 0.0, "bf16": 2.0**-8, "int8": 0.02}
"""What a codec may lose: L2 norm of the error as a share of the update's. shared/codec.py bounds each value."""


@pytest.fixture(scope="module")
def deltas(
    folders: dict[str, Path], f32: Device, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, F32Array], dict[str, F32Array]]:
    """The update of a worker on the device, and that of one on the processor."""
    root = tmp_path_factory.mktemp("site")
    tiny.write_conll(root / "notes.conll", tiny.notes(10))
    plan, state = seal_plan(FEDERATION, folders["llama"])
    save_file(state, root / "v0.safetensors")

    async def update(device: str, title: str) -> dict[str, F32Array]:
        config = SiteConfig.model_validate(
            {
                "name": "north",
                "federation": "unused.toml",
                "storage": root / device,
                "data": {"notes": root / "notes.conll", "holdout": 0.2},
                "model_dir": folders["llama"],
                "threads": 1,
                "training": {"device": device},
            }
        )
        config.storage.mkdir()
        with capture_logs() as logs:
            async with WorkerClient(config, FEDERATION) as client:
                loaded = await client.load()
                assert (loaded.plan, loaded.uncached) == (plan, "")
                trained = await client.train(root / "v0.safetensors", 0, root / f"{device}.delta")
                assert {"loss", "strict_f1"} <= trained.metrics.keys()
        assert [each["device"] for each in logs if each["event"] == "computes"] == [title]
        return load_file(root / f"{device}.delta")

    with pytest.MonkeyPatch.context() as patch:
        # The worker's process finds the sources as this one does.
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep))
        there = run_async(update("cuda" if f32.is_gpu else "auto", f32.title), timeout_s=100)
        here = run_async(update("cpu", "cpu"), timeout_s=100)
    assert {name: values.shape for name, values in there.items()} == plan.tensors
    assert {values.dtype for values in there.values()} == {np.dtype(np.float32)}
    return there, here


@pytest.mark.parametrize("codec", LEFT)
def test_an_update_from_the_device_travels(
    deltas: tuple[dict[str, F32Array], dict[str, F32Array]], seen: Seen, codec: Codec
) -> None:
    """Sealed and read back it is what was trained, as far as the codec tells it, and near the processor's update."""
    there, here = deltas
    reader = reader_of(*sealed(there, codec))
    read = {name: reader.tensor(name) for name in reader.shapes}
    seen.within("lost by the codec", distance(read, there), LEFT[codec])
    seen.within("from the processor's", distance(read, here), UPDATE_F32 + LEFT[codec])
