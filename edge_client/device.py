"""Where a model computes, and how precisely: decided here, and what has to be there is moved here.

Weights, gradients, the optimizer's moments and all that leaves a model are float32 everywhere. In `bf16` the products
of a forward pass, and so those of its backward pass, are taken in bfloat16 (autocast); the loss, the optimizer's steps
and the update are not. Batches and kept states lie in the host's memory or on its disk, and are moved as they come.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from shared.config import ComputeSection, Precision
from shared.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Device:
    """A processor or a GPU, and the precision of its products."""

    at: torch.device
    """With its number, when it is a GPU: torch takes `cuda` and `cuda:0` for two."""
    precision: Precision = "f32"

    @property
    def is_gpu(self) -> bool:
        """Whether it is a GPU, which has memory and a generator of its own."""
        return self.at.type == "cuda"

    @property
    def title(self) -> str:
        """What it is, for people."""
        return f"{self.at} ({torch.cuda.get_device_name(self.at)})" if self.is_gpu else str(self.at)

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the host there; as it is, where it is there already.

        Through pinned memory and without waiting: a GPU copies while it computes, in the order in which it is asked.
        """
        if tensor.device == self.at:
            return tensor
        return tensor.pin_memory().to(self.at, non_blocking=True)

    def hold(self, model: nn.Module) -> None:
        """Move a model there, but for what is not in memory; its parameters stay the same objects."""
        for tensor in (*model.parameters(), *model.buffers()):
            if not tensor.is_meta:
                tensor.data = tensor.data.to(self.at)

    def give_back(self) -> None:
        """Give a GPU's other users what was freed there, which torch would keep."""
        if self.is_gpu:
            torch.cuda.empty_cache()

    def computing(self) -> AbstractContextManager[object]:
        """While the block runs, products are taken in the precision; for forward passes alone."""
        if self.precision == "f32":
            return nullcontext()
        return torch.autocast(self.at.type, dtype=torch.bfloat16)

    @contextmanager
    def seeded(self, seed: int) -> Iterator[None]:
        """While the block runs, torch's own generators, there too, draw from `seed`; afterwards they are as before."""
        with torch.random.fork_rng(devices=[self.at] if self.is_gpu else []):
            torch.manual_seed(seed)
            yield


CPU = Device(torch.device("cpu"))


def find_device(section: ComputeSection) -> Device:
    """Return what a machine's file asks for; ConfigError when it is a GPU that torch does not find here."""
    name, there = section.device, torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and not there):
        return Device(torch.device("cpu"), section.precision)
    number = int(name.partition(":")[2]) if ":" in name else 0
    if number >= there:
        found = f"only {there} of CUDA" if there else "no GPU of CUDA"
        raise ConfigError(
            f'device = "{name}", and torch {torch.__version__} finds {found} here',
            hint='install the driver and a torch built for CUDA, or set it to "cpu" or "auto"',
        )
    return Device(torch.device("cuda", number), section.precision)
