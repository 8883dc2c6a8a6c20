"""The same training here and there, and how far what comes out is apart."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from edge_client.device import Device
from edge_client.model import LoadedModel, State, load_model, read_trainable
from edge_client.prefix import MEMORY, forward_pass
from edge_client.prefix_store import Keep
from edge_client.trainer import Dataset, Descent, make_dataset, train
from shared.config import FederationConfig
from tests.unit.edge_client import tiny

EPOCHS, NOTES = 3, 6

LOSS_F32 = 1e-4
"""Of each step, as a share of the processor's. Products in bfloat16 are further away; another order of sums, on a
processor, is 2e-7."""
UPDATE_F32 = 5e-3
"""L2 distance as a share of the processor's norm: AdamW follows a gradient's sign, also where it nearly is 0. In
bfloat16 it is about 1e-2 and more; with another order of sums, on a processor, 3e-6, of private steps 3e-5."""


@dataclass(frozen=True, slots=True)
class Site:
    """A model on a device, and a site's notes."""

    loaded: LoadedModel = field(repr=False)
    data: Dataset = field(repr=False)
    federation: FederationConfig


@dataclass(frozen=True, slots=True)
class Run:
    """Each step's loss, and the update."""

    losses: list[float]
    delta: State = field(repr=False)


def open_site(folder: Path, federation: FederationConfig, device: Device, keep: Keep = MEMORY) -> Site:
    """A tiny model on a device, with notes in batches."""
    loaded = load_model(folder, federation, device=device)
    assert {parameter.device for parameter in loaded.model.parameters()} == {device.at}
    return Site(loaded, make_dataset(loaded, tiny.notes(NOTES), batch_size=4, seed=3, keep=keep), federation)


def trained(site: Site, *, seed: int = 1, descent: Descent | None = None, state: State | None = None) -> Run:
    """Train a few epochs from a state, or from the model as it is."""
    losses: list[float] = []
    section = site.federation.training.model_copy(update={"epochs": EPOCHS})
    result = train(
        site.loaded,
        read_trainable(site.loaded) if state is None else state,
        site.data,
        section,
        seed=seed,
        descent=descent,
        progress=lambda _share, loss: losses.append(loss),
    )
    assert len(losses) == result.metrics["steps"] >= EPOCHS
    return Run(losses, result.delta)


@torch.no_grad()
def batch_losses(site: Site) -> list[float]:
    """The loss of each batch, of the model as it is."""
    loaded, prepared = site.loaded, site.data.prepared
    with forward_pass(loaded, prepared) as forward:
        return [loaded.loss(forward(batch), batch.targets).item() for batch in prepared.batches]


def farthest(found: Iterable[float], expected: Iterable[float]) -> float:
    """The largest difference of two numbers that belong together, as a share of the expected one."""
    return max(abs(one - other) / abs(other) for one, other in zip(found, expected, strict=True))


def distance(found: State, expected: State) -> float:
    """L2 norm of the difference over that of what is expected, over all tensors but for keys' biases.

    A key's bias adds the same to all scores of a query, which softmax takes off again: its gradient is 0 but for
    rounding, and AdamW takes whole steps along its sign. In BERT and GPT-2, that is: rotated keys differ by position.
    """
    assert found.keys() == expected.keys()
    apart = [_weighty(name, found[name].astype(np.float64) - expected[name]) for name in expected]
    return norm_of(apart) / norm_of(_weighty(name, values) for name, values in expected.items())


def _weighty(name: str, values: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
    """The part of a tensor that a loss follows."""
    if name.endswith("attention.self.key.bias"):
        return values[:0]
    if name.endswith("attn.c_attn.bias"):
        query, _, value = np.split(values, 3)
        return np.concatenate([query, value])
    return values


def norm_of(tensors: Iterable[npt.NDArray[np.floating]]) -> float:
    """L2 norm over all tensors, in double precision."""
    return math.sqrt(sum(float(np.square(values, dtype=np.float64).sum()) for values in tensors))


def trained_of(loaded: LoadedModel) -> dict[str, torch.nn.Parameter]:
    """Parameters by name, in the order in which a record's gradient has them."""
    return {name: each for name, each in sorted(loaded.model.named_parameters()) if each.requires_grad}


def on_host(loaded: LoadedModel, tensors: Iterable[torch.Tensor]) -> State:
    """What belongs to each trained parameter, by its name, in the host's memory."""
    return {name: tensor.cpu().numpy() for name, tensor in zip(trained_of(loaded), tensors, strict=True)}


def without_dropout(folder: Path) -> Path:
    """The model in a folder, changed to drop nothing."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    kept = {key: 0.0 for key in (*config, "classifier_dropout") if "drop" in key}
    path.write_text(json.dumps(config | kept))
    return folder
