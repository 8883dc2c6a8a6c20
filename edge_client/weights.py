"""The pre-trained tensors of a model: read from safetensors files when they are needed, and let go when they are not.

Training from kept hidden states (`edge_client.prefix`) needs neither the blocks below them nor the embeddings. What is
not in memory stands in the model as a parameter on torch's device `meta`, which has a shape and no values: whoever
computes with it gets an error, and never a wrong number. What is frozen is hashed all the same, from the files.
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from edge_client.device import CPU, Device
from edge_client.layers import Family
from shared.errors import ConfigError, RefusedError
from shared.tensorfile import NUMPY_DTYPES, F32Array, TensorSpec, bf16_to_f32, header_size, parse_header

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATS = frozenset({"F16", "BF16", "F32", "F64"})

BLOCK_VALUES = 1 << 20
"""Values read at a time: 4 MiB as float32, so that a tensor of gigabytes is hashed without being in memory."""


@dataclass(frozen=True, slots=True)
class Stored:
    """Where one tensor lies: its file, which must stay as it was found, and the offset of its bytes there."""

    path: Path
    found: tuple[int, int, int]
    """Inode, size and time of the last change."""
    offset: int
    spec: TensorSpec

    def values(self) -> Iterator[F32Array]:
        """Yield the tensor as float32, flat, BLOCK_VALUES at a time; ConfigError when the file cannot be read."""
        dtype = NUMPY_DTYPES[self.spec.dtype]
        with _reading(self.path), self.path.open("rb", buffering=0) as file:
            if _identity(file.fileno()) != self.found:
                raise ConfigError(f"{self.path} was changed while it was in use", hint="start again")
            left = (self.spec.end - self.spec.begin) // dtype.itemsize
            file.seek(self.offset + self.spec.begin)
            while left:
                block = np.empty(min(left, BLOCK_VALUES), dtype)
                _fill(file, block)
                yield bf16_to_f32(block) if self.spec.dtype == "BF16" else block.astype("<f4", copy=False)
                left -= block.size


@dataclass(frozen=True, slots=True)
class Weights:
    """The tensors of one model that come from its checkpoint, by the names that its parameters have there.

    Adapters do not change these names for what lies below the trained blocks, the only part that comes and goes.
    """

    stored: Mapping[str, Stored]
    device: Device = CPU
    """Where the model is."""

    def values(self, name: str) -> Iterator[F32Array]:
        """Yield a parameter's values from its file, as `Stored.values`."""
        return self.stored[name].values()

    def load(self, model: nn.Module, names: Iterable[str]) -> None:
        """Put the values of these parameters into `model`; those that are tied stay so."""
        known = dict(model.named_parameters(remove_duplicate=False))
        done: dict[int, nn.Parameter] = {}
        for name in names:
            old = known[name]
            if id(old) not in done:
                fresh = torch.empty(old.shape)
                flat, at = fresh.view(-1).numpy(), 0
                for block in self.values(name):
                    flat[at : at + block.size] = block
                    at += block.size
                done[id(old)] = nn.Parameter(fresh.to(self.device.at), requires_grad=False)
            _put(model, name, done[id(old)])

    def free(self, model: nn.Module, names: Collection[str]) -> None:
        """Take the values of these parameters out of memory."""
        if not names:
            return
        known = dict(model.named_parameters())
        for name in names:
            _put(model, name, nn.Parameter(torch.empty(known[name].shape, device="meta"), requires_grad=False))
        del known
        _give_back()
        self.device.give_back()

    @contextmanager
    def whole(self, model: nn.Module) -> Iterator[None]:
        """While the block runs all of the model is in memory; then what was not there before goes again."""
        away = absent(model)
        self.load(model, away)
        try:
            yield
        finally:
            self.free(model, away)


def absent(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the parameters that are not in memory."""
    return tuple(name for name, parameter in model.named_parameters() if parameter.is_meta)


def names_below(model: Any, family: Family, first: int) -> tuple[str, ...]:
    """Return the names of what only the blocks below `first` need: their parameters, and the input embeddings.

    Embeddings that the output layer shares are needed there, and not among them.
    """
    embeddings = model.get_input_embeddings().weight
    names = [name for name, each in model.named_parameters(remove_duplicate=False) if each is embeddings]
    prefixes = tuple(family.block_prefix(index) for index in range(first))
    below = [name for name, _ in model.named_parameters() if name.startswith(prefixes)]
    return tuple(below + names if len(names) == 1 else below)


def read_checkpoint(folder: Path) -> dict[str, Stored]:
    """Return where each floating-point tensor of the model in `folder` lies, by its name there.

    Raises ConfigError when the files cannot be read or are not what they should be. No tensor is read.
    """
    found: dict[str, Stored] = {}
    for path in _files(folder):
        with _reading(path), path.open("rb", buffering=0) as file:
            identity = _identity(file.fileno())
            size = header_size(file.read(8), identity[1])
            file.seek(0)
            header = parse_header(file.read(size), identity[1])
        found |= {spec.name: Stored(path, identity, header.size, spec) for spec in header.specs if spec.dtype in FLOATS}
    return found


def _files(folder: Path) -> Collection[Path]:
    """The files that transformers would read, in its order of preference."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    with _reading(folder / INDEX):
        index: Any = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        return sorted({folder / str(name) for name in index["weight_map"].values()})


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, RefusedError) as error:
        raise ConfigError(f"{path}: the weights cannot be read", hint="copy the model again") from error


def _identity(fd: int) -> tuple[int, int, int]:
    stat = os.fstat(fd)
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _fill(file: Any, block: np.ndarray[Any, Any]) -> None:
    rest = block.view(np.uint8).data
    while rest:
        count = file.readinto(rest)
        if not count:
            raise EOFError
        rest = rest[count:]


def _give_back() -> None:
    """Give the system what was freed, most of which glibc would keep."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _put(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, parameter)
