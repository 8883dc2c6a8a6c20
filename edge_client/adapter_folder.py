"""A version's adapters as a folder that peft reads: adapter_config.json, adapter_model.safetensors, the tokenizer.

`PeftModel.from_pretrained` puts it onto the base model; `read_adapters` does the same here.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, TaskType
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from edge_client import adapters
from edge_client.model import LoadedModel
from edge_client.tasks import Head
from shared.config import ModelSection
from shared.errors import ConfigError, UnavailableError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_MEANING = ("peft_type", "r", "lora_alpha", "use_rslora", "target_modules", "layers_to_transform")
"""Entries of adapter_config.json that decide what the tensors compute."""


def write_adapters(loaded: LoadedModel, base: ModelSection, out: Path) -> None:
    """Write adapters, head and tokenizer of a model with adapters to the folder `out`.

    ConfigError when frozen weights have been corrected, which no adapter of this rank can hold; UnavailableError when
    the folder cannot be written.
    """
    if loaded.residuals:
        raise ConfigError(
            'under kind = "fedex-lora" a version is more than its adapters: it corrects frozen weights too',
            hint="write the whole model: --merged",
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / CONFIG).write_text(json.dumps(_config(loaded, base), indent=2, sort_keys=True) + "\n", encoding="utf-8")
        save_file({name: values.contiguous() for name, values in _contents(loaded).items()}, out / WEIGHTS, _METADATA)
        loaded.tokenizer.save_pretrained(out)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else "the weights could not be written"
        raise UnavailableError(f"{out} cannot be written: {reason}", hint="check its owner and free space") from error


def read_adapters(loaded: LoadedModel, folder: Path) -> None:
    """Put the adapters and the head in `folder` into a model with adapters of the same make.

    ConfigError when the folder's are of another make, naming the first difference, or cannot be read.
    """
    try:
        said = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"the adapters in {folder} cannot be read", hint="copy the folder again") from error
    ours = _config(loaded, ModelSection(base=""))
    for key in _MEANING:
        if said.get(key) != ours[key]:
            raise ConfigError(
                f"{folder / CONFIG} has {key} = {said.get(key)}, the federation means {ours[key]}", hint=_OTHER
            )
    contents = _contents(loaded)
    for name in sorted(tensors.keys() | contents.keys()):
        here, there = (tuple(found[name].shape) if name in found else None for found in (contents, tensors))
        if here != there:
            raise ConfigError(f"{folder / WEIGHTS}: {name} has shape {there}, this model wants {here}", hint=_OTHER)
    with torch.no_grad():
        for name, values in contents.items():
            values.copy_(tensors[name])


_METADATA = {"format": "pt"}
_OTHER = "take [adapter], [layers] and [task] of the federation that the adapters come from"


def _contents(loaded: LoadedModel) -> dict[str, torch.Tensor]:
    """All tensors of an adapter file by name, those that stay as they were drawn too."""
    return {
        adapters.published(name): parameter.detach()
        for name, parameter in loaded.model.named_parameters()
        if adapters.is_adapter(name) or loaded.family.is_head(name)
    }


def _config(loaded: LoadedModel, base: ModelSection) -> dict[str, Any]:
    """What adapter_config.json says; lists are sorted, so that equal adapters have equal files."""
    injected: LoraConfig = loaded.model.peft_config[adapters.ADAPTER]
    config = dataclasses.replace(
        injected,
        base_model_name_or_path=base.base,
        revision=base.revision,
        task_type=_task_type(loaded.task.head),
        modules_to_save=list(loaded.family.head_parts) or None,
        inference_mode=True,
    )
    values: dict[str, Any] = config.to_dict()  # type: ignore[no-untyped-call]
    return {key: sorted(value) if isinstance(value, set) else value for key, value in values.items()}


def _task_type(head: Head) -> TaskType:
    if head.writes:
        return TaskType.CAUSAL_LM
    return TaskType.TOKEN_CLS if head.per_token else TaskType.SEQ_CLS
