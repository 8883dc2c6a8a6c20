"""What protects a record holds on a GPU: its gradient, the bound on what it adds, and the steps of DP-SGD."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from edge_client.device import CPU, Device
from edge_client.model import LoadedModel, State, load_model
from edge_client.prefix import forward_pass
from edge_client.privacy.descent import add_clipped, private_descent, record_gradient
from edge_client.privacy.ghost import add_clipped_together
from edge_client.privacy.ledger import Charge
from edge_client.privacy.records import make_records
from tests.gpu.seen import Seen
from tests.gpu.ways import LOSS_F32, UPDATE_F32, Site, distance, farthest, norm_of, on_host, trained, trained_of
from tests.unit.edge_client import tiny

FEDERATION = tiny.federation()
BOUND = 0.05
"""Less than the norm of any record's gradient here, so that each is clipped to it."""
GRADIENT, GRADIENT_BF16 = 1e-4, 0.05
"""L2 distance as a share of the norm; with another order of sums, on a processor, 3e-7."""
NORM = 1e-5
TYPES = ["bert", "gpt2", "llama"]


@pytest.mark.parametrize("model_type", TYPES)
def test_a_record_asks_for_the_same(folders: dict[str, Path], f32: Device, seen: Seen, model_type: str) -> None:
    """The gradient of each record and its loss are the processor's, within 0.01 %."""
    there, here = (gradients(load_model(folders[model_type], FEDERATION, device=device)) for device in (f32, CPU))
    seen.within("loss", farthest([loss for loss, _ in there], [loss for loss, _ in here]), GRADIENT)
    pairs = zip(there, here, strict=True)
    seen.within("gradient", max(distance(one, other) for (_, one), (_, other) in pairs), GRADIENT)


@pytest.mark.parametrize("precision", ["f32", "bf16"])
@pytest.mark.parametrize("model_type", TYPES)
def test_a_record_moves_the_sum_by_no_more_than_the_bound(
    folders: dict[str, Path], f32: Device, bf16: Device, seen: Seen, model_type: str, precision: str
) -> None:
    """Alone and together: what is added has the norm of the bound, and both ways agree, nearly so in bf16."""
    loaded = load_model(folders[model_type], FEDERATION, device=f32 if precision == "f32" else bf16)
    found = [(sums(loaded, [place], ghost=False), sums(loaded, [place], ghost=True)) for place in range(4)]
    seen.within("norm", farthest([norm_of(each.values()) for pair in found for each in pair], [BOUND] * 8), NORM)
    apart = max(distance(together, alone) for alone, together in found)
    seen.within("alone and together", apart, GRADIENT if precision == "f32" else GRADIENT_BF16)


@pytest.mark.parametrize("ghost", [False, True])
@pytest.mark.parametrize("model_type", TYPES)
def test_clipped_sums_are_the_processor_s(
    folders: dict[str, Path], f32: Device, seen: Seen, model_type: str, ghost: bool
) -> None:
    """Of four records, one after the other and in one pass, within 0.01 %."""
    there, here = (
        sums(load_model(folders[model_type], FEDERATION, device=device), range(4), ghost=ghost) for device in (f32, CPU)
    )
    seen.within("sum", distance(there, here), GRADIENT)


@pytest.mark.parametrize("together", [0, 1 << 20])
@pytest.mark.parametrize("model_type", TYPES)
def test_private_training_is_the_processor_s(
    folders: dict[str, Path], f32: Device, seen: Seen, model_type: str, together: int
) -> None:
    """With all records in each step and next to no noise, which no two trainings share: loss and update are near."""
    loaded = [load_model(folders[model_type], FEDERATION, device=device) for device in (f32, CPU)]
    there, here = (private(each, together) for each in loaded)
    seen.within("loss", farthest(there[0], here[0]), LOSS_F32)
    seen.within("update", distance(there[1], here[1]), UPDATE_F32)


def gradients(loaded: LoadedModel) -> list[tuple[float, State]]:
    """Loss and gradient of each record."""
    records = make_records(loaded, tiny.notes(4))
    with forward_pass(loaded, records.data.prepared) as forward:
        batches = [[records.data.prepared.batches[place] for place in span] for span in records.spans]
        asked = [record_gradient(loaded, forward, own) for own in batches]
    return [(each.loss, on_host(loaded, each.tensors)) for each in asked]


def sums(loaded: LoadedModel, chosen: range | list[int], *, ghost: bool) -> State:
    """What some records add, each clipped."""
    records = make_records(loaded, tiny.notes(4))
    found = {each: torch.zeros_like(each) for each in trained_of(loaded).values()}
    with forward_pass(loaded, records.data.prepared) as forward:
        batches = [[records.data.prepared.batches[place] for place in records.spans[record]] for record in chosen]
        if ghost:
            add_clipped_together(found, loaded, forward, [batch for (batch,) in batches], BOUND)
        else:
            for own in batches:
                add_clipped([*found.values()], record_gradient(loaded, forward, own), BOUND)
    return on_host(loaded, found.values())


def private(loaded: LoadedModel, together: int) -> tuple[list[float], State]:
    """Losses and update of eight private steps."""
    records = make_records(loaded, tiny.notes(4))
    charge = Charge(noise_multiplier=1e-10, sample_rate=1.0, steps=8)
    descent = private_descent(loaded, records, charge, BOUND, together=together)
    run = trained(Site(loaded, records.data, FEDERATION), descent=descent)
    return run.losses, run.delta
