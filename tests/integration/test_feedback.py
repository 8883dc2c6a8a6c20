"""Error feedback in a whole run over a real Mosquitto: what was merged and what is owed is all that was trained."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from coordinator.records import Accepted, VersionCommitted
from shared.faultpoint import VARIABLE
from shared.store import FrameStore
from shared.tensorfile import F32Array
from tests.helpers import run_async
from tests.toys import INITIAL, toy_coordinator, toy_records, write_toy

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

VERSIONS = 6
ROOT = Path(__file__).parents[2]


async def site_life(root: Path, point: str | None) -> int:
    """One life of the site's process, which ends at a commit point, or when the run is complete; its status."""
    told = {VARIABLE: point} if point else {}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.toys", "site", str(root / "site-1.toml"), cwd=ROOT, env=os.environ | told
    )
    return await process.wait()


async def story(root: Path, points: list[str]) -> None:
    """A coordinator, and a site that dies at each of these points in turn."""
    async with asyncio.TaskGroup() as group:
        group.create_task(toy_coordinator(root / "coordinator.toml"))
        for point in points:
            assert await site_life(root, point) == -signal.SIGKILL
        assert await site_life(root, None) == 0


def owed(root: Path) -> dict[str, F32Array]:
    """The site's residual."""
    store = FrameStore(root / "site-1" / "residual")
    (update_id,) = store.ids()
    stored = store.get(update_id)
    assert stored is not None
    with stored.open_tensors(verify=True) as reader:
        return dict(reader.tensors())


@pytest.mark.parametrize("codec", ["topk2", "int4"])
def test_merged_and_owed_make_what_was_trained(codec: str, tmp_path: Path, mosquitto_url: str) -> None:
    """With b = 1 and a delta of 1 everywhere: after n updates master + residual = initial + n, whoever was killed when.

    A lost residual would lack some ones, a doubled one would have too many. The residual is kept as bfloat16: each of n
    times it may be off by 2^-8 of at most n.
    """
    write_toy(
        tmp_path, mosquitto_url, sites=1, versions=VERSIONS, parameters=640, codec=codec, down="f32", feedback=1.0
    )
    # Behind the second update's residual; behind the third update, with the residual before it still there.
    run_async(story(tmp_path, ["seal.after:3", "seal.after:4"]), timeout_s=150)
    records = toy_records(tmp_path)
    assert sum(isinstance(record, Accepted) for record in records) == VERSIONS
    assert sum(isinstance(record, VersionCommitted) for record in records) == VERSIONS
    master = load_file(tmp_path / "coordinator" / "masters" / f"v{VERSIONS:08d}.safetensors")
    left = owed(tmp_path)
    assert left.keys() == master.keys()
    for name, values in master.items():
        whole = values + left[name]
        np.testing.assert_allclose(whole, INITIAL + VERSIONS, atol=VERSIONS * VERSIONS * 2**-8)
        assert (np.abs(left[name]).max() > 1) == (codec == "topk2")
