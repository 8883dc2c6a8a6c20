"""A pre-trained model's folder into tokenizer and model, with the seeded head that its checkpoint may lack."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME
from transformers.utils import logging as transformers_logging

from edge_client.layers import Family
from edge_client.tasks import Task
from edge_client.weights import Stored, Weights, read_checkpoint
from shared.errors import ConfigError


def load_tokenizer(folder: Path) -> Any:
    """Return the fast tokenizer in `folder`, which can pad; ConfigError says what is missing."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"{folder} has no tokenizer that can be loaded ({type(error).__name__})",
            hint="copy tokenizer.json and tokenizer_config.json along with the weights",
        ) from error
    if not tokenizer.is_fast:
        raise ConfigError(f"{folder} has only a slow tokenizer", hint="a tokenizer.json is needed to align words")
    if tokenizer.pad_token_id is None:
        # Padding is masked or never seen, so any known token serves; a new one would need a new row of the embeddings.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        raise ConfigError(f"{folder}: the tokenizer has no pad, eos or unk token", hint="give it one of them")
    return tokenizer


@dataclass(frozen=True, slots=True)
class Pretrained:
    """A model without its values: those of the checkpoint are to be loaded, the rest is as the library drew it."""

    model: Any
    weights: Weights
    lost: tuple[str, ...]
    """The parts of the head that are to be drawn anew: the checkpoint has none, or one for other classes."""


def open_pretrained(folder: Path, family: Family, task: Task[Any]) -> Pretrained:
    """Return the model in `folder` under the task's head, float32, before any of its tensors is read.

    Which tensor of the checkpoint belongs where is the library's to say: it is handed zeros that take no memory in
    their place, and they are known again by their address. ConfigError when weights are missing, or cannot be read.
    """
    classes, auto_class = task.classes, getattr(transformers, task.head.auto_class)
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    had = tuple(config.id2label.values()) if config.id2label else ()
    if not task.head.writes:
        config.id2label = dict(enumerate(classes))
        config.label2id = {name: index for index, name in enumerate(classes)}
    if task.head.problem_type is not None:
        config.problem_type = task.head.problem_type
    stored = read_checkpoint(folder)
    zeros = {name: torch.zeros(()).expand(each.spec.shape) for name, each in stored.items()}
    with torch.device("meta"):
        kind = type(auto_class.from_config(config))
    model, report = kind.from_pretrained(
        None,
        config=config,
        state_dict=zeros,
        dtype=torch.float32,
        generation_config=_generation(folder) if task.head.writes else None,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    model.config.name_or_path = str(folder)
    missing = sorted({*report["missing_keys"], *(entry[0] for entry in report["mismatched_keys"])})
    lacking = [name for name in missing if not family.is_head(name)]
    if lacking:
        raise ConfigError(
            f"{folder}: {len(lacking)} tensors of the model are missing or of another shape, {lacking[0]} first",
            hint="weights and config.json belong to different models, or the copy is incomplete",
        )
    # A head for other classes is drawn anew; a pooler knows no classes, and stays where the checkpoint has it.
    lost = [part for part in family.head_parts if any(name.startswith(f"{part}.") for name in missing)]
    if family.head and had != classes and family.head not in lost:
        lost.insert(0, family.head)
    return Pretrained(model, Weights(_placed(model, zeros, stored, missing, folder)), tuple(lost))


def _placed(
    model: nn.Module,
    zeros: Mapping[str, torch.Tensor],
    stored: Mapping[str, Stored],
    missing: Collection[str],
    folder: Path,
) -> dict[str, Stored]:
    """Where the values of each parameter lie, by its name in the model."""
    address = {zero.data_ptr(): name for name, zero in zeros.items()}
    found = {}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
        origin = address.get(tensor.data_ptr())
        if origin is not None and isinstance(tensor, nn.Parameter):
            found[name] = stored[origin]
        elif origin is not None or (isinstance(tensor, nn.Parameter) and name not in missing):
            raise ConfigError(
                f"{folder}: {name} is not in the checkpoint as the model holds it",
                hint="load it with transformers and write it again with save_pretrained",
            )
    return found


def _generation(folder: Path) -> GenerationConfig | None:
    """How the model writes, where its folder says so; None where it does not."""
    if not (folder / GENERATION_CONFIG_NAME).is_file():
        return None
    return GenerationConfig.from_pretrained(folder, local_files_only=True)


def seed_parts(model: nn.Module, parts: Sequence[str], spread: float, seed: int) -> None:
    """Draw the linear layers in `parts` as the library would, but from a generator of their own; biases are 0."""
    generator = torch.Generator().manual_seed(seed)
    linears = (module for part in parts for module in model.get_submodule(part).modules())
    with torch.no_grad():
        for linear in linears:
            if isinstance(linear, nn.Linear):
                linear.weight.normal_(0.0, spread, generator=generator)
                if linear.bias is not None:
                    linear.bias.zero_()


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from announcing a fresh head and from drawing progress bars; restores both."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
