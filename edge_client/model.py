"""The model at a site: loading, the seeded head, the frozen weights' hash, the trainable state, the export."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import logging as transformers_logging

from edge_client import adapters, layers
from edge_client.adapters import Residual
from edge_client.layers import Family
from edge_client.source import local_folder, read_config
from edge_client.tasks import Task
from edge_client.tasks.encoding import TextEncoder
from edge_client.tasks.registry import load_task
from shared.config import FederationConfig
from shared.errors import ConfigError, RefusedError, UnavailableError
from shared.plan import SealedPlan

State = dict[str, npt.NDArray[np.float32]]
"""Trainable tensors by name, float32, in the shapes of the model."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model with its head, ready to train the layers that the federation agreed on."""

    model: Any
    """The class of transformers that the task's head names, float32, in eval mode; only `trainable` has gradients."""
    tokenizer: Any
    task: Task[Any]
    encoder: TextEncoder
    family: Family
    depth: int
    layers: tuple[int, ...]
    full: bool
    """True when embeddings are trained too, which the plan `all` means."""
    trainable: dict[str, nn.Parameter]
    """Sorted by name: that of the model's parameter, or with adapters the one in adapter files."""
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


def load_model(source: str | Path, federation: FederationConfig) -> LoadedModel:
    """Load the base model `source` (a folder or a hub id) for `federation`.

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
    with _quiet(), torch.random.fork_rng(devices=[]):
        tokenizer = _load_tokenizer(folder)
        model = _load_weights(folder, family, task, federation.federation.seed)
    if not task.head.per_token:
        # Decoders of this class read what a sequence amounts to at its last token that is not padding.
        model.config.pad_token_id = tokenizer.pad_token_id
    depth = layers.depth_of(dict(model.named_parameters()), family)
    chosen = layers.resolve_plan(federation.layers.plan, depth)
    with torch.random.fork_rng(devices=[]):
        trainable = _choose(model, family, chosen, federation)
    _check_length(federation.task.max_length, model.config, folder)
    loaded = LoadedModel(
        model=model.eval(),
        tokenizer=tokenizer,
        task=task,
        encoder=TextEncoder(tokenizer, max_length=federation.task.max_length, speaks_last=family.causal),
        family=family,
        depth=depth,
        layers=chosen,
        full=layers.is_full(federation.layers.plan) and not federation.adapter.used,
        trainable=trainable,
        residuals=adapters.residuals(model, federation.adapter),
        frozen_sha256=frozen_sha256(model, family),
        pad_id=tokenizer.pad_token_id,
        max_length=federation.task.max_length,
    )
    _check_frozen(loaded, federation, folder)
    return loaded


def frozen_sha256(model: nn.Module, family: Family) -> str:
    """Return the SHA-256 over the frozen parameters, sorted by name; neither what is trained nor the head is in it.

    Of each: the name that it has without adapters, `F32`, its shape and its bytes (little endian, row major). When
    everything is trained, it is the hash of nothing. An adapter's part that stays as it was drawn is frozen too.
    """
    digest = hashlib.sha256()
    named = model.named_parameters()
    frozen = {adapters.plain(name): parameter for name, parameter in named if not parameter.requires_grad}
    for name, parameter in sorted(frozen.items()):
        if family.is_head(name):
            continue
        array = parameter.detach().numpy()
        shape = ",".join(map(str, array.shape))
        digest.update(f"{name} F32 [{shape}]\n".encode())
        digest.update(np.ascontiguousarray(array).astype("<f4", copy=False).data)
    return digest.hexdigest()


def seal(loaded: LoadedModel, federation: FederationConfig) -> SealedPlan:
    """Return the federation's plan as it resolves against this model."""
    return SealedPlan(
        architecture=loaded.architecture,
        depth=loaded.depth,
        layers=loaded.layers,
        tensors=loaded.shapes,
        residuals={name: residual.factors for name, residual in loaded.residuals.items()},
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
    loaded = load_model(source, federation)
    return seal(loaded, federation), version_zero(loaded)


def version_zero(loaded: LoadedModel) -> State:
    """Return the tensors that a federation over a model as it was loaded begins with, sorted by name."""
    zeros = {name: np.zeros(residual.shape, dtype=np.float32) for name, residual in loaded.residuals.items()}
    return dict(sorted((read_trainable(loaded) | zeros).items()))


def read_trainable(loaded: LoadedModel) -> State:
    """Return a copy of the trainable tensors, sorted by name."""
    return {name: parameter.detach().numpy().copy() for name, parameter in loaded.trainable.items()}


def apply_state(loaded: LoadedModel, state: Mapping[str, npt.NDArray[np.float32]]) -> None:
    """Put `state` into the model; RefusedError(rule='state-shape') unless it holds exactly a version's tensors."""
    shapes = loaded.shapes
    strange = sorted(set(state) ^ set(shapes))
    if strange:
        side = "lacks" if strange[0] in shapes else "has, and this model does not train,"
        raise RefusedError(f"the state {side} tensor {strange[0]}", rule="state-shape", hint=_OTHER_PLAN)
    for name, shape in shapes.items():
        if state[name].shape != shape:
            raise RefusedError(
                f"the state's tensor {name} has shape {list(state[name].shape)}, not {list(shape)}",
                rule="state-shape",
                hint=_OTHER_PLAN,
            )
    with torch.no_grad():
        for name in shapes:
            values = torch.from_numpy(np.ascontiguousarray(state[name], dtype=np.float32))
            if name in loaded.residuals:
                loaded.residuals[name].apply(values)
            else:
                loaded.trainable[name].copy_(values)


def export(loaded: LoadedModel, out: Path) -> None:
    """Write model and tokenizer to the folder `out`, as `from_pretrained` of the head's class reads them.

    Adapters are folded into the weights. Raises UnavailableError when the folder cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with _quiet(), adapters.folded(loaded.model):
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


def _for_head(family: Family, task: Task[Any], federation: FederationConfig, folder: Path) -> Family:
    if task.head.writes:
        if not family.causal:
            raise ConfigError(
                f"task.kind = {federation.task.kind!r} has the model write text, which {folder} cannot",
                hint="choose a decoder such as LLaMA, or a task that classifies",
            )
        return family.for_text()
    return family if task.head.per_token else family.for_whole()


def _load_tokenizer(folder: Path) -> Any:
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


def _load_weights(folder: Path, family: Family, task: Task[Any], seed: int) -> Any:
    classes, auto_class = task.classes, getattr(transformers, task.head.auto_class)
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    had = tuple(config.id2label.values()) if config.id2label else ()
    if not task.head.writes:
        config.id2label = dict(enumerate(classes))
        config.label2id = {name: index for index, name in enumerate(classes)}
    if task.head.problem_type is not None:
        config.problem_type = task.head.problem_type
    try:
        model, report = auto_class.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{folder}: the weights cannot be read", hint="copy the model again") from error
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
    _seed_parts(model, lost, model.config.initializer_range, seed)
    return model


def _seed_parts(model: nn.Module, parts: Sequence[str], spread: float, seed: int) -> None:
    """Draw the linear layers in `parts` as the library would, but from a generator of their own; biases are 0."""
    generator = torch.Generator().manual_seed(seed)
    linears = (module for part in parts for module in model.get_submodule(part).modules())
    with torch.no_grad():
        for linear in linears:
            if isinstance(linear, nn.Linear):
                linear.weight.normal_(0.0, spread, generator=generator)
                if linear.bias is not None:
                    linear.bias.zero_()


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


@contextmanager
def _quiet() -> Iterator[None]:
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
