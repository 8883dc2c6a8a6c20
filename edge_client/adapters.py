"""Low-rank adapters (LoRA: Hu et al., arXiv 2106.09685), put into the blocks of the layer plan through peft.

The model stays a class of transformers: in each chosen block, each targeted linear layer W becomes one that computes
W x + scale B A x. What is trained travels under the names that peft writes into adapter files, so that a state of A's
and B's is the content of one.

A is drawn as peft draws it, but from the federation's seed, and B is 0: everybody has the same version 0, and it
computes what the base model does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from edge_client.layers import Family
from shared.config import AdapterSection
from shared.errors import ConfigError

ADAPTER = "default"
"""What peft calls a model's only adapter; it is part of its parameters' names, and not of those in files."""

PREFIX = "base_model.model."
"""The start of all names in an adapter file: the model as an attribute of peft's own class around it."""


@dataclass(frozen=True, slots=True)
class Residual:
    """A frozen weight to which every version adds a matrix that the coordinator made, float32 of shape (out, in)."""

    weight: nn.Parameter
    base: torch.Tensor
    """The weight as the base model has it, in the host's memory."""
    factors: tuple[str, str]
    """Names of the adapter's A (rank, in) and B (out, rank)."""
    across: bool
    """True where the model stores the weight as (in, out)."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in)."""
        return tuple(self.base.T.shape if self.across else self.base.shape)

    @torch.no_grad()
    def apply(self, values: torch.Tensor) -> None:
        """Put the base model's weight plus `values` into the model."""
        self.weight.copy_(self.base + (values.T if self.across else values))


def attach(model: Any, family: Family, blocks: Sequence[int], section: AdapterSection, *, seed: int) -> None:
    """Put adapters into the `blocks` of `model`, in place; ConfigError for a target that a block does not have."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=section.rank,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        use_rslora=section.rank_stabilized,
        target_modules=list(targets(family, section)),
        layers_to_transform=list(blocks),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    inject_adapter_in_model(config, model, ADAPTER)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if ".lora_A." in name:
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5), generator=generator)


def targets(family: Family, section: AdapterSection) -> tuple[str, ...]:
    """Return the linear layers of a block that get an adapter, as paths below the block; ConfigError as `attach`."""
    if not section.targets:
        return family.linears
    for target in section.targets:
        if not any(_is_at(path, target) for path in family.linears):
            raise ConfigError(
                f"adapter.targets names {target}, which no block of this model has",
                hint=f"its linear layers are {', '.join(family.linears)}",
            )
    return tuple(path for path in family.linears if any(_is_at(path, target) for target in section.targets))


def trained(model: nn.Module, family: Family, section: AdapterSection) -> dict[str, nn.Parameter]:
    """Return what is trained, by the name it has in an adapter file, sorted: A's, B's and the task's head."""
    parts = (".lora_B.",) if section.kind == "ffa-lora" else (".lora_A.", ".lora_B.")
    chosen = {
        published(name): parameter
        for name, parameter in model.named_parameters()
        if any(part in name for part in parts) or family.is_head(name)
    }
    return dict(sorted(chosen.items()))


def personal(section: AdapterSection) -> tuple[str, ...]:
    """Return patterns of the names that stay at their site: in fedsa-lora those of every B."""
    return ("*.lora_B.weight",) if section.kind == "fedsa-lora" else ()


def residuals(model: nn.Module, section: AdapterSection) -> dict[str, Residual]:
    """Return the weights that the coordinator corrects, by the name of the correction, sorted; none but in fedex-lora.

    Their present values are kept: twice the memory of what has an adapter.
    """
    if section.kind != "fedex-lora":
        return {}
    found = {}
    for path, layer in _lora_layers(model):
        name, weight = published(path), layer.base_layer.weight
        factors = (f"{name}.lora_A.weight", f"{name}.lora_B.weight")
        found[f"{name}.residual"] = Residual(
            weight, weight.detach().clone(), factors, across=isinstance(layer.base_layer, Conv1D)
        )
    return dict(sorted(found.items()))


def published(name: str) -> str:
    """Return the name in an adapter file of a parameter or module of the model with adapters."""
    return PREFIX + name.replace(f".{ADAPTER}.weight", ".weight")


def plain(name: str) -> str:
    """Return the name that a parameter had before adapters were put in; one of an adapter loses peft's part alone."""
    return name.replace(".base_layer.", ".").replace(f".{ADAPTER}.weight", ".weight")


def is_adapter(name: str) -> bool:
    """True for the name of an A or a B."""
    return ".lora_A." in name or ".lora_B." in name


@contextmanager
def folded(model: nn.Module) -> Iterator[None]:
    """While the block runs, the model is one without adapters, whose weights are W + scale B A; then as it was.

    Nothing changes in a model that has none.
    """
    away: list[tuple[str, Any, torch.Tensor]] = []
    try:
        for path, layer in _lora_layers(model):
            weight = layer.base_layer.weight
            away.append((path, layer, weight.data))
            weight.data = weight.data + layer.get_delta_weight(ADAPTER).detach()
            model.set_submodule(path, layer.base_layer)
        yield
    finally:
        for path, layer, data in away:
            layer.base_layer.weight.data = data
            model.set_submodule(path, layer)


def _lora_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """The layers that have an adapter, and their paths."""
    return [(path, module) for path, module in model.named_modules() if hasattr(module, "lora_A")]


def _is_at(path: str, target: str) -> bool:
    """Whether peft takes the layer at `path` for `target`: its last parts are the target's."""
    return path == target or path.endswith(f".{target}")
