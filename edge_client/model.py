"""The model at a site: loading, the seeded head, the frozen weights' hash, the trainable state, the export."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from torch import nn

from edge_client import adapters, layers
from edge_client.adapters import Residual
from edge_client.device import CPU, Device
from edge_client.layers import Family
from edge_client.pretrained import load_tokenizer, open_pretrained, quiet, seed_parts
from edge_client.source import local_folder, read_config
from edge_client.statefile import shapes_of
from edge_client.tasks import Task
from edge_client.tasks.encoding import TextEncoder
from edge_client.tasks.registry import load_task
from edge_client.weights import Weights, names_below
from shared.config import FederationConfig
from shared.errors import ConfigError, RefusedError, UnavailableError
from shared.plan import Blocks, SealedPlan

State = dict[str, npt.NDArray[np.float32]]
"""Tensors by name, float32, in the shapes of the model."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model with its head, ready to train the layers that the federation agreed on."""

    model: Any
    """The class of transformers that the task's head names, float32, in eval mode; only `trained` has gradients."""
    weights: Weights
    """The pre-trained tensors, also those that are not in memory."""
    tokenizer: Any
    task: Task[Any]
    encoder: TextEncoder
    family: Family
    depth: int
    layers: Blocks
    """Blocks that the federation trains."""
    here: Blocks
    """Those that are trained here; the others are frozen here, and change from version to version."""
    full: bool
    """True when embeddings are trained too, which the plan `all` means."""
    trainable: dict[str, nn.Parameter]
    """What is trained and travels, sorted by name: that of the model's parameter, or with adapters the one in adapter
    files."""
    personal: dict[str, nn.Parameter]
    """What is trained and stays at its site, likewise."""
    residuals: dict[str, Residual]
    """What a version holds besides, sorted by name: corrections of frozen weights, see `adapters`."""
    frozen_sha256: str
    pad_id: int
    max_length: int
    """Tokens of a window."""

    @property
    def architecture(self) -> str:
        """Name of the model's class."""
        return type(self.model).__name__

    @property
    def device(self) -> Device:
        """Where the model is, and computes."""
        return self.weights.device

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """All that is trained here, whether it travels or stays."""
        known = self.trainable | self.personal
        return {name: parameter for name, parameter in known.items() if parameter.requires_grad}

    @property
    def total_parameters(self) -> int:
        """Parameters of the whole model, the head included and adapters not."""
        named = self.model.named_parameters()
        return sum(parameter.numel() for name, parameter in named if not adapters.is_adapter(name))

    @property
    def trained_parameters(self) -> int:
        """Parameters that are trained and travel."""
        return sum(parameter.numel() for parameter in self.trainable.values())

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tensors of a version, sorted by name."""
        found = {name: tuple(parameter.shape) for name, parameter in self.trainable.items()}
        return dict(sorted((found | {name: residual.shape for name, residual in self.residuals.items()}).items()))

    def loss(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the task's loss of logits, computed where they are."""
        return self.task.loss(logits, self.device.take(targets))


def load_model(
    source: str | Path, federation: FederationConfig, *, suffix: bool = False, device: Device = CPU
) -> LoadedModel:
    """Load the base model `source` (a folder or a hub id) for `federation`, onto `device`.

    With `suffix` what lies below the trained blocks stays on the disk: `LoadedModel.weights` has it when it is needed.

    The head is drawn from the federation's seed, so that everybody has the same one; a checkpoint that already has a
    head for exactly these labels keeps it. Raises ConfigError for a model that cannot serve, naming what is missing or
    unknown; RefusedError(rule='frozen-weights') when the frozen weights are not the agreed ones; UnavailableError when
    the model cannot be fetched.
    """
    folder = local_folder(source, federation.model.revision)
    family = layers.family_of(read_config(folder)["model_type"], str(folder))
    task = load_task(federation.task)
    family = _for_head(family, task, federation, folder)
    # The library fills a missing head with random numbers before ours replaces them; the caller's generator stays put.
    with quiet(), torch.random.fork_rng(devices=[]):
        tokenizer = load_tokenizer(folder)
        pretrained = open_pretrained(folder, family, task)
    model, weights = pretrained.model, pretrained.weights
    if not task.head.per_token:
        # Decoders of this class read what a sequence amounts to at its last token that is not padding.
        model.config.pad_token_id = tokenizer.pad_token_id
    depth = layers.depth_of(dict(model.named_parameters()), family)
    section, seed = federation.layers, federation.federation.seed
    chosen = layers.resolve_plan(section.plan, depth, seed=seed, among=section.among)
    away = names_below(model, family, chosen[0]) if suffix and not layers.is_full(section.plan) else ()
    weights.load(model, weights.stored.keys() - set(away))
    weights.free(model, away)
    seed_parts(model, pretrained.lost, model.config.initializer_range, seed)
    with torch.random.fork_rng(devices=[]):
        trained = _choose(model, family, chosen, federation)
    residuals = adapters.residuals(model, federation.adapter)
    personal = _stay(trained, federation)
    _check_factors(residuals, personal)
    _check_length(federation.task.max_length, model.config, folder)
    loaded = LoadedModel(
        model=model.eval(),
        weights=weights,
        tokenizer=tokenizer,
        task=task,
        encoder=TextEncoder(tokenizer, max_length=federation.task.max_length, speaks_last=family.causal),
        family=family,
        depth=depth,
        layers=chosen,
        here=chosen,
        full=layers.is_full(federation.layers.plan) and not federation.adapter.used,
        trainable={name: parameter for name, parameter in trained.items() if name not in personal},
        personal={name: trained[name] for name in personal},
        residuals=residuals,
        frozen_sha256=frozen_sha256(model, family, weights),
        pad_id=tokenizer.pad_token_id,
        max_length=federation.task.max_length,
    )
    _check_frozen(loaded, federation, folder)
    # What is drawn is drawn by the processor, and what is hashed is hashed in its memory: the same everywhere.
    device.hold(model)
    return replace(loaded, weights=replace(weights, device=device))


def train_only(loaded: LoadedModel, blocks: Blocks) -> LoadedModel:
    """Return the same model with gradients in `blocks` alone of those that the federation trains, and above them."""
    known = loaded.trainable | loaded.personal
    names = _within(loaded, known, blocks)
    for name, parameter in known.items():
        parameter.requires_grad_(name in names)
    return replace(loaded, here=blocks)


def shapes_within(loaded: LoadedModel, blocks: Blocks) -> dict[str, tuple[int, ...]]:
    """Return name and shape of each tensor in an update of a site that trains `blocks` alone of the federation's."""
    return {name: tuple(loaded.trainable[name].shape) for name in _within(loaded, loaded.trainable, blocks)}


def frozen_sha256(model: nn.Module, family: Family, weights: Weights) -> str:
    """Return the SHA-256 over the frozen parameters, sorted by name; neither what is trained nor the head is in it.

    Of each: the name that it has without adapters, `F32`, its shape and its bytes (little endian, row major). When
    everything is trained, it is the hash of nothing. An adapter's part that stays as it was drawn is frozen too. What
    is not in memory is read from its file.
    """
    digest = hashlib.sha256()
    named = model.named_parameters()
    frozen = {adapters.plain(name): parameter for name, parameter in named if not parameter.requires_grad}
    for name, parameter in sorted(frozen.items()):
        if family.is_head(name):
            continue
        shape = ",".join(map(str, parameter.shape))
        digest.update(f"{name} F32 [{shape}]\n".encode())
        for values in weights.values(name) if parameter.is_meta else [parameter.detach().numpy()]:
            digest.update(np.ascontiguousarray(values).astype("<f4", copy=False).data)
    return digest.hexdigest()


def seal(loaded: LoadedModel, federation: FederationConfig) -> SealedPlan:
    """Return the federation's plan as it resolves against this model."""
    return SealedPlan(
        architecture=loaded.architecture,
        depth=loaded.depth,
        layers=loaded.layers,
        at_once=layers.trained_at_once(federation.layers.plan, loaded.depth, loaded.layers),
        tensors=loaded.shapes,
        residuals={name: residual.factors for name, residual in loaded.residuals.items()},
        personal={name: tuple(parameter.shape) for name, parameter in loaded.personal.items()},
        trained_parameters=loaded.trained_parameters,
        total_parameters=loaded.total_parameters,
        config_sha256=federation.config_sha256,
        frozen_sha256=loaded.frozen_sha256,
        tokenizer_sha256=tokenizer_sha256(loaded.tokenizer),
        labels=federation.task.labels,
    )


def tokenizer_sha256(tokenizer: Any) -> str:
    """SHA-256 of a fast tokenizer's whole definition (vocabulary, merges, normalisation), whatever file it came from.

    Padding and truncation are settings of the moment, not of the tokenizer, and stay out.
    """
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    definition.update(padding=None, truncation=None)
    return hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest()


def seal_plan(federation: FederationConfig, source: str | Path) -> tuple[SealedPlan, State]:
    """Return the sealed plan of `federation` over the model `source`, and the tensors of version 0."""
    loaded = load_model(source, federation, suffix=True)
    return seal(loaded, federation), version_zero(loaded)


def version_zero(loaded: LoadedModel) -> State:
    """Return the tensors that a federation over a model as it was loaded begins with, sorted by name."""
    zeros = {name: np.zeros(residual.shape, dtype=np.float32) for name, residual in loaded.residuals.items()}
    return dict(sorted((read_trainable(loaded) | zeros).items()))


def read_trainable(loaded: LoadedModel) -> State:
    """Return a copy of the tensors that are trained and travel, sorted by name."""
    return {name: parameter.detach().cpu().numpy().copy() for name, parameter in loaded.trainable.items()}


def read_personal(loaded: LoadedModel) -> State:
    """Return a copy of the tensors that are trained and stay, sorted by name."""
    return {name: parameter.detach().cpu().numpy().copy() for name, parameter in loaded.personal.items()}


def apply_state(loaded: LoadedModel, state: Mapping[str, npt.NDArray[np.float32]]) -> None:
    """Put `state`, the personal tensors with it, into the model.

    RefusedError(rule='state-shape') unless it holds exactly a version's tensors and those that stay.
    """
    stay = {name: tuple(parameter.shape) for name, parameter in loaded.personal.items()}
    shapes, found = loaded.shapes | stay, shapes_of(state)
    strange = sorted(set(found) ^ set(shapes))
    if strange:
        side = "lacks" if strange[0] in shapes else "has, and this model does not train,"
        raise RefusedError(f"the state {side} tensor {strange[0]}", rule="state-shape", hint=_OTHER_PLAN)
    for name, shape in shapes.items():
        if found[name] != shape:
            raise RefusedError(
                f"the state's tensor {name} has shape {list(found[name])}, not {list(shape)}",
                rule="state-shape",
                hint=_OTHER_PLAN,
            )
    with torch.no_grad():
        parameters = loaded.trainable | loaded.personal
        for name in shapes:
            values = torch.from_numpy(np.ascontiguousarray(state[name], dtype=np.float32))
            if name in loaded.residuals:
                loaded.residuals[name].apply(values)
            else:
                parameters[name].copy_(values)


def export(loaded: LoadedModel, out: Path) -> None:
    """Write model and tokenizer to the folder `out`, as `from_pretrained` of the head's class reads them.

    Adapters are folded into the weights. Raises UnavailableError when the folder cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with quiet(), loaded.weights.whole(loaded.model), adapters.folded(loaded.model):
            loaded.model.save_pretrained(out)
            loaded.tokenizer.save_pretrained(out)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else "the weights could not be written"
        raise UnavailableError(f"{out} cannot be written: {reason}", hint="check its owner and free space") from error


_OTHER_PLAN = "site and coordinator must share federation.toml and base model"


def _choose(
    model: nn.Module, family: Family, chosen: Sequence[int], federation: FederationConfig
) -> dict[str, nn.Parameter]:
    """Put adapters in where the federation wants them, freeze what is not trained, and return what is."""
    if federation.adapter.used:
        adapters.attach(model, family, chosen, federation.adapter, seed=federation.federation.seed)
        trainable = adapters.trained(model, family, federation.adapter)
    else:
        parameters = dict(model.named_parameters())
        names = layers.trainable_names(parameters, family, chosen, full=layers.is_full(federation.layers.plan))
        trainable = {name: parameters[name] for name in names}
    model.requires_grad_(False)
    for parameter in trainable.values():
        parameter.requires_grad_(True)
    return trainable


def _stay(trained: Iterable[str], federation: FederationConfig) -> tuple[str, ...]:
    """Those of the names of what is trained that stay at their site."""
    bare = _bare(trained)
    patterns = (*adapters.personal(federation.adapter), *federation.layers.personal)
    return tuple(bare[name] for name in layers.personal_names(tuple(bare), patterns))


def _within(loaded: LoadedModel, names: Iterable[str], blocks: Blocks) -> set[str]:
    """Those of the federation's tensors `names` that are trained where `blocks` alone of its blocks are."""
    bare = _bare(names)
    found = layers.names_within(bare, loaded.family, loaded.layers, blocks, full=loaded.full)
    return {bare[name] for name in found}


def _bare(names: Iterable[str]) -> dict[str, str]:
    """The same names without what peft puts before all of them, and what they were."""
    return {name.removeprefix(adapters.PREFIX): name for name in names}


def _check_factors(residuals: Mapping[str, Residual], personal: Sequence[str]) -> None:
    for residual in residuals.values():
        kept = set(residual.factors).intersection(personal)
        if kept:
            raise ConfigError(
                f"layers.personal keeps {min(kept)}, which adapter.kind = 'fedex-lora' needs from every site",
                hint="choose another kind of adapter, or other tensors",
            )


def _for_head(family: Family, task: Task[Any], federation: FederationConfig, folder: Path) -> Family:
    if task.head.writes:
        if not family.causal:
            raise ConfigError(
                f"task.kind = {federation.task.kind!r} has the model write text, which {folder} cannot",
                hint="choose a decoder such as LLaMA, or a task that classifies",
            )
        return family.for_text()
    return family if task.head.per_token else family.for_whole()


def _check_length(max_length: int, config: Any, folder: Path) -> None:
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and max_length > limit:
        raise ConfigError(
            f"task.max_length = {max_length}, but {folder} reads at most {limit} tokens",
            hint=f"lower task.max_length to {limit}",
        )


def _check_frozen(loaded: LoadedModel, federation: FederationConfig, folder: Path) -> None:
    agreed = federation.model.frozen_sha256
    if agreed is not None and agreed != loaded.frozen_sha256:
        raise RefusedError(
            f"{folder} has frozen weights {loaded.frozen_sha256[:12]}, the federation agreed on {agreed[:12]}",
            rule="frozen-weights",
            hint="copy the base model that the federation uses, or mend model.frozen_sha256",
        )
