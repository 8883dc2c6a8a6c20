"""What a GPU trains is what the processor trains, but for rounding; with kept states, in bf16, and the second time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from edge_client.device import CPU, Device
from edge_client.model import read_trainable
from edge_client.prefix_store import NOWHERE, InMemory, Keep, OnDisk
from tests.gpu.seen import Seen
from tests.gpu.ways import LOSS_F32, UPDATE_F32, batch_losses, distance, farthest, open_site, trained
from tests.unit.edge_client import tiny

FEDERATION = tiny.federation()
LORA = tiny.federation(adapter={"kind": "lora", "rank": 2, "alpha": 4})

LOSS_BF16 = 0.02
"""As is held on the processor, see tests/unit/edge_client/test_device.py."""
AGAIN_F32, AGAIN_BF16 = 1e-4, 5e-3
"""The same training once more: kernels may add up in another order each time, which bfloat16 may round apart."""


@pytest.mark.parametrize("adapter", ["none", "lora"])
@pytest.mark.parametrize("model_type", tiny.MODEL_TYPES)
def test_f32_trains_as_the_processor(
    folders: dict[str, Path], f32: Device, seen: Seen, model_type: str, adapter: str
) -> None:
    """Each step's loss over three epochs is the processor's within 0.01 %, and the update is near the processor's."""
    federation = LORA if adapter == "lora" else FEDERATION
    there, here = (trained(open_site(folders[model_type], federation, device)) for device in (f32, CPU))
    seen.within("loss", farthest(there.losses, here.losses), LOSS_F32)
    seen.within("update", distance(there.delta, here.delta), UPDATE_F32)
    assert np.mean(there.losses[-3:]) < 0.9 * np.mean(there.losses[:3])


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("precision", ["f32", "bf16"])
@pytest.mark.parametrize("model_type", tiny.MODEL_TYPES)
def test_kept_states_change_nothing(
    folders: dict[str, Path],
    tmp_path: Path,
    f32: Device,
    bf16: Device,
    seen: Seen,
    model_type: str,
    precision: str,
    where: str,
) -> None:
    """Losses from kept states and through the whole model are equal to the bit, before anything is trained.

    Steps that follow are equal as far as the same training is equal to itself, see below.
    """
    device, allowed = (f32, AGAIN_F32) if precision == "f32" else (bf16, AGAIN_BF16)
    disk = OnDisk(tmp_path, "training", dtype="f32", limit=1 << 30, keep_free=0)
    keep: Keep = disk if where == "disk" else InMemory(1 << 20)
    kept, plain = (open_site(folders[model_type], FEDERATION, device, each) for each in (keep, NOWHERE))
    assert (kept.data.prepared.reason, plain.data.prepared.cached) == ("", False)
    assert batch_losses(kept) == batch_losses(plain)
    one, other = trained(kept), trained(plain)
    seen.note(f"steps bit for bit: {'yes' if one.losses == other.losses else 'no'}")
    seen.within("loss", farthest(one.losses, other.losses), allowed)


@pytest.mark.parametrize("model_type", tiny.MODEL_TYPES)
def test_bf16_trains_nearly_alike(
    folders: dict[str, Path], f32: Device, bf16: Device, seen: Seen, model_type: str
) -> None:
    """Each step's loss is within 2 % of float32's and not equal to it, and the update is float32."""
    rough, fine = (trained(open_site(folders[model_type], FEDERATION, device)) for device in (bf16, f32))
    seen.within("loss", farthest(rough.losses, fine.losses), LOSS_BF16)
    seen.note(f"update: {distance(rough.delta, fine.delta):.2e}")
    assert rough.losses != fine.losses
    assert {values.dtype for values in rough.delta.values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "llama"])
def test_a_seed_gives_the_same_training(tmp_path: Path, f32: Device, seen: Seen, model_type: str) -> None:
    """Dropout draws from the seed, whatever was drawn on the device before; another seed drops something else."""
    site = open_site(tiny.save_model(tmp_path / "model", model_type), FEDERATION, f32)
    state = read_trainable(site.loaded)
    first = trained(site, state=state)
    torch.rand(7, device=f32.at)
    again, other = trained(site, state=state), trained(site, state=state, seed=2)
    seen.note(f"bit for bit: {'yes' if first.losses == again.losses else 'no'}")
    seen.within("loss", farthest(again.losses, first.losses), AGAIN_F32)
    assert farthest(sorted(other.losses), sorted(first.losses)) > 10 * AGAIN_F32


def test_generators_are_given_back(folders: dict[str, Path], f32: Device) -> None:
    """Those of the processor and of the GPU are after a seeded block, and after a training, what they were before."""
    site, before = open_site(folders["bert"], FEDERATION, f32), generators(f32)
    with f32.seeded(3):
        drawn = torch.rand(4, device=f32.at)
        assert generators(f32) != before
    assert generators(f32) == before
    trained(site)
    assert generators(f32) == before
    with f32.seeded(3):
        assert torch.equal(torch.rand(4, device=f32.at), drawn)


def generators(device: Device) -> list[bytes]:
    """The state of each generator that torch draws from here."""
    states = [torch.get_rng_state()]
    if device.is_gpu:
        states.append(torch.cuda.get_rng_state(device.at))
    return [state.numpy().tobytes() for state in states]
