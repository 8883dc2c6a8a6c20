"""Split learning, as a baseline: the client holds the lower part of the model, the server the upper part.

Gupta and Raskar, "Distributed learning of deep neural network over multiple agents", arXiv 1810.06060, algorithm 1,
with labels shared: for each batch the client sends what comes out of its part and the targets, the server computes the
loss and sends the gradient of that output back. Clients take turns; each begins with the weights of the one before it,
which travel through the server. All parameters are trained.

Counted is each of these messages, encoded and compressed into frames as an update is, with its packets' headers.
Activations go by the federation's codec up, gradients by its codec down (what a lossy one loses is lost to the
training too), weights as f32; targets take one byte a token, lengths two a window.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from edge_client.batches import Batch
from edge_client.data import load_notes
from edge_client.model import load_model, read_trainable, seal
from edge_client.statefile import write_tensors
from edge_client.trainer import EVALUATION_BATCH, Dataset, evaluate, make_dataset, round_seed
from mailboat.experiment.federation import Job, Outcome, Tell
from mailboat.experiment.packets import packet_bytes
from mailboat.experiment.results import Measures, Point
from mailboat.experiment.spec import SplitSection
from shared import codec, durable
from shared.config import FederationConfig
from shared.errors import ConfigError, RefusedError
from shared.messages import CHUNK_HEADER_BYTES
from shared.slices import make_transfer_frames
from shared.tensorfile import F32Array
from shared.topics import Channel

FINAL_RATE = 0.1
"""The learning rate falls linearly to this share of its peak over the whole run, as in any one training."""
CONNECTION = "hidden"
"""Name of the one tensor in a message about a batch."""


class Wire:
    """Counts what travels between clients and server, and hands on what the other end decodes."""

    def __init__(self, federation: FederationConfig) -> None:
        self._federation = federation
        self.up = self.down = 0

    def activations(self, site: str, values: F32Array, batch: Batch) -> F32Array:
        """From a client to the server, with the batch's targets."""
        beside = batch.targets.numel() + 2 * len(batch.windows)
        self.up += self._bytes(site, Channel.UP_DATA, {CONNECTION: values}, self._federation.codec.up) + beside
        return _decoded(values, self._federation.codec.up)

    def gradient(self, site: str, values: F32Array) -> F32Array:
        """From the server to a client."""
        self.down += self._bytes(site, Channel.DOWN_DATA, {CONNECTION: values}, self._federation.codec.down)
        return _decoded(values, self._federation.codec.down)

    def weights_down(self, site: str, tensors: Mapping[str, F32Array]) -> None:
        """The client's part, to the client whose turn it is."""
        self.down += self._bytes(site, Channel.DOWN_DATA, tensors, "f32")

    def weights_up(self, site: str, tensors: Mapping[str, F32Array]) -> None:
        """The client's part, from the client whose turn it was."""
        self.up += self._bytes(site, Channel.UP_DATA, tensors, "f32")

    def _bytes(self, site: str, channel: Channel, tensors: Mapping[str, F32Array], name: codec.Codec) -> int:
        frames = make_transfer_frames(tensors, name, {}, self._federation.codec.slice_kib * 1024)
        of = self._federation.federation.name
        return sum(packet_bytes(of, channel, site, CHUNK_HEADER_BYTES + len(frame.data)) for frame in frames)


def _decoded(values: F32Array, name: codec.Codec) -> F32Array:
    parts = [array for _, _, array in codec.encode(CONNECTION, values, name)]
    return codec.decode_tensor(parts, name, values.shape)


@dataclass(frozen=True, slots=True)
class Half:
    """One machine's part of the model, and its optimizer: a client's begins anew with its turn, the server's stays."""

    parameters: Sequence[nn.Parameter]
    optimizer: torch.optim.Optimizer

    def step(self, rate: float, max_grad_norm: float) -> None:
        """Take one step at this rate; each machine clips the norm of what it can see."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        norm = nn.utils.clip_grad_norm_(self.parameters, max_grad_norm)
        if not math.isfinite(norm.item()):
            raise RefusedError("split learning diverged", rule="diverged", hint="lower the family's rate")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def train(job: Job, section: SplitSection, tell: Tell) -> Outcome:
    """Train by turns, `federation.versions` rounds of `training.epochs` epochs, and score after each round.

    Raises ConfigError unless the plan is `all`, and what model, notes and training raise.
    """
    if job.federation.layers.plan != "all":
        raise ConfigError('split learning trains the whole model: layers.plan = "all"')
    return _Split(job, section, tell).run()


class _Split:
    def __init__(self, job: Job, section: SplitSection, tell: Tell) -> None:
        self.job = job
        self.tell = tell
        self.wire = Wire(job.federation)
        self.loaded = load_model(job.federation.model.base, job.federation)
        self.cut = max(1, round(section.cut * self.loaded.depth))
        self.notes = {name: self._dataset(path, job.federation.training.batch_size) for name, path in job.notes.items()}
        self.heldout = self._dataset(job.heldout, EVALUATION_BATCH)
        above = self._above()
        trainable = self.loaded.trainable
        self.lower = {name: value for name, value in trainable.items() if name not in above}
        self.server = self._half([trainable[name] for name in above])
        self.cpu_s: list[float] = []
        self.curve: list[Point] = []
        self.labels: dict[str, Measures] = {}
        self._done = 0
        epochs = job.federation.federation.versions * job.federation.training.epochs
        self._steps = epochs * sum(len(data.prepared.batches) for data in self.notes.values())

    def _dataset(self, path: Any, batch_size: int) -> Dataset:
        notes = load_notes(path, self.loaded.task).notes
        seed = self.job.federation.federation.seed
        return make_dataset(self.loaded, notes, batch_size=batch_size, seed=seed)

    def _above(self) -> set[str]:
        """Names of the server's parameters: the upper blocks, and what stands above them."""
        family = self.loaded.family
        prefixes = [family.block_prefix(index) for index in range(self.cut, self.loaded.depth)]
        prefixes += [f"{part}." for part in (*family.head_parts, family.final_norm or family.head) if part]
        return {name for name in self.loaded.trainable if name.startswith(tuple(prefixes))}

    def _half(self, parameters: Sequence[nn.Parameter]) -> Half:
        decay = self.job.federation.training.weight_decay
        groups = [
            {"params": [each for each in parameters if each.ndim > 1], "weight_decay": decay},
            {"params": [each for each in parameters if each.ndim <= 1], "weight_decay": 0.0},
        ]
        return Half(parameters, torch.optim.AdamW(groups, fused=True))

    def run(self) -> Outcome:
        """See `train`."""
        self._score(0)
        versions = self.job.federation.federation.versions
        for round_ in range(versions):
            for site, data in self.notes.items():
                began = time.process_time()
                self._turn(site, data, round_)
                self.cpu_s.append(time.process_time() - began)
                self.tell(self._done / self._steps, f"round {round_ + 1} of {versions}")
            self._score(round_ + 1)
        state = self.job.folder / "state.safetensors"
        durable.make_folder(self.job.folder)
        write_tensors(state, read_trainable(self.loaded))
        return Outcome(
            plan=seal(self.loaded, self.job.federation),
            curve=tuple(self.curve),
            labels=self.labels,
            state=state,
            train_cpu_s=tuple(self.cpu_s),
            metrics={},
            versions=versions,
            up=self.wire.up,
            down=self.wire.down,
        )

    def _turn(self, site: str, data: Dataset, round_: int) -> None:
        """One client's turn: it takes the lower part, trains it with the server, and gives it back."""
        federation = self.job.federation
        self.wire.weights_down(site, self._lower_values())
        client = self._half(list(self.lower.values()))
        seed = round_seed(federation.federation.seed, site, round_)
        order = np.random.default_rng(seed)
        self.loaded.model.train()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for _ in range(federation.training.epochs):
                for index in order.permutation(len(data.prepared.batches)):
                    self._step(site, data.prepared.batches[index], client)
        self.loaded.model.eval()
        self.wire.weights_up(site, self._lower_values())

    def _lower_values(self) -> dict[str, F32Array]:
        return {name: value.detach().numpy() for name, value in self.lower.items()}

    def _step(self, site: str, batch: Batch, client: Half) -> None:
        training = self.job.federation.training
        with self._parted(site, batch) as ends:
            options = {"use_cache": False} if self.loaded.family.causal else {}
            logits = self.loaded.model(input_ids=batch.ids, attention_mask=batch.mask, **options).logits
            self.loaded.task.loss(logits, batch.targets).backward()  # type: ignore[no-untyped-call]
        (sent, received) = ends
        assert received.grad is not None
        sent.backward(torch.from_numpy(self.wire.gradient(site, received.grad.numpy())))  # type: ignore[no-untyped-call]
        share = self._done / self._steps
        rising = training.warmup * self._steps
        rate = training.lr * min(1 - (1 - FINAL_RATE) * share, (self._done + 1) / max(1.0, rising))
        client.step(rate, training.max_grad_norm)
        self.server.step(rate, training.max_grad_norm)
        self._done += 1

    @contextmanager
    def _parted(self, site: str, batch: Batch) -> Iterator[list[torch.Tensor]]:
        """Cut the model in two below block `cut`; yields what the client sent and what the server received."""
        ends: list[torch.Tensor] = []

        def cross(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            sent = args[0]
            crossed = self.wire.activations(site, sent.detach().numpy(), batch)
            received = torch.from_numpy(crossed.copy()).requires_grad_()
            ends.extend((sent, received))
            return (received, *args[1:])

        blocks = self.loaded.model.get_submodule(self.loaded.family.blocks)
        hook = blocks[self.cut].register_forward_pre_hook(cross)
        try:
            yield ends
        finally:
            hook.remove()

    def _score(self, version: int) -> None:
        found = evaluate(self.loaded, self.heldout)
        self.labels = {label: dict(measures) for label, measures in found.labels.items()}
        point = Point(version=version, at_s=0.0, up=self.wire.up, down=self.wire.down, scores=dict(found.overall))
        self.curve.append(point)
