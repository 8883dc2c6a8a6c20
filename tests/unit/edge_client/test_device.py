"""One place decides where a model computes, and everything that enters it has been moved there."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from edge_client.device import CPU, Device, find_device
from edge_client.importance import measure
from edge_client.model import LoadedModel, load_model, read_trainable
from edge_client.prefix import forward_pass
from edge_client.prefix_store import NOWHERE, InMemory
from edge_client.privacy.descent import add_clipped, private_descent, record_gradient
from edge_client.privacy.ghost import add_clipped_together
from edge_client.privacy.ledger import Charge
from edge_client.privacy.records import make_records
from edge_client.trainer import _batch_by_batch as batch_by_batch
from edge_client.trainer import evaluate, make_dataset, mean_loss, train
from edge_client.weights import absent
from shared.config import ComputeSection
from shared.errors import ConfigError
from tests.unit.edge_client import tiny

pytestmark = pytest.mark.slow

FEDERATION = tiny.federation()
GPU = torch.device("cpu", 1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with a tiny model of each type."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("models")
    return {model_type: tiny.save_model(root / model_type, model_type) for model_type in tiny.MODEL_TYPES}


@dataclass(frozen=True, slots=True)
class Counterfeit(Device):
    """A GPU in name: its tensors have shape, type and device, no values, and torch refuses to mix them with others'."""

    mode: FakeTensorMode = field(default_factory=lambda: FakeTensorMode(allow_non_fake_inputs=True))

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        """As on a GPU, which would have pinned memory."""
        return (tensor if isinstance(tensor, FakeTensor) else self.mode.from_tensor(tensor)).to(GPU)

    def hold(self, model: nn.Module) -> None:
        """As on a GPU, but for the parameters' identity."""
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                moved = nn.Parameter(self.take(parameter.detach()), requires_grad=parameter.requires_grad)
                setattr(module, name, moved)
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, self.take(buffer))


@contextmanager
def on_counterfeit(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoadedModel]:
    """The model on a GPU in name alone, where each number that is asked for is 1."""
    device = Counterfeit(GPU)
    monkeypatch.setattr(torch.Tensor, "item", lambda _: 1.0)
    with device.mode:
        places = {id(parameter): name for name, parameter in loaded.model.named_parameters()}
        device.hold(loaded.model)
        named = dict(loaded.model.named_parameters())
        trainable = {name: named[places[id(parameter)]] for name, parameter in loaded.trainable.items()}
        yield replace(loaded, trainable=trainable, weights=replace(loaded.weights, device=device))


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("model_type", ["bert", "gpt2", "llama"])
def test_all_that_a_pass_needs_is_moved(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, model_type: str, kept: bool
) -> None:
    """Ids, masks, kept states, targets: what was left with the processor would not mix with what is on a GPU."""
    loaded = load_model(folders[model_type], FEDERATION)
    data = make_dataset(loaded, tiny.notes(4), batch_size=4, seed=3, keep=InMemory(1 << 20) if kept else NOWHERE)
    assert data.prepared.cached == kept
    with on_counterfeit(loaded, monkeypatch) as there, forward_pass(there, data.prepared) as forward:
        for batch in data.prepared.batches:
            logits = forward(batch)
            loss = there.loss(logits, batch.targets)
            assert (logits.device, loss.device, logits.dtype) == (GPU, GPU, torch.float32)
            with pytest.raises(RuntimeError):
                there.task.loss(logits, batch.targets)


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_gradients_are_taken_there(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, adapter: str) -> None:
    """Of batches, of records one by one and together, and of candidates for the layers that are trained."""
    section = {} if adapter == "none" else {"adapter": {"kind": adapter, "rank": 2, "alpha": 4}}
    loaded = load_model(folders["llama"], tiny.federation(**section))
    data = make_dataset(loaded, tiny.notes(4), batch_size=4, seed=3)
    records = make_records(loaded, tiny.notes(4))
    charge = Charge(noise_multiplier=1.0, sample_rate=1.0, steps=1)
    with on_counterfeit(loaded, monkeypatch) as there:
        assert measure(there, data.prepared, "snr", seed=0).keys() == {2, 3}
        for prepared, descent in (
            (data.prepared, batch_by_batch(there, data, FEDERATION.training, 0)),
            (records.data.prepared, private_descent(there, records, charge, 1.0)),
            (records.data.prepared, private_descent(there, records, charge, 1.0, together=1 << 20)),
        ):
            with forward_pass(there, prepared) as forward:
                descent.gradient(forward, 0)
            gradients = [parameter.grad for parameter in there.trained.values()]
            assert {None if gradient is None else gradient.device for gradient in gradients} == {GPU}


def in_bf16() -> Device:
    """The processor, which knows bfloat16 too."""
    return Device(torch.device("cpu"), "bf16")


@pytest.mark.parametrize("model_type", tiny.MODEL_TYPES)
def test_bf16_trains_nearly_alike(folders: dict[str, Path], model_type: str) -> None:
    """Each step's loss is within 2 % of float32's; kept states change nothing; what comes out is float32."""
    found: dict[str, list[float]] = {}
    for way, device, keep in (
        ("f32", CPU, InMemory(1 << 20)),
        ("bf16, kept", in_bf16(), InMemory(1 << 20)),
        ("bf16, plain", in_bf16(), NOWHERE),
    ):
        loaded = load_model(folders[model_type], FEDERATION, device=device)
        data = make_dataset(loaded, tiny.notes(6), batch_size=4, seed=3, keep=keep)
        assert data.prepared.cached == (keep is not NOWHERE)
        losses = found.setdefault(way, [mean_loss(loaded, data)])
        section = FEDERATION.training.model_copy(update={"epochs": 3})
        note = partial(_note, losses)
        result = train(loaded, read_trainable(loaded), data, section, seed=1, progress=note)
        assert {values.dtype for values in result.delta.values()} == {np.dtype(np.float32)}
        assert all(0 <= score <= 1 for score in evaluate(loaded, data).overall.values())
    assert found["bf16, kept"] == pytest.approx(found["f32"], rel=0.02)
    assert found["bf16, kept"] != found["f32"]
    assert found["bf16, kept"] == found["bf16, plain"]


def _note(losses: list[float], _share: float, loss: float) -> None:
    losses.append(loss)


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "llama"])
def test_in_bf16_a_record_moves_the_sum_by_no_more_than_the_bound(folders: dict[str, Path], model_type: str) -> None:
    """One by one and together: what is added has the norm that was measured, and both ways nearly agree."""
    loaded, bound = load_model(folders[model_type], FEDERATION, device=in_bf16()), 0.05
    records = make_records(loaded, tiny.notes(4))
    with forward_pass(loaded, records.data.prepared) as forward:
        for span in records.spans:
            own = [records.data.prepared.batches[place] for place in span]
            alone, together = ({each: torch.zeros_like(each) for each in trained_of(loaded)} for _ in range(2))
            add_clipped([*alone.values()], record_gradient(loaded, forward, own), bound)
            add_clipped_together(together, loaded, forward, own, bound)
            assert norm_of(alone.values()) == pytest.approx(bound, rel=1e-5)
            assert norm_of(together.values()) == pytest.approx(bound, rel=1e-5)
            assert max(map(norm_of, (alone.values(), together.values()))) <= bound
            assert norm_of(alone[each] - together[each] for each in alone) < 0.05 * bound


def trained_of(loaded: LoadedModel) -> list[nn.Parameter]:
    """Parameters in the order of their names in the model, as a record's gradient has them."""
    return [each for _, each in sorted(loaded.model.named_parameters()) if each.requires_grad]


def norm_of(tensors: Iterable[torch.Tensor]) -> float:
    """L2 norm over all tensors, in double precision."""
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


@pytest.mark.parametrize(
    ("asked", "gpus", "found"),
    [
        ("auto", 0, "cpu"),
        ("auto", 2, "cuda:0"),
        ("cpu", 2, "cpu"),
        ("cuda", 1, "cuda:0"),
        ("cuda:1", 2, "cuda:1"),
    ],
)
def test_auto_takes_the_first_gpu_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch, asked: str, gpus: int, found: str
) -> None:
    """And each other word means what it says; a GPU always has its number."""
    count(monkeypatch, gpus)
    assert find_device(ComputeSection(device=asked, precision="bf16")) == Device(torch.device(found), "bf16")


@pytest.mark.parametrize(
    ("asked", "gpus", "said"), [("cuda", 0, "no GPU of CUDA"), ("cuda:0", 0, "no GPU"), ("cuda:2", 2, "only 2 of CUDA")]
)
def test_a_gpu_that_is_not_there_is_missed(monkeypatch: pytest.MonkeyPatch, asked: str, gpus: int, said: str) -> None:
    """Whoever asks for one is not given the processor in silence."""
    count(monkeypatch, gpus)
    with pytest.raises(ConfigError, match=f'device = "{asked}".*{said}'):
        find_device(ComputeSection(device=asked))


def count(monkeypatch: pytest.MonkeyPatch, gpus: int) -> None:
    """Let torch find so many GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)


def test_the_generators_of_both_are_seeded_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU draws dropout from a generator of its own, whose state is kept along with the processor's."""
    of_gpu, asked = [torch.tensor([7])], list[torch.device]()

    def state(device: torch.device) -> torch.Tensor:
        asked.append(device)
        return of_gpu[0]

    monkeypatch.setattr(torch.cuda, "get_rng_state", state)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, _: of_gpu.__setitem__(0, state))
    before = torch.get_rng_state()
    with Device(torch.device("cuda", 1)).seeded(3):
        of_gpu[0] = torch.tensor([8])
        drawn = torch.rand(2)
    with CPU.seeded(3):
        assert torch.equal(torch.rand(2), drawn)
    assert torch.equal(torch.get_rng_state(), before)
    assert (asked, of_gpu[0].item()) == ([torch.device("cuda", 1)], 7)


def test_what_is_not_in_memory_stays_away_when_a_model_moves(folders: dict[str, Path]) -> None:
    """And its parameters stay the same objects, so that optimizer and update know them."""
    loaded = load_model(folders["llama"], FEDERATION, suffix=True)
    parameters, away = [*loaded.model.parameters()], absent(loaded.model)
    CPU.hold(loaded.model)
    assert all(one is other for one, other in zip(parameters, loaded.model.parameters(), strict=True))
    assert absent(loaded.model) == away != ()
