"""Generative extraction: mark-up out and back, windows with the loss on the answer, and a tiny model that writes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from edge_client.data import Entity, Note, Sentence
from edge_client.model import LoadedModel, export, load_model, read_trainable, seal
from edge_client.tasks import IGNORED
from edge_client.tasks.encoding import TextEncoder
from edge_client.tasks.extraction import ExtractionTask
from edge_client.tasks.markup import read_markup, write_markup
from edge_client.trainer import evaluate, make_dataset, train
from shared.config import FederationConfig
from shared.errors import ConfigError
from tests.unit.edge_client import tiny

pytestmark = pytest.mark.slow

LABELS = ("problem", "treatment", "test")
TASK = ExtractionTask(LABELS)
LINE = Sentence(
    ("he", "has", "Chest", "pain", "on", "aspirin", "."), (Entity(2, 4, "problem"), Entity(5, 6, "treatment"))
)
MARKED = 'he has <span class="problem">Chest pain</span> on <span class="treatment">aspirin</span> .'
P, T = Entity(2, 4, "problem"), Entity(5, 6, "treatment")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaMA that reads long prompts, and writes with its own embeddings."""
    torch.set_num_threads(1)
    folder = tiny.save_model(tmp_path_factory.mktemp("models") / "llama", "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "max_position_embeddings": 512, "tie_word_embeddings": True})
    )
    return folder


def federation(**changes: object) -> FederationConfig:
    """A tiny federation of this task."""
    return tiny.federation(task={"kind": "extraction", "labels": LABELS, "max_length": 400}, **changes)


def test_mark_up_says_what_was_marked() -> None:
    """Written by hand, and read back as it was."""
    assert write_markup(LINE) == MARKED
    assert read_markup(MARKED, LINE.tokens, LABELS) == LINE.entities


@pytest.mark.parametrize("word", ["<0.01", "K<3.5", "<", "<<", "a<b>c", "5\u00a0mg", "x\u0085y", "</p>"])
def test_mark_up_gives_back_words_of_any_kind(word: str) -> None:
    """Angle brackets, hard spaces and the line ends that only Unicode knows are parts of words, as in the notes."""
    for entity in (Entity(0, 2, "test"), Entity(1, 2, "test"), Entity(1, 3, "problem")):
        line = Sentence(("troponin", word, "today"), (entity,))
        assert read_markup(write_markup(line), line.tokens, LABELS) == (entity,)


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("", ()),
        ("I am a language model.", ()),
        ("he has Chest pain on aspirin .", ()),
        ("  \n" + MARKED + "\nText: and so on <span class=problem>he</span>", (P, T)),
        (
            MARKED.upper()
            .replace("SPAN CLASS", "span class")
            .replace("PROBLEM", "problem")
            .replace("</SPAN>", "</span>"),
            (P,),
        ),
        ("he has <span class='problem'>chest pain on <span class=treatment>aspirin", (Entity(2, 5, "problem"), T)),
        ('he has <span class="disease">chest pain</span> on <span class="treatment">aspirin</span>', (T,)),
        ('Sure! he has bad <span class="problem">awful chest pain</span> on aspirin', (P,)),
        ('<span class="problem">fever</span>', ()),
        ('he has <span class="problem"></span> chest pain', ()),
        ('he has< span class = "problem" >chest pain< /span >on', (P,)),
        (
            '<span class="problem">chest pain</span> <span class="treatment">pain on aspirin</span>',
            (Entity(2, 3, "problem"), Entity(3, 6, "treatment")),
        ),
        ("he <b>has</b> < 3 </span> <span", ()),
    ],
)
def test_whatever_is_written_is_read(answer: str, found: tuple[Entity, ...]) -> None:
    """Additions, letter case, quotes, missing ends, unknown classes and plain nonsense are no errors."""
    assert read_markup(answer, LINE.tokens, LABELS) == found


def test_the_loss_is_on_the_answer_alone(folder: Path) -> None:
    """Targets are the next tokens from the last one of the prompt on, and the last target ends the text."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoder = TextEncoder(tokenizer, max_length=400, speaks_last=True)
    (window,) = TASK.windows([Note("n", (Sentence((), ()), LINE))], encoder)
    (begin,) = window.positions.tolist()
    assert tokenizer.decode(window.ids[:begin].tolist()) == TASK.prompt(LINE)
    assert tokenizer.decode(window.ids[begin:-1].tolist()) == MARKED
    assert window.ids[-1] == tokenizer.eos_token_id
    assert (window.targets[: begin - 1] == IGNORED).all()
    assert window.targets[begin - 1 : -1].tolist() == window.ids[begin:].tolist()
    assert window.targets[-1] == IGNORED
    assert window.units.tolist() == [0]


def test_what_does_not_fit(folder: Path) -> None:
    """An answer is cut at the window's end; a line whose prompt fills the window is in none and counts as unmarked."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    note = Note("n", (LINE,))
    (whole,) = TASK.windows([note], TextEncoder(tokenizer, max_length=400, speaks_last=True))
    begin = int(whole.positions[0])
    (cut,) = TASK.windows([note], TextEncoder(tokenizer, max_length=begin + 3, speaks_last=True))
    assert cut.ids.tolist() == whole.ids[: begin + 3].tolist()
    assert list(TASK.windows([note], TextEncoder(tokenizer, max_length=begin, speaks_last=True))) == []
    assert TASK.score([note], np.zeros(1, dtype=object)).overall == {"strict_f1": 0.0, "lenient_f1": 0.0}
    assert TASK.score([note], np.array([MARKED], dtype=object)).overall == {"strict_f1": 1.0, "lenient_f1": 1.0}


def test_blocks_are_trained_and_the_output_layer_is_not(folder: Path) -> None:
    """The class is the one that writes; nothing above the blocks but the norm is trained, and nothing is drawn."""
    loaded = load_model(folder, federation())
    assert loaded.architecture == "LlamaForCausalLM"
    assert {name.split(".")[1] for name in loaded.trainable} == {"layers", "norm"}
    assert seal(loaded, federation()).labels == LABELS


def test_it_learns_to_mark(folder: Path, tmp_path: Path) -> None:
    """A model that has seen a few lines often marks them as it was shown, alone or beside longer ones, exported too."""
    loaded = load_model(folder, federation(layers={"plan": "all"}))
    notes = [Note("n", (LINE, Sentence(("cbc", "today"), (Entity(0, 1, "test"),)), Sentence(("well", "today"), ())))]
    data = make_dataset(loaded, notes, batch_size=3, seed=0)
    assert evaluate(loaded, data).main == 0.0
    section = federation().training.model_copy(update={"epochs": 150, "lr": 1e-2})
    result = train(loaded, read_trainable(loaded), data, section, seed=1)
    assert evaluate(loaded, data).overall == {"strict_f1": 1.0, "lenient_f1": 1.0}, result.metrics
    assert evaluate(loaded, make_dataset(loaded, notes, batch_size=1, seed=0)).main == 1.0
    export(loaded, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    _same(loaded, again)


def _same(loaded: LoadedModel, again: torch.nn.Module) -> None:
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, loaded.model(input_ids=ids).logits)


def test_an_encoder_cannot_write(tmp_path: Path) -> None:
    """A model that reads both ways is refused, and the error says which kind will do."""
    folder = tiny.save_model(tmp_path / "bert", "bert")
    with pytest.raises(ConfigError, match="has the model write text") as caught:
        load_model(folder, federation())
    assert "decoder" in caught.value.hint
