"""Ghost clipping: its sums are those of records one by one, and Opacus'; nothing of a broken record is in them."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import structlog
import torch
from opacus.grad_sample.utils import prepare_module

from edge_client.batches import Batch, side_by_side
from edge_client.data import TextNote
from edge_client.model import LoadedModel, load_model
from edge_client.prefix import forward_pass, prepare
from edge_client.prefix_store import NOWHERE
from edge_client.privacy import ghost
from edge_client.privacy.descent import add_clipped, make_private, private_descent, record_gradient
from edge_client.privacy.ghost import add_clipped_together, unsuited
from edge_client.privacy.ledger import Charge
from edge_client.privacy.records import SHORT, Records, grouped, make_records
from shared.config import PrivacySection
from shared.errors import ConfigError
from tests.unit.edge_client import tiny

SECTION = PrivacySection(delta=1e-3, noise_multiplier=1.0)
LORA = {"kind": "lora", "rank": 4, "alpha": 8}
Sums = dict[torch.nn.Parameter, torch.Tensor]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with a tiny model of each type."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("models")
    return {model_type: tiny.save_model(root / model_type, model_type) for model_type in tiny.MODEL_TYPES}


def zeros(loaded: LoadedModel) -> Sums:
    """Sums of nothing."""
    return {each: torch.zeros_like(each) for each in loaded.model.parameters() if each.requires_grad}


def norm_of(tensors: Any) -> float:
    """L2 norm over all tensors, in double precision."""
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


def batches_of(records: Records) -> list[Batch]:
    """Those of records that have one each."""
    assert all(len(span) == 1 for span in records.spans)
    return [records.data.prepared.batches[span[0]] for span in records.spans]


def both(loaded: LoadedModel, records: Records) -> tuple[Sums, float, Sums, float]:
    """Sums and loss by ghost clipping and one by one, at a bound that clips some records and not others."""
    batches, together, alone = batches_of(records), zeros(loaded), zeros(loaded)
    with forward_pass(loaded, records.data.prepared) as forward:
        names = {parameter: name for name, parameter in loaded.model.named_parameters()}
        found = [record_gradient(loaded, forward, [batch]) for batch in batches]
        bound = sorted(norm_of(each.tensors) for each in found)[len(found) // 2]
        in_order = [alone[parameter] for parameter in sorted(alone, key=lambda each: names[each])]
        one_by_one = sum(add_clipped(in_order, each, bound) for each in found)
        at_once = add_clipped_together(together, loaded, forward, batches, bound)
    return together, at_once, alone, one_by_one


def assert_close(found: Sums, wanted: Sums) -> None:
    """All tensors alike, and not all nothing."""
    assert norm_of(wanted.values()) > 0
    for parameter, total in wanted.items():
        torch.testing.assert_close(found[parameter], total, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("adapter", [{}, LORA], ids=["blocks", "adapters"])
@pytest.mark.parametrize("model_type", tiny.MODEL_TYPES)
def test_sums_are_those_of_records_one_by_one(
    folders: dict[str, Path], model_type: str, adapter: dict[str, Any]
) -> None:
    """In every model, with records of several windows and of different lengths."""
    loaded = load_model(folders[model_type], tiny.federation(adapter=adapter))
    notes = [note for lines in (1, 3, 5) for note in tiny.notes(2, lines=lines, seed=lines)]
    named = [replace(note, id=f"n{number}") for number, note in enumerate(notes)]
    records = make_records(loaded, named)
    windows = {len(batch.windows) for batch in batches_of(records)}
    assert min(windows) == 1 < max(windows)
    together, at_once, alone, one_by_one = both(loaded, records)
    assert_close(together, alone)
    assert at_once == pytest.approx(one_by_one, rel=1e-5)


@pytest.mark.parametrize("cost", [0.0, 1e9], ids=["lengths without gradients", "lengths of gradients"])
def test_both_ways_to_a_length_agree(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, cost: float) -> None:
    """Each for all layers, where otherwise tokens and width decide."""
    monkeypatch.setattr(ghost, "DOUBLE", cost)
    loaded = load_model(folders["bert"], tiny.federation())
    together, _, alone, _ = both(loaded, make_records(loaded, tiny.notes(5, lines=6)))
    assert_close(together, alone)


def test_a_head_above_a_pooler(folders: dict[str, Path]) -> None:
    """Both see a window once, and not its tokens."""
    task = {"kind": "classification", "labels": ["problem", "treatment"]}
    loaded = load_model(folders["bert"], tiny.federation(task=task))
    notes = [TextNote(f"n{n}", f"p{n}", " ".join(tiny.FILLER[: n + 2]), ("problem",)) for n in range(4)]
    together, _, alone, _ = both(loaded, make_records(loaded, notes))
    assert_close(together, alone)


def test_a_model_that_writes(folders: dict[str, Path], tmp_path: Path) -> None:
    """Its head is the embeddings, which are frozen below a plan of blocks."""
    folder = Path(shutil.copytree(folders["llama"], tmp_path / "writer"))
    config = json.loads((folder / "config.json").read_text())
    longer = {"max_position_embeddings": 512, "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps({**config, **longer}))
    loaded = load_model(folder, tiny.federation(task={"kind": "extraction", "max_length": 400}))
    together, _, alone, _ = both(loaded, make_records(loaded, tiny.notes(3, lines=1)))
    assert_close(together, alone)


@pytest.mark.filterwarnings("ignore:Full backward hook")
@pytest.mark.parametrize("model_type", ["llama", "bert"])
def test_opacus_ghost_mode_finds_the_same(folders: dict[str, Path], model_type: str) -> None:
    """Where each record is one window: its factors from one backward pass, and its sum from a second."""
    loaded = load_model(folders[model_type], tiny.federation(task={"max_length": 64}))
    records = make_records(loaded, tiny.notes(5, lines=2))
    batches, ours = batches_of(records), zeros(loaded)
    batch = side_by_side(batches, pad_id=loaded.pad_id, causal=loaded.family.causal, per_token=True)
    assert len(batch.windows) == len(batches)
    hooks = prepare_module(loaded.model, "ghost", wrap_model=False, loss_reduction="sum", strict=False)
    for part in loaded.model.modules():  # Opacus looks at what is in training mode alone
        part.training = any(parameter.requires_grad for parameter in part.parameters(recurse=False))
    with forward_pass(loaded, prepare(loaded, [batch], NOWHERE)) as forward:
        rows = zip(torch.split(forward(replace(batch, hidden=None)), 1), torch.split(batch.targets, 1), strict=True)
        losses = torch.stack([loaded.task.loss(*row) for row in rows])
        losses.sum().backward(retain_graph=True)  # type: ignore[no-untyped-call]
        lengths = hooks.get_norm_sample().detach()
        bound = lengths.median().item()
        hooks.disable_hooks()
        loaded.model.zero_grad()
        (losses * (bound / lengths).clamp(max=1)).sum().backward()
    hooks.cleanup()
    loaded.model.eval()
    with forward_pass(loaded, records.data.prepared) as forward:
        add_clipped_together(ours, loaded, forward, batches, bound)
    assert_close(ours, {parameter: parameter.grad for parameter in ours if parameter.grad is not None})


def test_a_record_that_is_no_number_adds_nothing(folders: dict[str, Path]) -> None:
    """NaN in one record's windows: the sum is that of the others, and so is the loss."""
    loaded = load_model(folders["llama"], tiny.federation())
    records = make_records(loaded, tiny.notes(4, lines=6))
    first, *others = batches_of(records)
    assert first.hidden is not None
    unusable = torch.full_like(first.hidden(), float("nan"))
    broken = replace(first, hidden=lambda: unusable)
    with forward_pass(loaded, records.data.prepared) as forward:
        found, wanted = zeros(loaded), zeros(loaded)
        loss = add_clipped_together(found, loaded, forward, [broken, *others], 1.0)
        assert loss == pytest.approx(add_clipped_together(wanted, loaded, forward, others, 1.0), rel=1e-5)
        assert_close(found, wanted)
        nothing = zeros(loaded)
        assert add_clipped_together(nothing, loaded, forward, [broken], 1.0) == 0.0
        assert norm_of(nothing.values()) == 0.0


def test_a_step_is_the_same_either_way(folders: dict[str, Path]) -> None:
    """With all drawn and next to no noise: records of one batch together, one of several by itself."""
    loaded = load_model(folders["llama"], tiny.federation())
    notes = (*tiny.notes(5, lines=2), replace(tiny.notes(1, lines=90)[0], id="long"))
    records = make_records(loaded, notes)
    assert sorted(map(len, records.spans))[-2:] == [1, len(records.spans[-1])]
    assert len(records.spans[-1]) > 1
    charge = Charge(sample_rate=1.0, noise_multiplier=1e-9, steps=1)
    found: list[Sums] = []
    losses = []
    for together in (0, 10_000):
        descent = private_descent(loaded, records, charge, 1.0, together=together)
        with forward_pass(loaded, records.data.prepared) as forward:
            losses.append(descent.gradient(forward, 0))
        found.append({each: each.grad for each in loaded.model.parameters() if each.grad is not None})
        loaded.model.zero_grad()
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert_close(*found)


def test_groups_fit_into_their_room(folders: dict[str, Path]) -> None:
    """Each batch once; padded to its longest a group has at most so many tokens, unless it is one batch."""
    loaded = load_model(folders["llama"], tiny.federation())
    batches = batches_of(make_records(loaded, [*tiny.notes(9, lines=1), *tiny.notes(3, lines=7, seed=2)][::-1][:9]))
    for room in (1, 40, 100, 10_000):
        groups = [*grouped(batches, room)]
        assert sorted(id(batch) for group in groups for batch in group) == sorted(map(id, batches))
        for group in groups:
            padded = sum(len(batch.windows) for batch in group) * max(batch.ids.shape[1] for batch in group)
            assert padded <= room or len(group) == 1
    assert len([*grouped(batches, 10_000)]) == 1
    assert [*grouped([], 10)] == []


@pytest.mark.parametrize(
    ("plan", "clipping", "together", "says"),
    [
        ("top:2", "record", 0, "record"),
        ("top:2", "ghost", 256, "ghost"),
        ("top:2", "auto", SHORT, "ghost up to 64 tokens"),
        ("all", "record", 0, "record"),
        ("all", "auto", 0, "record, because of Embedding"),
    ],
)
def test_what_is_taken_stands_in_the_log(
    folders: dict[str, Path], plan: str, clipping: Any, together: int, says: str
) -> None:
    """What was asked for, or what the layers allow."""
    federation = tiny.federation(layers={"plan": plan}, privacy=SECTION.model_dump())
    loaded = load_model(folders["llama"], federation)
    with structlog.testing.capture_logs() as logs:
        private = make_private(loaded, tiny.notes(3), federation, SECTION, clipping)
    assert (private.together, logs[0]["clipping"]) == (together, says)


@pytest.mark.parametrize("model_type", tiny.MODEL_TYPES)
def test_embeddings_are_refused_by_their_type(folders: dict[str, Path], model_type: str) -> None:
    """Before anything is computed; with the key to change."""
    federation = tiny.federation(layers={"plan": "all"}, privacy=SECTION.model_dump())
    loaded = load_model(folders[model_type], federation)
    assert unsuited(loaded.model) == "Embedding"
    with pytest.raises(ConfigError, match=r'privacy.clipping = "ghost" .* of type Embedding') as caught:
        make_private(loaded, tiny.notes(3), federation, SECTION, "ghost")
    assert '"record"' in caught.value.hint


def test_a_tensor_of_two_layers_is_refused() -> None:
    """Its gradient has parts from both, which belong together before they are clipped."""
    first, second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    assert unsuited(torch.nn.Sequential(first, second)) == ""
    second.weight = first.weight
    assert unsuited(torch.nn.Sequential(first, second)) == "Linear"
