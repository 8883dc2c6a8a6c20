"""A GPU's memory: what is not needed leaves it, and what training takes is not more than was estimated."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from bench.gpu import Shape, make_model, make_windows
from edge_client.batches import make_batches
from edge_client.depth import MIB, measures
from edge_client.device import Device
from edge_client.model import LoadedModel, load_model, train_only, version_zero
from edge_client.prefix import prepare
from edge_client.prefix_store import NOWHERE, InMemory
from edge_client.trainer import Dataset, train
from edge_client.weights import absent
from shared.config import FederationConfig
from tests.gpu.seen import Seen

pytestmark = pytest.mark.gpu_alone

SHAPE = Shape(depth=8, width=1024, heads=16, kv_heads=4, inner=4096, vocabulary=None, sequence=256)
"""So large that a block, 60 MB, is more than what libraries take for themselves."""
BLOCKS = (5, 6, 7)
ROUNDED = 0.01
"""Tensors take whole pages of 512 bytes."""


@pytest.fixture(autouse=True)
def tidy(f32: Device) -> None:
    """Nothing of an earlier test is let go while this one measures."""
    gc.collect()
    f32.give_back()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, f32: Device) -> Path:
    """A LLaMA with random weights."""
    folder = tmp_path_factory.mktemp("model") / "llama"
    make_model(folder, SHAPE, f32)
    return folder


def federation(folder: Path) -> FederationConfig:
    """The top three blocks are trained."""
    return FederationConfig.model_validate(
        {
            "federation": {"name": "memory"},
            "model": {"base": str(folder)},
            "task": {"max_length": SHAPE.sequence},
            "layers": {"plan": f"top:{len(BLOCKS)}"},
            "training": {"batch_size": 4, "lr": 1e-5, "epochs": 1},
        }
    )


def test_frozen_blocks_leave_the_gpu(folder: Path, f32: Device, seen: Seen) -> None:
    """While the whole model is needed they take their bytes; then these are free, and other users may have them."""
    loaded = load_model(folder, federation(folder), suffix=True, device=f32)
    away = absent(loaded.model)
    named = dict(loaded.model.named_parameters())
    size = sum(4 * named[name].numel() for name in away)
    assert size > 4 * len(range(BLOCKS[0])) * SHAPE.block_weights
    before = taken(f32)
    with loaded.weights.whole(loaded.model):
        within = taken(f32)
    after = taken(f32)
    seen.within(f"bytes that came, of {size:,}", abs(within[0] - before[0] - size) / size, ROUNDED)
    seen.within("bytes that did not go", abs(after[0] - before[0]) / size, ROUNDED)
    # What torch reserves it reserves in pieces of up to 20 MiB.
    seen.within(f"bytes still reserved, of {within[1]:,}", (after[1] - before[1]) / size, 0.1)


def test_what_is_given_back_is_no_longer_reserved(f32: Device, seen: Seen) -> None:
    """Memory of a tensor that is gone stays with torch until it is given back."""
    before = taken(f32)[1]
    tensor = torch.empty(100 * MIB, device=f32.at)
    del tensor
    assert taken(f32)[1] - before >= 400 * MIB
    f32.give_back()
    seen.within("MiB that stay", (taken(f32)[1] - before) / MIB, 0)


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("blocks", [BLOCKS, BLOCKS[-1:]], ids=len)
def test_depth_by_memory_is_on_the_safe_side(
    folder: Path, f32: Device, seen: Seen, blocks: tuple[int, ...], kept: bool
) -> None:
    """The most that training takes is no more than what `[layers] memory_mib` is compared with."""
    section = federation(folder)
    loaded, data = opened(folder, section, f32, kept=kept)
    estimate = measures(loaded, data, section)["memory_mib"](blocks)
    loaded = train_only(loaded, blocks)
    f32.give_back()
    torch.cuda.reset_peak_memory_stats(f32.at)
    train(loaded, version_zero(loaded), data, section.training, seed=0)
    most = torch.cuda.max_memory_allocated(f32.at) / MIB
    seen.within(f"most taken, {most:,.0f} MiB, of the estimate, {estimate:,.0f} MiB", most / estimate, 1.0)
    seen.note(f"torch reserved {taken(f32)[1] / MIB:,.0f} MiB")


def opened(folder: Path, section: FederationConfig, device: Device, *, kept: bool) -> tuple[LoadedModel, Dataset]:
    """The model and random tokens, as a worker has them before it measures."""
    loaded = load_model(folder, section, suffix=True, device=device)
    windows = make_windows(loaded, 16)
    batches = make_batches(
        windows, size=4, pad_id=loaded.pad_id, causal=True, per_token=loaded.task.head.per_token, seed=0
    )
    prepared = prepare(loaded, batches, InMemory(1 << 30) if kept else NOWHERE)
    assert prepared.cached == kept
    if not kept:
        loaded.weights.load(loaded.model, absent(loaded.model))
    return loaded, Dataset((), prepared, len(windows))


def taken(device: Device) -> tuple[int, int]:
    """Bytes of tensors on a GPU, and bytes that torch has reserved there."""
    torch.cuda.synchronize(device.at)
    return torch.cuda.memory_allocated(device.at), torch.cuda.memory_reserved(device.at)
